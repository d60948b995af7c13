// Decode: 1 to 8 tokens through a layer's heads, from the projections of x to what o_proj reads.
//
// A linear head takes its channels of q, k and v through the short convolution and SiLU, q and k
// through RMSNorm, RoPE and L2 norm, runs the gated delta rule and fuses: norm, gate, gamma. A full
// head has been attended to already, and is fused only.
//
//   projected       [B, T, N], or [B, N] for a token each: projections of x. From channel FIRST on
//                   those of the linear heads: q, k, v, the gate before its SiLU if GATED (H * D
//                   each), decay and update rate (H each); from FULL_GATE_AT on the full heads'
//                   gates before their sigmoid
//   q_conv ..       [H * D, TAPS, 1]; not read if TAPS is 0, nor is past
//   past            [B, TAPS - 1, 3 * H * D]: inputs of the convolution before these
//   q_norm, k_norm  [D]
//   frequencies     float [D / 2]: angle a position; not read unless ROPE
//   offset          int [B] or [1]: the first token's position; not read unless ROPE
//   mask            bool [B, T], False for padding; not read unless MASKED
//   A_log, dt_bias  float [H]
//   state           float [B, H, D, D]: rows are values, columns keys
//   full            [B, F, T, D], or of PARTS float [B, F, T, splits, D] and
//   stats           float [B, F, T, splits, 2], as head_attention_decode leaves them; neither is
//                   read if F is 0
//   bias, full_bias [H * D], [F * D]: yet to be added to the gates; not read unless BIAS, FULL_BIAS
//   gamma           float [F + H]
//   constants       float [4]: eps of q_norm and k_norm, RoPE's scale, eps of the fusion of linear
//                   and of full heads
//   out             [B, T, (F + H) * D], or [B, (F + H) * D]
//   new_state       as state
//   new_past        as past; [1] and zero if TAPS is 0
//
// Template: X the type of projected, biases and out; P, W, O those of past, of the convolution's
// weights and of full; H, F, D (32, 64, 128 or 256), TAPS; N, FIRST, GATED, FULL_GATE_AT (N for no
// gate: MLX's CUDA names kernels after their integers, and takes no minus); PARTS; the flags above,
// NORM and FULL_NORM; THREADS.
// Grid: (F + H, B) threadgroups of THREADS, a power of two from 32 to 8 D. Eight threads share a row
// of the state, which is read and written once, and stays in registers; a thread has no more than 32
// numbers of it at a time, and what does not fit follows in further turns.
// Threadgroup memory: 96 D + 192 bytes.

constexpr int MOST = 8;
constexpr int SIMD_GROUPS = THREADS / 32;
constexpr int SLOTS = THREADS / 8;
constexpr int QUADS = D / 32;
constexpr int ROWS = D / SLOTS < 8 / QUADS ? D / SLOTS : 8 / QUADS;
constexpr int PAIRS = D < 64 ? 1 : D / 64;
constexpr int COUNT = D / 32;
constexpr int PAST = TAPS > 0 ? TAPS - 1 : 0;
constexpr int C = H * D;
constexpr int GATE_AT = FIRST + 3 * C;
constexpr int A_AT = GATED ? GATE_AT + C : GATE_AT;
constexpr int B_AT = A_AT + H;

threadgroup float4 vectors[3 * MOST * D / 4];
threadgroup float decay[MOST];
threadgroup float rate[MOST];
threadgroup float maxima[16];
threadgroup float weights_of[16];

const int T = projected_ndim == 2 ? 1 : projected_shape[1];
const int batch = threadgroup_position_in_grid.y;
const int place = threadgroup_position_in_grid.x;
const int thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const short simd_group = simdgroup_index_in_threadgroup;
const device X* rows = projected + size_t(batch) * T * N;

threadgroup float* values = (threadgroup float*)vectors;

