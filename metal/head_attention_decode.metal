// Softmax attention of few queries over many keys, for heads that share KV heads in any grouping.
//
// q [B, Hf, T, D] of T; k and v [B, Hk, S, D] of T, or packed BITS a number into uint32
// [B, Hk, S, D * BITS / 32] with scales and biases [B, Hk, S, D / GROUP] of T (for plain ones any
// arrays stand in). All strided. Query t sees the keys 0 .. offset + t, or, where MASKED, those
// that mask, bool [B, 1, T, S], says.
// layout, int32: blocks, n, then the n KV heads that are read, n + 1 bounds, and the Hf query heads
// in the order of their KV heads: heads[bounds[i] .. bounds[i + 1]) read the i-th.
// position, int32 [1]: the offset. scale, float [1].
// Template: T; D of 32, 64, 128, 256; ROWS of 1, 2, 4: queries (a head and a token each) a
// threadgroup; BITS of 0 (plain), 4, 8; GROUP; MASKED; WHOLE; E of 8, 16: elements of a key that a
// lane reads; AT_ONCE: keys that it reads before it works on them.
// Grid: splits * blocks, the n KV heads, B threadgroups of 128; blocks * ROWS >= the queries of
// every KV head. A threadgroup has a range of keys, and reads each once for its ROWS queries.
// o: where WHOLE (one split), [B, Hf, T, D] of T; else float [B, Hf, T, splits, D], the sums of
// head_attention_merge, which takes maxima and sums of weights from stats, [B, Hf, T, splits, 2].
// Threadgroup memory: 4 * ROWS * (D + 2) floats, 16.5 KB at most.

constexpr int LANES = D / E;
// Elements that are read at once.
constexpr int N = BITS != 0 ? E : 16 / int(sizeof(T));
constexpr int SIMDGROUPS = 4;

threadgroup float sums[SIMDGROUPS * ROWS * D];
threadgroup float maxima[SIMDGROUPS * ROWS];
threadgroup float weights[SIMDGROUPS * ROWS];

const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int offset = position[0];
const int blocks = layout[0];
const int n = layout[1];
const int splits = int(threadgroups_per_grid.x) / blocks;
const int block = int(threadgroup_position_in_grid.x) % blocks;
const int split = int(threadgroup_position_in_grid.x) / blocks;
const int group = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const int n_heads = q_shape[1];
const int n_tokens = q_shape[2];
const int kv_head = layout[2 + group];
const int first_head = layout[2 + n + group];
const int n_rows = (layout[3 + n + group] - first_head) * n_tokens;
if (block * ROWS >= n_rows) {
  return;
}
const int total = MASKED ? int(k_shape[2]) : offset + n_tokens;
const int range = (total + splits - 1) / splits;
const int begin = split * range;
const int end = metal::min(begin + range, total);

decode_rows<ROWS, E> rows;
for (short r = 0; r < ROWS; r++) {
  const int row = metal::min(block * ROWS + r, n_rows - 1);
  const int head = layout[3 + 2 * n + first_head + row / n_tokens];
  const int t = row % n_tokens;
  const long start = batch * q_strides[0] + head * q_strides[1] + t * q_strides[2];
  for (short j = 0; j < E / N; j++) {
    for (short i = 0; i < N; i++) {
      const int d = (j * LANES + lane % LANES) * N + i;
      rows.q[r][j * N + i] = float(q[start + d * q_strides[3]]) * (scale[0] * LOG2_E);
      rows.o[r][j * N + i] = 0;
    }
  }
  rows.m[r] = LOWEST;
  rows.l[r] = 0;
  rows.last[r] = offset + t;
  rows.mask[r] = MASKED ? batch * mask_strides[0] + t * mask_strides[2] : 0;
}

