// Head outputs on one scale, side by side for o_proj: gamma_h * gate * RMSNorm(o_h). Heads of two
// kinds, each with a gate and a norm of its own, or of one.
//
//   o       [B, T, H, D], strided as it comes
//   gate    [B, T, H * D], strided as it comes; not read if KIND is NO_GATE
//   bias    [H * D], likewise, added to the gate before its activation; not read unless BIAS
//   o_2     [B, T, H_2, D], likewise; not read if H_2 is 0
//   gate_2  [B, T, H_2 * D], likewise; not read if KIND_2 is NO_GATE
//   bias_2  [H_2 * D], likewise; not read unless BIAS_2
//   gamma   float [H + H_2], likewise
//   eps     float [2]: of each kind; not read without NORM, NORM_2
//   out     [B, T, (H + H_2) * D], of o's type
//
// Template: X, G the types of o and of gates and biases; H, H_2; D; NORM, NORM_2; KIND, KIND_2 of
// gate (heads.h); BIAS, BIAS_2: whether a gate has one.
// Grid: a SIMD-group for each head of each token, eight a threadgroup. No threadgroup memory.

const int T = o_shape[1];
const uint row = threadgroup_position_in_grid.x * 8 + simdgroup_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
if (row < uint(o_shape[0] * T * (H + H_2))) {
  const int head = row % (H + H_2);
  const size_t token = row / (H + H_2);
  // Of 32 bits: a division of 64 is a hundred instructions.
  const size_t b = uint(token) / uint(T);
  const size_t t = uint(token) % uint(T);
  device X* place = out + size_t(row) * D;
  if (head < H) {
    fuse_head<D, NORM, KIND, BIAS>(
        o + b * o_strides[0] + t * o_strides[1] + head * o_strides[2],
        o_strides[3],
        gate + (KIND == NO_GATE
            ? 0
            : b * gate_strides[0] + t * gate_strides[1] + head * D * gate_strides[2]),
        KIND == NO_GATE ? 0 : gate_strides[2],
        bias + (BIAS ? head * D * bias_strides[0] : 0),
        BIAS ? bias_strides[0] : 0,
        gamma[head * gamma_strides[0]],
        NORM ? eps[0] : 0.0f,
        place,
        lane);
  } else if (H_2 > 0) {
    const int h = head - H;
    fuse_head<D, NORM_2, KIND_2, BIAS_2>(
        o_2 + b * o_2_strides[0] + t * o_2_strides[1] + h * o_2_strides[2],
        o_2_strides[3],
        gate_2 + (KIND_2 == NO_GATE
            ? 0
            : b * gate_2_strides[0] + t * gate_2_strides[1] + h * D * gate_2_strides[2]),
        KIND_2 == NO_GATE ? 0 : gate_2_strides[2],
        bias_2 + (BIAS_2 ? h * D * bias_2_strides[0] : 0),
        BIAS_2 ? bias_2_strides[0] : 0,
        gamma[head * gamma_strides[0]],
        NORM_2 ? eps[1] : 0.0f,
        place,
        lane);
  }
}