if (place < F) {
  if (PARTS) {
    for (int t = 0; t < T; t++) {
      bring_together<D, SIMD_GROUPS>(
          full, stats, full_shape[3], size_t(batch * F + place) * T + t, values + t * D,
          values + MOST * D, maxima, weights_of, simd_group, lane);
    }
  }
  for (int t = simd_group; t < T; t += SIMD_GROUPS) {
    const size_t token = batch * T + t;
    float x[COUNT];
    float squares = 0;
    for (short i = 0; i < COUNT; i++) {
      const int c = lane + 32 * i;
      x[i] = PARTS ? values[t * D + c]
                   : float(full[(size_t(batch * F + place) * T + t) * D + c]);
      squares += x[i] * x[i];
    }
    float weight = gamma[place];
    if (FULL_NORM) {
      weight *= metal::precise::rsqrt(simd_sum(squares) / D + constants[3]);
    }
    for (short i = 0; i < COUNT; i++) {
      const int c = place * D + lane + 32 * i;
      float factor = 1;
      if (FULL_GATE_AT < N) {
        const float b = FULL_BIAS ? float(full_bias[c]) : 0.0f;
        factor = sigmoid(float(rows[t * N + FULL_GATE_AT + c]) + b);
      }
      out[token * (F + H) * D + c] = X(weight * x[i] * factor);
    }
  }
  return;
}

const int head = place - F;
const size_t state_start = size_t(batch * H + head) * D * D;
const device float4* state_rows = (const device float4*)(state + state_start);
device float4* new_state_rows = (device float4*)(new_state + state_start);
const int slot = thread_index / 8;
const int part = thread_index % 8;

// The first rows are on their way while the vectors are made.
float4 s[ROWS][QUADS];
for (short j = 0; j < ROWS; j++) {
  for (short i = 0; i < QUADS; i++) {
    s[j][i] = state_rows[(slot + SLOTS * j) * (D / 4) + part + 8 * i];
  }
}

uint valid = 0xff;
if (MASKED) {
  valid = 0;
  for (int t = 0; t < T; t++) {
    valid |= uint(mask[batch * T + t]) << t;
  }
}

if (thread_index < T) {
  const device X* row = rows + thread_index * N + head;
  decay[thread_index] = decay_of(float(row[A_AT]), dt_bias[head], A_log[head]);
  rate[thread_index] = sigmoid(float(row[B_AT]));
}

// q, k and v of each token, a SIMD-group each. A lane holds the two halves of RoPE's pairs.
for (int item = simd_group; item < 3 * T; item += SIMD_GROUPS) {
  const int t = item / 3;
  const int which = item % 3;
  const device X* now = rows + FIRST + which * C + head * D;
  float x[PAIRS][2];
  for (short i = 0; i < PAIRS; i++) {
    for (short half_ = 0; half_ < 2; half_++) {
      const int c = lane + 32 * i + half_ * (D / 2);
      x[i][half_] = 0;
      if (lane + 32 * i < D / 2) {
        if (TAPS == 0) {
          x[i][half_] = float(now[t * N + c]);
        } else {
          const device P* before =
              past + size_t(batch) * PAST * 3 * C + which * C + head * D + c;
          const device W* weights =
              (which == 0 ? q_conv : which == 1 ? k_conv : v_conv) + (head * D + c) * TAPS;
          float sum = 0;
          for (short j = 0; j < TAPS; j++) {
            sum += float(weights[j]) *
                conv_input<PAST>(before, 3 * C, now + c, N, valid, t + j);
          }
          x[i][half_] = silu(sum);
        }
      }
    }
  }

  if (which < 2) {
    float squares = 0;
    for (short i = 0; i < PAIRS; i++) {
      squares += x[i][0] * x[i][0] + x[i][1] * x[i][1];
    }
    const float r = metal::precise::rsqrt(simd_sum(squares) / D + constants[0]);
    squares = 0;
    for (short i = 0; i < PAIRS; i++) {
      const int c = lane + 32 * i;
      if (c < D / 2) {
        float left = x[i][0] * r * float(which == 0 ? q_norm[c] : k_norm[c]);
        float right = x[i][1] * r * float(which == 0 ? q_norm[c + D / 2] : k_norm[c + D / 2]);
        if (ROPE) {
          const int first = offset[offset_shape[0] == 1 ? 0 : batch];
          const float angle = rope_angle(first + t, float(frequencies[c]));
          const float cosine = constants[1] * metal::precise::cos(angle);
          const float sine = constants[1] * metal::precise::sin(angle);
          x[i][0] = left * cosine - right * sine;
          x[i][1] = left * sine + right * cosine;
        } else {
          x[i][0] = left;
          x[i][1] = right;
        }
      }
      squares += x[i][0] * x[i][0] + x[i][1] * x[i][1];
    }
    float scale = metal::precise::rsqrt(simd_sum(squares) + L2_NORM_EPS);
    scale *= which == 0 ? metal::precise::rsqrt(float(D)) : 1.0f;
    for (short i = 0; i < PAIRS; i++) {
      x[i][0] *= scale;
      x[i][1] *= scale;
    }
  }
  for (short i = 0; i < PAIRS; i++) {
    const int c = lane + 32 * i;
    if (c < D / 2) {
      values[(which * MOST + t) * D + c] = x[i][0];
      values[(which * MOST + t) * D + c + D / 2] = x[i][1];
    }
  }
}