{
  const auto keys = rows_of(
      k + batch * k_strides[0] + kv_head * k_strides[1],
      k_scales + (BITS ? batch * k_scales_strides[0] + kv_head * k_scales_strides[1] : 0),
      k_biases + (BITS ? batch * k_biases_strides[0] + kv_head * k_biases_strides[1] : 0),
      k_strides[2], k_strides[3], k_scales_strides[2], k_scales_strides[3],
      k_biases_strides[2], k_biases_strides[3]);
  const auto values = rows_of(
      v + batch * v_strides[0] + kv_head * v_strides[1],
      v_scales + (BITS ? batch * v_scales_strides[0] + kv_head * v_scales_strides[1] : 0),
      v_biases + (BITS ? batch * v_biases_strides[0] + kv_head * v_biases_strides[1] : 0),
      v_strides[2], v_strides[3], v_scales_strides[2], v_scales_strides[3],
      v_biases_strides[2], v_biases_strides[3]);
  constexpr int BYTES = BITS != 0 ? N * BITS / 8 : 16;
  const long mask_step = MASKED ? mask_strides[3] : 0;
  if (lie_side_by_side<BYTES>(keys) && lie_side_by_side<BYTES>(values)) {
    attend_range<T, D, ROWS, E, N, BITS, GROUP, AT_ONCE, true, MASKED>(
        rows, keys, values, mask, mask_step, begin, end, SIMDGROUPS, simdgroup, lane);
  } else {
    attend_range<T, D, ROWS, E, N, BITS, GROUP, AT_ONCE, false, MASKED>(
        rows, keys, values, mask, mask_step, begin, end, SIMDGROUPS, simdgroup, lane);
  }
}

// Lanes that hold the same elements, of other keys.
#pragma unroll
for (short r = 0; r < ROWS; r++) {
  for (short apart = LANES; apart < 32; apart *= 2) {
    const float m_other = simd_shuffle_xor(rows.m[r], ushort(apart));
    const float m = metal::max(rows.m[r], m_other);
    const float kept = power_of_two(rows.m[r] - m);
    const float added = power_of_two(m_other - m);
    rows.m[r] = m;
    rows.l[r] = rows.l[r] * kept + simd_shuffle_xor(rows.l[r], ushort(apart)) * added;
#pragma unroll
    for (short e = 0; e < E; e++) {
      rows.o[r][e] = rows.o[r][e] * kept + simd_shuffle_xor(rows.o[r][e], ushort(apart)) * added;
    }
  }
  const int place = simdgroup * ROWS + r;
  if (lane < LANES) {
    for (short j = 0; j < E / N; j++) {
      for (short i = 0; i < N; i++) {
        sums[place * D + (j * LANES + lane) * N + i] = rows.o[r][j * N + i];
      }
    }
  }
  if (lane == 0) {
    maxima[place] = rows.m[r];
    weights[place] = rows.l[r];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// And those of the other SIMD-groups.
for (int i = thread_index_in_threadgroup; i < ROWS * D; i += 32 * SIMDGROUPS) {
  const int r = i / D;
  const int row = block * ROWS + r;
  if (row < n_rows) {
    float m = LOWEST;
    for (short s = 0; s < SIMDGROUPS; s++) {
      m = metal::max(m, maxima[s * ROWS + r]);
    }
    float l = 0;
    float sum = 0;
    for (short s = 0; s < SIMDGROUPS; s++) {
      const float kept = power_of_two(maxima[s * ROWS + r] - m);
      l += kept * weights[s * ROWS + r];
      sum += kept * sums[(s * ROWS + r) * D + i % D];
    }
    const int head = layout[3 + 2 * n + first_head + row / n_tokens];
    const long place = (long(batch) * n_heads + head) * n_tokens + row % n_tokens;
    if (WHOLE) {
      o[place * D + i % D] = Out(l > 0 ? sum / l : 0.0f);
    } else {
      o[(place * splits + split) * D + i % D] = Out(sum);
      if (i % D == 0) {
        stats[(place * splits + split) * 2] = m;
        stats[(place * splits + split) * 2 + 1] = l;
      }
    }
  }
}
