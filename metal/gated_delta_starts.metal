// Gated delta rule: the state before each segment of a sequence, between the two runs of
// gated_delta_chunk. One segment's is S, the next one's S A + B, in float.
//
// state   [B, H, Dv, Dk] float, contiguous: before the first segment
// ends    [B, H, segments - 1, Dv + Dk, Dk] float: B, and UNIT times A under it
// starts  [B, H, segments, Dv, Dk] float
//
// Template: Dk, Dv (multiples of 16). Grid: Dv / 16 x H x B threadgroups of 2 Dk threads, a
// SIMD-group for 16 columns. Threadgroup memory: 16 rows of the state (8.3 KiB for Dk = 128).

constexpr short ROW = Dk + 4;
threadgroup float rows[16 * ROW];

const int row = threadgroup_position_in_grid.x * 16;
const int column = simdgroup_index_in_threadgroup * 16;
const short lane = thread_index_in_simdgroup;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const size_t sequence = size_t(batch) * threadgroups_per_grid.y + head;
const int segments = ends_shape[2] + 1;

// A's columns are read at once where registers hold them, or one tile waits for the next.
constexpr short AT_ONCE = Dk <= 128 ? Dk : 16;

tile<float> S;
load(S, state + (sequence * Dv + row) * Dk + column, Dk, lane);
for (int segment = 0; segment < segments; segment++) {
  store_device(S, starts + ((sequence * segments + segment) * Dv + row) * Dk + column, Dk, lane);
  if (segment + 1 < segments) {
    const device float* B =
        ends + (sequence * (segments - 1) + segment) * (Dv + Dk) * Dk + column;
    const device float* A = B + Dv * Dk;
    float sum[8];
    right_tile<float> right[AT_ONCE / 16];
#pragma unroll
    for (short i = 0; i < 8; i++) {
      sum[i] = B[(row + tile_row(lane, i)) * Dk + tile_col(lane, i)];
    }
#pragma unroll
    for (short d = 0; d < AT_ONCE; d += 16) {
      load(right[d / 16], A + d * Dk, Dk, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    store(S, rows + column, ROW, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    clear(S);
#pragma unroll
    for (short d = 0; d < Dk; d += 16) {
      tile<float> left;
      load(left, rows + d, ROW, lane);
      if (d >= AT_ONCE) {
        load(right[0], A + d * Dk, Dk, lane);
      }
      multiply_add(S, left, right[d < AT_ONCE ? d / 16 : 0]);
    }
    for (short i = 0; i < 8; i++) {
      S.e[i] = S.e[i] / UNIT + sum[i];
    }
  }
}