// What the convolution still sees of these tokens.
for (int i = thread_index; i < PAST * 3 * D; i += THREADS) {
  const int at = i / (3 * D);
  const int which = i / D % 3;
  const int c = which * C + head * D + i % D;
  const device X* now = rows + FIRST + which * C + head * D + i % D;
  const size_t start = size_t(batch) * PAST * 3 * C + c;
  new_past[start + at * 3 * C] =
      X(conv_input<PAST>(past + start, 3 * C, now, N, valid, T + at));
}
if (TAPS == 0 && place == F && batch == 0 && thread_index == 0) {
  new_past[0] = X(0.0f);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int row = slot; row < D; row += SLOTS * ROWS) {
  if (row >= SLOTS * ROWS) {
    for (short j = 0; j < ROWS; j++) {
      for (short i = 0; i < QUADS; i++) {
        s[j][i] = state_rows[(row + SLOTS * j) * (D / 4) + part + 8 * i];
      }
    }
  }
  for (int t = 0; t < T; t++) {
    const bool counts = (valid >> t) & 1;
    for (short j = 0; j < ROWS; j++) {
      float read = 0;
      if (counts) {
        float recalled = 0;
        for (short i = 0; i < QUADS; i++) {
          recalled += dot_of(s[j][i], vectors[(MOST + t) * (D / 4) + part + 8 * i]);
        }
        recalled = decay[t] * sum_of_eight(recalled);
        const float value = values[(2 * MOST + t) * D + row + SLOTS * j];
        const float change = rate[t] * (value - recalled);
        for (short i = 0; i < QUADS; i++) {
          s[j][i] = weighted(
              decay[t], s[j][i], change, vectors[(MOST + t) * (D / 4) + part + 8 * i]);
          read += dot_of(s[j][i], vectors[t * (D / 4) + part + 8 * i]);
        }
        read = sum_of_eight(read);
      }
      // A row's value is needed no more, and its output takes the place.
      if (part == 0) {
        values[(2 * MOST + t) * D + row + SLOTS * j] = read;
      }
    }
  }
  for (short j = 0; j < ROWS; j++) {
    for (short i = 0; i < QUADS; i++) {
      new_state_rows[(row + SLOTS * j) * (D / 4) + part + 8 * i] = s[j][i];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int t = simd_group; t < T; t += SIMD_GROUPS) {
  const size_t token = batch * T + t;
  float x[COUNT];
  float squares = 0;
  for (short i = 0; i < COUNT; i++) {
    x[i] = values[(2 * MOST + t) * D + lane + 32 * i];
    squares += x[i] * x[i];
  }
  float weight = gamma[place];
  if (NORM) {
    weight *= metal::precise::rsqrt(simd_sum(squares) / D + constants[2]);
  }
  for (short i = 0; i < COUNT; i++) {
    const int c = lane + 32 * i;
    float factor = 1;
    // Padding's own gate may be anything.
    if (GATED && ((valid >> t) & 1)) {
      const float b = BIAS ? float(bias[head * D + c]) : 0.0f;
      factor = silu(float(rows[t * N + GATE_AT + head * D + c]) + b);
    }
    out[(token * (F + H) + place) * D + c] = X(weight * x[i] * factor);
  }
}
