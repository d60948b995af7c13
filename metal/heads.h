// What kernels of both kinds of heads share: gates, activations and angles.

// How a gate comes: not at all, already activated, or before its sigmoid or SiLU.
constant constexpr int NO_GATE = 0;
constant constexpr int GATE = 1;
constant constexpr int SIGMOID_GATE = 2;
constant constexpr int SILU_GATE = 3;

METAL_FUNC float sigmoid(float x) {
  return 1.0f / (1.0f + metal::precise::exp(-x));
}

METAL_FUNC float silu(float x) {
  return x * sigmoid(x);
}

template <int KIND>
METAL_FUNC float activated(float gate) {
  if (KIND == SIGMOID_GATE) {
    return sigmoid(gate);
  }
  return KIND == SILU_GATE ? silu(gate) : gate;
}

// The derivative of the above.
template <int KIND>
METAL_FUNC float activation_slope(float gate) {
  const float s = sigmoid(gate);
  if (KIND == SIGMOID_GATE) {
    return s * (1.0f - s);
  }
  return KIND == SILU_GATE ? s * (1.0f + gate * (1.0f - s)) : 1.0f;
}

// log(1 + e) for e in (0, 1], to the last digits of a small e.
METAL_FUNC float log1p_of(float e) {
  const float u = 1.0f + e;
  return u == 1.0f ? e : metal::precise::log(u) * (e / (u - 1.0f));
}

METAL_FUNC float softplus(float x) {
  return metal::max(x, 0.0f) + log1p_of(metal::precise::exp(-metal::abs(x)));
}

METAL_FUNC float rope_angle(int position, float frequency) {
  return float(position) * frequency;
}
