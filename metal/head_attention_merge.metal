// The splits of head_attention_decode and head_attention_prefill brought together.
//
// sums float [B, Hf, T, splits, D], stats float [B, Hf, T, splits, 2] (a maximum, in powers of two,
// and a sum of weights), both contiguous -> o [B, Hf, T, D] of T.
// Template: T; SIMDGROUPS that share a row's splits, a divisor of 8: more of them where rows are few.
// Grid: D / 32, and B * Hf * T rows / (8 / SIMDGROUPS), rounded up, threadgroups of 256: a lane has a
// column, a SIMD-group each SIMDGROUPS-th split.
// Threadgroup memory: 1.1 KB.

constexpr int ROWS = 8 / SIMDGROUPS;

threadgroup float parts[8 * 32];
threadgroup float maxima[8];
threadgroup float weights[8];

const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int first = simdgroup / SIMDGROUPS * SIMDGROUPS;
const int part = simdgroup - first;
const int splits = sums_shape[3];
const int D = sums_shape[4];
const int rows = sums_shape[0] * sums_shape[1] * sums_shape[2];
const int asked = int(threadgroup_position_in_grid.y) * ROWS + simdgroup / SIMDGROUPS;
const long row = metal::min(asked, rows - 1);
const int column = int(threadgroup_position_in_grid.x) * 32 + lane;
const int inside = metal::min(column, D - 1);

float m = LOWEST;
for (int s = part * 32 + lane; s < splits; s += 32 * SIMDGROUPS) {
  m = metal::max(m, stats[(row * splits + s) * 2]);
}
m = simd_max(m);
if (lane == 0) {
  maxima[simdgroup] = m;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (short i = 0; i < SIMDGROUPS; i++) {
  m = metal::max(m, maxima[first + i]);
}

float l = 0;
float sum = 0;
#pragma unroll 4
for (int s = part; s < splits; s += SIMDGROUPS) {
  const float kept = power_of_two(stats[(row * splits + s) * 2] - m);
  l += kept * stats[(row * splits + s) * 2 + 1];
  sum += kept * sums[(row * splits + s) * D + inside];
}
parts[simdgroup * 32 + lane] = sum;
if (lane == 0) {
  weights[simdgroup] = l;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (part == 0 && asked < rows && column < D) {
  l = 0;
  sum = 0;
  for (short i = 0; i < SIMDGROUPS; i++) {
    l += weights[first + i];
    sum += parts[(first + i) * 32 + lane];
  }
  o[row * D + column] = T(l > 0 ? sum / l : 0.0f);
}
