// Gated delta rule, second of two kernels: the chunks of 16 tokens in turn, in matrix products.
// gated_delta_prepare has found `inverse`, `scores` and `decays`, and says what they are.
//
// A SIMD-group keeps 16 rows of the state S in registers, Dk / 2 floats a lane, from the first
// chunk to the last. It works on transposes, so that what one product yields is the next one's left
// operand without leaving its lane. With c and e the decays from the start and to the end:
//
//   U^T = (V - c K S^T)^T inverse^T
//   Y^T = c S Q^T + U^T scores^T,    S = c_15 S + (e U)^T K
//
// No operand is rounded to T on Apple's GPUs. On tensor cores S and U are sums of two T where they
// meet q and k, and so are all operands where T is bfloat (gated_delta.h): 16 bits of each.
//
// q, k         [B, T, H, Dk] of type T, contiguous
// v, y         [B, T, H, Dv] of type T, v with any strides
// mask         [B, T] bool, contiguous, where `masked`; else any array
// state        [B, H, Dv, Dk] float, contiguous, as is new_state
// checkpoints  [B, H, ceil(T / 64), Dv, Dk] float, where `save`: the state before each 64 tokens;
//              else untouched
//
// Template: T, Dk, Dv (multiples of 16), slice (rows of the state a threadgroup has: a multiple of
// 16 that divides Dv), masked, save. Grid: Dv / slice x H x B threadgroups of 2 slice threads.
// Threadgroup memory: q and k of one or two chunks, up to 32 KiB.

constexpr short PIECE = 16 / sizeof(T);
constexpr short THREADS = 2 * slice;
constexpr short PADDING = 2 * TOKENS * (Dk + PIECE) * sizeof(T) <= 32768 ? PIECE : 0;
constexpr short ROW = Dk + PADDING;
constexpr short ROW_PIECES = Dk / PIECE;
constexpr short PIECES = 2 * TOKENS * ROW_PIECES;
constexpr short PIECES_EACH = (PIECES + THREADS - 1) / THREADS;
// Where two fit, one is filled while the other is read.
constexpr short BUFFERS = 4 * TOKENS * ROW * sizeof(T) <= 32768 ? 2 : 1;
constexpr short BUFFER = 2 * TOKENS * ROW / PIECE;

threadgroup uint4 staged[BUFFERS * BUFFER];

const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const short thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const int length = q_shape[1];
const int heads = q_shape[2];
const int row = threadgroup_position_in_grid.x * slice + simdgroup_index_in_threadgroup * 16;
const int chunks = (length + TOKENS - 1) / TOKENS;
const int segments = (chunks + 3) / 4;
const size_t sequence = size_t(batch) * heads + head;

tile<float> S[Dk / 16];
#pragma unroll
for (short d = 0; d < Dk / 16; d++) {
  load(S[d], state + (sequence * Dv + row) * Dk + 16 * d, Dk, lane);
}

uint4 ahead[PIECES_EACH];
tile<T> v_ahead;
for (short i = 0; i < 8; i++) {
  v_ahead.e[i] = T(0.0f);
}

for (int chunk = -1; chunk < chunks; chunk++) {
  tile<T> values = v_ahead;

  const int first = (chunk + 1) * TOKENS;
  const size_t token = size_t(batch) * length + first;
  const bool more = chunk + 1 < chunks;
  if (more) {
    const size_t start = (token * heads + head) * Dk;
    const long v_start = batch * v_strides[0] + first * v_strides[1] + head * v_strides[2];
#pragma unroll
    for (short i = 0; i < PIECES_EACH; i++) {
      const short p = i * THREADS + thread_index;
      const short t = p / ROW_PIECES % TOKENS;
      bool kept = first + t < length;
      if (masked && kept) {
        kept = mask[token + t];
      }
      ahead[i].x = ahead[i].y = ahead[i].z = ahead[i].w = 0;
      if (kept) {
        const device T* from = p < PIECES / 2 ? q : k;
        ahead[i] = piece_at(from + start + t * heads * Dk + p % ROW_PIECES * PIECE);
      }
    }
#pragma unroll
    for (short i = 0; i < 8; i++) {
      const short t = tile_col(lane, i);
      bool kept = first + t < length;
      if (masked && kept) {
        kept = mask[token + t];
      }
      v_ahead.e[i] = T(0.0f);
      if (kept) {
        v_ahead.e[i] = v[v_start + t * v_strides[1] + (row + tile_row(lane, i)) * v_strides[3]];
      }
    }
  }

  if (chunk >= 0) {
    const threadgroup T* queries =
        reinterpret_cast<const threadgroup T*>(staged + chunk % BUFFERS * BUFFER);
    const threadgroup T* keys = queries + TOKENS * ROW;
    const size_t place = sequence * chunks + chunk;

    if (save && chunk % 4 == 0) {
#pragma unroll
      for (short d = 0; d < Dk / 16; d++) {
        const size_t at = ((sequence * segments + chunk / 4) * Dv + row) * Dk + 16 * d;
        store_device(S[d], checkpoints + at, Dk, lane);
      }
    }

    right_tile<float> solve, attend;
    load_in_order(solve, inverse + place * 256, lane);
    load_in_order(attend, scores + place * 256, lane);
    float from_start[8], to_end[8];
    for (short i = 0; i < 8; i++) {
      from_start[i] = decays[place * 32 + tile_col(lane, i)];
      to_end[i] = decays[place * 32 + TOKENS + tile_col(lane, i)];
    }
    const float through = decays[place * 32 + TOKENS - 1];

    tile<float> known, read;
    clear(known);
    clear(read);
#pragma unroll
    for (short d = 0; d < Dk / 16; d++) {
      const wide_tile<T> left = as_wide<T>(S[d]);
      right_tile<T> right;
      load_transposed_aligned(right, keys + 16 * d, ROW, lane);
      multiply_add(known, left, right);
      load_transposed_aligned(right, queries + 16 * d, ROW, lane);
      multiply_add(read, left, right);
    }

    tile<float> errors, u;
    for (short i = 0; i < 8; i++) {
      errors.e[i] = float(values.e[i]) - from_start[i] * known.e[i];
      read.e[i] *= from_start[i];
    }
    clear(u);
    multiply_add_floats<T>(u, errors, solve);
    multiply_add_floats<T>(read, u, attend);

    for (short i = 0; i < 8; i++) {
      u.e[i] *= to_end[i];
    }
    const wide_tile<T> writes = as_wide<T>(u);
#pragma unroll
    for (short d = 0; d < Dk / 16; d++) {
      right_tile<T> right;
      load_aligned(right, keys + 16 * d, ROW, lane);
      for (short i = 0; i < 8; i++) {
        S[d].e[i] *= through;
      }
      multiply_add(S[d], writes, right);
    }

    for (short i = 0; i < 8; i++) {
      const int t = chunk * TOKENS + tile_col(lane, i);
      if (t < length) {
        y[((size_t(batch) * length + t) * heads + head) * Dv + row + tile_row(lane, i)] =
            T(read.e[i]);
      }
    }
  }

  if (more) {
    if (BUFFERS == 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
#pragma unroll
    for (short i = 0; i < PIECES_EACH; i++) {
      const short p = i * THREADS + thread_index;
      if (p < PIECES) {
        staged[(chunk + 1) % BUFFERS * BUFFER + p / ROW_PIECES * (ROW / PIECE) + p % ROW_PIECES] =
            ahead[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

#pragma unroll
for (short d = 0; d < Dk / 16; d++) {
  store_device(S[d], new_state + (sequence * Dv + row) * Dk + 16 * d, Dk, lane);
}
