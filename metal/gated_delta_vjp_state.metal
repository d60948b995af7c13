// Gated delta rule, backward pass, second of four kernels: the gradient of the state, from the last
// chunk to the first, in registers. The formulas are in gated_delta_vjp.metal.
//
// k        [B, T, H, Dk] of type T, contiguous
// dy       [B, T, H, Dv] of type T, contiguous
// dstate   [B, H, Dv, Dk] float, contiguous: the gradient of the last state
// gates, wk, wq   from gated_delta_vjp_prepare
// dstates  [B, H, N, Dv, Dk] float: the gradient of the state after each chunk
// dstate0  [B, H, Dv, Dk] float: the gradient of the first state
//
// Template: T, Dk, Dv (multiples of 16). Grid: Dv / 16 x H x B threadgroups of 128 threads, each
// with 16 rows of the state. Threadgroup memory: 22.5 KiB for Dk = 256.

const int slice = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const short thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const short simdgroup = simdgroup_index_in_threadgroup;
const int length = k_shape[1];
const int heads = k_shape[2];
const int chunks = (length + CHUNK - 1) / CHUNK;
const size_t sequence = size_t(batch) * heads + head;

constexpr short TILES = (Dk + 63) / 64;
constexpr short STATE_ROW = Dk + 4;
threadgroup float gate[GATES];
threadgroup float rows[16 * STATE_ROW];
threadgroup float read[CHUNK * COLUMN_ROW];

tile<float> slope[TILES];
for (short n = 0; n < TILES; n++) {
  const int d = 16 * (4 * n + simdgroup);
  clear(slope[n]);
  if (Dk % 64 == 0 || d < Dk) {
    load(slope[n], dstate + (sequence * Dv + 16 * slice) * Dk + d, Dk, lane);
  }
}
for (int chunk = chunks - 1; chunk >= 0; chunk--) {
  const size_t place = sequence * chunks + chunk;
  const size_t first = size_t(batch) * length + chunk * CHUNK;
  const device T* keys = k + (first * heads + head) * Dk;
  const device T* slopes = dy + (first * heads + head) * Dv + 16 * slice;
  const device float* weighted_keys = wk + place * (CHUNK * Dk);
  const device float* weighted_queries = wq + place * (CHUNK * Dk);

  for (short n = 0; n < TILES; n++) {
    const int d = 16 * (4 * n + simdgroup);
    if (Dk % 64 == 0 || d < Dk) {
      store(slope[n], rows + d, STATE_ROW, lane);
      store_device(slope[n], dstates + (place * Dv + 16 * slice) * Dk + d, Dk, lane);
    }
  }
  UNROLLED
  for (short n = 0; n < (GATES + 127) / 128; n++) {
    const short i = 128 * n + thread_index;
    if (i < GATES) {
      gate[i] = gates[place * GATES + i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  tile<float> sum;
  clear(sum);
  const short token = 16 * simdgroup;
  UNROLLED
  for (int d = 0; d < Dk; d += 16) {
    tile<float> left;
    right_tile<float> right;
    load_tokens(
        left, keys + token * heads * Dk + d, heads * Dk, gate + KEPT + token, lane);
    load_transposed(right, rows + d, STATE_ROW, lane);
    multiply_add(sum, left, right);
  }
  scale_rows(sum, gate + TO_END + token, lane);
  for (short i = 0; i < 8; i++) {
    sum.e[i] = -sum.e[i];
  }
  store(sum, read + token * COLUMN_ROW, COLUMN_ROW, lane);
  for (short n = 0; n < TILES; n++) {
    for (short i = 0; i < 8; i++) {
      slope[n].e[i] *= gate[FROM_START + CHUNK - 1];
    }
  }
  UNROLLED
  for (short m = 0; m < CHUNK; m += 16) {
    tile<float> left;
    load_tokens_transposed(
        left, slopes + m * heads * Dv, heads * Dv, gate + KEPT + m, lane);
    for (short n = 0; n < TILES; n++) {
      const int d = 16 * (4 * n + simdgroup);
      if (Dk % 64 == 0 || d < Dk) {
        right_tile<float> right;
        load(right, weighted_queries + m * Dk + d, Dk, lane);
        multiply_add(slope[n], left, right);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  UNROLLED
  for (short m = 0; m < CHUNK; m += 16) {
    tile<float> left;
    load_transposed(left, read + m * COLUMN_ROW, COLUMN_ROW, lane);
    for (short n = 0; n < TILES; n++) {
      const int d = 16 * (4 * n + simdgroup);
      if (Dk % 64 == 0 || d < Dk) {
        right_tile<float> right;
        load(right, weighted_keys + m * Dk + d, Dk, lane);
        multiply_add(slope[n], left, right);
      }
    }
  }
}
for (short n = 0; n < TILES; n++) {
  const int d = 16 * (4 * n + simdgroup);
  if (Dk % 64 == 0 || d < Dk) {
    store_device(slope[n], dstate0 + (sequence * Dv + 16 * slice) * Dk + d, Dk, lane);
  }
}
