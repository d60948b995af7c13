// Gated delta rule, first kernel: what of 16 tokens does not depend on the state.
//
// With D[t, j] the decay from token j to token t, and A[t, j] = beta_t D[t, j] k_t.k_j for j < t:
//
//   inverse = (I + A)^-1 diag(beta),  scores[t, j] = D[t, j] q_t.k_j for j <= t
//
// The inverse is found by substitution, row after row, in float, and decays are products of those
// between: neither loses digits, whatever the keys and the decays.
//
// q, k      [B, T, H, Dk] of type T, contiguous
// g, beta   [B, T, H] float, contiguous
// mask      [B, T] bool, contiguous, where `masked`; else any array
// prepared  [B, H, N, PREPARED] float, N = ceil(T / 16): the inverse and the scores, each as its
//           transpose is read as a right_tile (place_in_order in gated_delta.h), and the decays
//
// Tokens that are masked or past the end decay by 1, and their rows and columns are zeros.
//
// Template: T, Dk (a multiple of 16), masked. Grid: N x H x B threadgroups of one SIMD-group.
// Threadgroup memory: keys of 16 tokens (4.3 KiB for bfloat and Dk = 128) and 2.9 KiB.

constexpr short PIECE = 16 / sizeof(T);
constexpr short ROW = Dk + PIECE;
constexpr short ROW_PIECES = Dk / PIECE;
constexpr short RATE = TOKENS, KEPT = 2 * TOKENS;

threadgroup uint4 staged[TOKENS * ROW / PIECE];
threadgroup float square[2 * SQUARE];
threadgroup float gate[3 * TOKENS];
threadgroup T* keys = reinterpret_cast<threadgroup T*>(staged);

const int chunk = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const short lane = thread_index_in_simdgroup;
const int length = q_shape[1];
const int heads = q_shape[2];
const int first = chunk * TOKENS;
const int last = metal::min(int(TOKENS), length - first) - 1;
const int stride = heads * Dk;
const size_t start = (size_t(batch) * length + first) * stride + head * Dk;

if (COPIES && in_pieces(k)) {
  bool within[TOKENS * ROW_PIECES / 32];
  for (short i = 0; i < TOKENS * ROW_PIECES / 32; i++) {
    within[i] = piece_row<ROW_PIECES, 32>(i, lane) <= last;
  }
  copy_rows<T, ROW_PIECES, ROW / PIECE, 32, true>(staged, k + start, stride, within, lane);
} else {
  for (short p = lane; p < TOKENS * ROW_PIECES; p += 32) {
    const short row = p / ROW_PIECES, column = p % ROW_PIECES;
    staged[row * (ROW / PIECE) + column] =
        piece_at(k + start + metal::min(int(row), last) * stride + column * PIECE);
  }
}
if (lane < TOKENS) {
  const int token = batch * length + first + lane;
  bool kept = lane <= last;
  if (masked && kept) {
    kept = mask[token];
  }
  gate[lane] = kept ? float(g[size_t(token) * heads + head]) : 1.0f;
  gate[RATE + lane] = kept ? float(beta[size_t(token) * heads + head]) : 0.0f;
  gate[KEPT + lane] = kept ? 1.0f : 0.0f;
}
wait_until_copied();
threadgroup_barrier(mem_flags::mem_threadgroup);

// Whatever a token that is not kept holds stays in its own row and column.
tile<float> of_keys, of_queries;
clear(of_keys);
clear(of_queries);
for (short d = 0; d < Dk; d += 16) {
  tile<T> left;
  right_tile<T> right;
  load_transposed_aligned(right, keys + d, ROW, lane);
  load(left, keys + d, ROW, lane);
  multiply_add(of_keys, left, right);
  for (short i = 0; i < 8; i++) {
    const int row = metal::min(int(tile_row(lane, i)), last);
    left.e[i] = q[start + row * stride + d + tile_col(lane, i)];
  }
  multiply_add(of_queries, left, right);
}
store(of_keys, square, SQUARE_ROW, lane);
store(of_queries, square + SQUARE, SQUARE_ROW, lane);
threadgroup_barrier(mem_flags::mem_threadgroup);

// A lane has one column: the lower half of keys, the upper of queries.
const short column = lane % TOKENS;
const bool is_key = lane < TOKENS;
threadgroup float* mine = square + (is_key ? 0 : SQUARE) + column;
const bool kept = gate[KEPT + column] != 0;
float from_start = 1, between = 1;
for (short t = 0; t < TOKENS; t++) {
  from_start *= t <= column ? gate[t] : 1.0f;
  between *= t > column ? gate[t] : 1.0f;
  const bool counts = kept && gate[KEPT + t] != 0 && t >= column;
  const float factor = is_key ? gate[RATE + t] * between : between;
  mine[t * SQUARE_ROW] = counts ? factor * mine[t * SQUARE_ROW] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// The diagonal of I + A is not what stands there, but 1.
float solved[TOKENS];
#pragma unroll
for (short t = 0; t < TOKENS; t++) {
  solved[t] = t == column ? 1.0f : 0.0f;
#pragma unroll
  for (short j = 0; j < t; j++) {
    solved[t] -= square[t * SQUARE_ROW + j] * solved[j];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (is_key) {
  for (short t = 0; t < TOKENS; t++) {
    mine[t * SQUARE_ROW] = gate[RATE + column] * solved[t];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const size_t place = (size_t(batch) * heads + head) * threadgroups_per_grid.x + chunk;
device float* found = prepared + place * PREPARED;
for (short i = 0; i < 8; i++) {
  const short at = right_col(lane, i) * SQUARE_ROW + right_row(lane, i);
  found[place_in_order(lane, i)] = square[at];
  found[SCORES + place_in_order(lane, i)] = square[SQUARE + at];
}
if (is_key) {
  found[DECAYS + column] = from_start;
  found[DECAYS + TOKENS + column] = between;
}
