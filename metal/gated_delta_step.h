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
