// The splits of head_attention_decode and head_attention_prefill brought together.
//
// sums float [B, Hf, T, splits, D], stats float [B, Hf, T, splits, 2] (a maximum, in powers of two,
// and a sum of weights), both contiguous -> o [B, Hf, T, D] of T.
// Template: T.
// Grid: D / 32 rounded up, B * Hf * T threadgroups of 256: a lane has a column, a SIMD-group each
// eighth split.
// Threadgroup memory: 2.1 KB.

constexpr int SIMDGROUPS = 8;

threadgroup float parts[SIMDGROUPS * 32];
threadgroup float maxima[SIMDGROUPS];
threadgroup float weights[SIMDGROUPS];

const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int splits = sums_shape[3];
const int D = sums_shape[4];
const long row = threadgroup_position_in_grid.y;
const int column = int(threadgroup_position_in_grid.x) * 32 + lane;
const int inside = metal::min(column, D - 1);

float m = LOWEST;
for (int s = thread_index_in_threadgroup; s < splits; s += 32 * SIMDGROUPS) {
  m = metal::max(m, stats[(row * splits + s) * 2]);
}
m = simd_max(m);
if (lane == 0) {
  maxima[simdgroup] = m;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (short i = 0; i < SIMDGROUPS; i++) {
  m = metal::max(m, maxima[i]);
}

float l = 0;
float sum = 0;
for (int s = simdgroup; s < splits; s += SIMDGROUPS) {
  const float kept = power_of_two(stats[(row * splits + s) * 2] - m);
  l += kept * stats[(row * splits + s) * 2 + 1];
  sum += kept * sums[(row * splits + s) * D + inside];
}
parts[simdgroup * 32 + lane] = sum;
if (lane == 0) {
  weights[simdgroup] = l;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simdgroup == 0 && column < D) {
  l = 0;
  sum = 0;
  for (short i = 0; i < SIMDGROUPS; i++) {
    l += weights[i];
    sum += parts[i * 32 + lane];
  }
  o[row * D + column] = T(l > 0 ? sum / l : 0.0f);
}
