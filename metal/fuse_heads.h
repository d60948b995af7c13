// One head of fuse_heads.

// gamma * gate * RMSNorm(o) of one head's D channels, by a SIMD-group; o, the gate and its bias
// may have steps between channels, out has none.
template <int D, bool NORM, int KIND, bool BIAS, typename X, typename G>
METAL_FUNC void fuse_head(
    const device X* o,
    size_t o_step,
    const device G* gate,
    size_t gate_step,
    const device G* bias,
    size_t bias_step,
    float gamma,
    float eps,
    device X* out,
    short lane) {
  // Channels a lane has side by side.
  constexpr int M = D % 256 == 0 ? 8 : D % 128 == 0 ? 4 : D % 64 == 0 ? 2 : 1;
  constexpr int COUNT = (D + 32 * M - 1) / (32 * M);
  X e[COUNT][M];
  G gates[COUNT][M];
  G biases[COUNT][M];
  const bool wide = o_step == 1 && may_be_wide<M>(o);
  const bool wide_gate = KIND != NO_GATE && gate_step == 1 && may_be_wide<M>(gate);
  const bool wide_bias = BIAS && bias_step == 1 && may_be_wide<M>(bias);
#pragma unroll
  for (short i = 0; i < COUNT; i++) {
    const int c = (lane + 32 * i) * M;
    if (c < D) {
      read_channels<M>(o + c * o_step, o_step, wide, e[i]);
      if (KIND != NO_GATE) {
        read_channels<M>(gate + c * gate_step, gate_step, wide_gate, gates[i]);
      }
      if (BIAS) {
        read_channels<M>(bias + c * bias_step, bias_step, wide_bias, biases[i]);
      }
    }
  }
  float x[COUNT][M];
  float squares = 0;
#pragma unroll
  for (short i = 0; i < COUNT; i++) {
    const bool within = (lane + 32 * i) * M < D;
    for (short j = 0; j < M; j++) {
      x[i][j] = within ? float(e[i][j]) : 0.0f;
      squares += x[i][j] * x[i][j];
    }
  }
  if (NORM) {
    gamma *= metal::precise::rsqrt(simd_sum(squares) / D + eps);
  }
#pragma unroll
  for (short i = 0; i < COUNT; i++) {
    const int c = (lane + 32 * i) * M;
    if (c < D) {
      for (short j = 0; j < M; j++) {
        float raw = KIND == NO_GATE ? 1.0f : float(gates[i][j]);
        if (BIAS) {
          raw += float(biases[i][j]);
        }
        const float factor = KIND == SIGMOID_GATE ? fast_sigmoid(raw)
            : KIND == SILU_GATE                   ? fast_silu(raw)
                                                  : raw;
        e[i][j] = X(gamma * x[i][j] * factor);
      }
      write_channels<M>(out + c, e[i]);
    }
  }
}
