// Gradients of fuse_heads. With n = RMSNorm(o) = r o and y = gamma gate n:
//
//   dgate = dy gamma n,    dn = dy gamma gate,    do = r (dn - n mean(dn n)),
//   dgamma = sum(dy gate n) over all tokens and the head's elements
//
//   o      [B, T, H, D], strided as it comes
//   gamma  float [H]
//   gate   [B, T, H * D], strided as it comes; not read if KIND is NO_GATE
//   eps    float [1]; not read unless NORM
//   dy     [B, T, H * D], strided as it comes
//   d_o    [B, T, H, D]
//   d_gate as gate; [1] and zero if KIND is NO_GATE
//   d_gamma float [B, T, H]: each token's part of the sum
//
// Template: X, G the types of o and gate; H, D; NORM; KIND of gate (heads.h).
// Grid: a SIMD-group for each of the B * T * H heads, eight a threadgroup. No threadgroup memory.

constexpr int COUNT = (D + 31) / 32;

const int T = o_shape[1];
const uint row = threadgroup_position_in_grid.x * 8 + simdgroup_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
if (row < uint(o_shape[0] * T * H)) {
  const int head = row % H;
  const size_t token = row / H;
  const size_t start = token / T * o_strides[0] + token % T * o_strides[1] + head * o_strides[2];
  const size_t dy_start = token / T * dy_strides[0] + token % T * dy_strides[1];
  const size_t gate_start = KIND == NO_GATE
      ? 0
      : token / T * gate_strides[0] + token % T * gate_strides[1] + head * D * gate_strides[2];
  const size_t gate_step = KIND == NO_GATE ? 0 : gate_strides[2];
  const size_t place = size_t(row) * D;

  float n[COUNT];
  float squares = 0;
  for (short i = 0; i < COUNT; i++) {
    const int c = lane + 32 * i;
    n[i] = c < D ? float(o[start + c * o_strides[3]]) : 0.0f;
    squares += n[i] * n[i];
  }
  const float r = NORM ? metal::precise::rsqrt(simd_sum(squares) / D + eps[0]) : 1.0f;

  // dn / gamma, whose product with n is gamma's own gradient.
  float dn[COUNT];
  float both = 0;
  for (short i = 0; i < COUNT; i++) {
    const int c = lane + 32 * i;
    n[i] *= r;
    dn[i] = 0;
    if (c < D) {
      dn[i] = float(dy[dy_start + (head * D + c) * dy_strides[2]]);
      if (KIND != NO_GATE) {
        const float raw = float(gate[gate_start + c * gate_step]);
        d_gate[place + c] = G(dn[i] * gamma[head] * n[i] * activation_slope<KIND>(raw));
        dn[i] *= activated<KIND>(raw);
      }
    }
    both += dn[i] * n[i];
  }
  both = simd_sum(both);
  for (short i = 0; i < COUNT; i++) {
    const int c = lane + 32 * i;
    if (c < D) {
      d_o[place + c] = X(r * gamma[head] * (dn[i] - (NORM ? n[i] * both / D : 0.0f)));
    }
  }
  if (lane == 0) {
    d_gamma[row] = both;
  }
}
if (KIND == NO_GATE && row == 0 && lane == 0) {
  d_gate[0] = G(0.0f);
}
