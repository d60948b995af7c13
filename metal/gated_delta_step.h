// Reads and sums of gated_delta_step, and what gated_delta_inputs makes as it does.

constant constexpr float L2_NORM_EPS = 1e-6f;

METAL_FUNC float decay_of(float a, float dt_bias, float A_log) {
  return metal::precise::exp(-metal::precise::exp(A_log) * softplus(a + dt_bias));
}

METAL_FUNC float dot_of(float4 a, float4 b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// a x + b y
METAL_FUNC float4 weighted(float a, float4 x, float b, float4 y) {
  float4 sum;
  sum.x = a * x.x + b * y.x;
  sum.y = a * x.y + b * y.y;
  sum.z = a * x.z + b * y.z;
  sum.w = a * x.w + b * y.w;
  return sum;
}

// Over the eight lanes that share a row of the state.
METAL_FUNC float sum_of_eight(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  x += simd_shuffle_xor(x, ushort(2));
  return x + simd_shuffle_xor(x, ushort(4));
}

// Entry `at` of the convolution's inputs for one channel: what is past, then this call's tokens,
// of which those that are padding count as zeros.
template <int PAST, typename P, typename X>
METAL_FUNC float conv_input(
    const device P* past, int past_stride, const device X* now, int stride, uint valid, int at) {
  if (at < PAST) {
    return float(past[at * past_stride]);
  }
  return (valid >> (at - PAST)) & 1 ? float(now[(at - PAST) * stride]) : 0.0f;
}

// One row of head_attention_decode's parts brought together by a threadgroup: D numbers at `result`,
// which all may read. `sums` has room for SIMD_GROUPS * D.
template <int D, int SIMD_GROUPS, typename O, typename Stats>
METAL_FUNC void bring_together(
    const device O* parts,
    Stats stats,
    int splits,
    size_t row,
    threadgroup float* result,
    threadgroup float* sums,
    threadgroup float* maxima,
    threadgroup float* weights,
    int simd_group,
    int lane) {
  parts += row * splits * D;
  stats += row * splits * 2;
  float m = LOWEST;
  for (int s = simd_group * 32 + lane; s < splits; s += 32 * SIMD_GROUPS) {
    m = metal::max(m, stats[2 * s]);
  }
  m = simd_max(m);
  if (lane == 0) {
    maxima[simd_group] = m;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (short i = 0; i < SIMD_GROUPS; i++) {
    m = metal::max(m, maxima[i]);
  }
  float weight = 0;
  float sum[D / 32] = {0};
#pragma unroll 4
  for (int s = simd_group; s < splits; s += SIMD_GROUPS) {
    const float kept = power_of_two(stats[2 * s] - m);
    weight += kept * stats[2 * s + 1];
#pragma unroll
    for (short i = 0; i < D / 32; i++) {
      sum[i] += kept * float(parts[s * D + lane + 32 * i]);
    }
  }
#pragma unroll
  for (short i = 0; i < D / 32; i++) {
    sums[simd_group * D + lane + 32 * i] = sum[i];
  }
  if (lane == 0) {
    weights[simd_group] = weight;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  weight = 0;
  for (short i = 0; i < SIMD_GROUPS; i++) {
    weight += weights[i];
  }
  for (int c = simd_group * 32 + lane; c < D; c += 32 * SIMD_GROUPS) {
    float total = 0;
    for (short i = 0; i < SIMD_GROUPS; i++) {
      total += sums[i * D + c];
    }
    result[c] = weight > 0 ? total / weight : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
