// Head outputs on one scale, side by side for o_proj: gamma_h * gate * RMSNorm(o_h).
//
//   o      [B, T, H, D], strided as it comes
//   gamma  float [H]
//   gate   [B, T, H * D], strided as it comes; not read if KIND is NO_GATE
//   eps    float [1]; not read unless NORM
//   out    [B, T, H * D], of o's type
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
  const size_t gate_start = KIND == NO_GATE
      ? 0
      : token / T * gate_strides[0] + token % T * gate_strides[1] + head * D * gate_strides[2];
  const size_t gate_step = KIND == NO_GATE ? 0 : gate_strides[2];
  const size_t place = size_t(row) * D;

  float x[COUNT];
  float squares = 0;
  for (short i = 0; i < COUNT; i++) {
    const int c = lane + 32 * i;
    x[i] = c < D ? float(o[start + c * o_strides[3]]) : 0.0f;
    squares += x[i] * x[i];
  }
  float weight = gamma[head];
  if (NORM) {
    weight *= metal::precise::rsqrt(simd_sum(squares) / D + eps[0]);
  }
  for (short i = 0; i < COUNT; i++) {
    const int c = lane + 32 * i;
    if (c < D) {
      const float factor =
          KIND == NO_GATE ? 1.0f : activated<KIND>(float(gate[gate_start + c * gate_step]));
      out[place + c] = X(weight * x[i] * factor);
    }
  }
}
