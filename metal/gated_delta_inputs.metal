// Prefill and training: from the projections of x to what the gated delta rule reads.
//
// A head takes its channels of q, k and v through the short convolution and SiLU, q and k through
// RMSNorm, RoPE and L2 norm; q is scaled by D^-0.5. Decay and update rate go with v.
//
//   q_in, k_in, v_in  [B, T, H * D], with any strides, as are
//   a, b              [B, T, H]
//   q_conv ..         [H * D, TAPS, 1]; not read if TAPS is 0, nor are past, mask and lengths
//   past              [B, TAPS - 1, 3 * H * D]: inputs of the convolution before these, q, k and v
//                     side by side; not read if FRESH, and zeros then
//   mask              bool [B, T], False for padding, which the convolution takes as zeros; not read
//                     unless MASKED
//   lengths           int [B]: tokens after which the new past ends; not read unless ENDS
//   q_norm, k_norm    [D]
//   frequencies       float [D / 2]: angle a position; not read unless ROPE
//   offset            int [B] or [1]: the first token's position; not read unless ROPE
//   A_log, dt_bias    float [H]
//   constants         float [2]: eps of q_norm and k_norm, RoPE's scale
//   q, k, v           [B, T, H, D]
//   g, beta           float [B, T, H]
//   new_past          as past; [1] and zero if TAPS is 0
//
// Template: X the type of q_in, k_in, v_in, q, k, v and new_past; P, W those of past and of the
// convolution's weights; H, D (32, 64, 128 or 256), TAPS; the flags above.
// Grid: (ceil(T / 16), ceil(3 H / 8), B) threadgroups of 256 threads. A SIMD-group takes one head's
// q, k or v through 16 tokens, and keeps what the convolution still sees; the angles of those tokens
// are made once a threadgroup. Threadgroup memory: 64 D bytes.

constexpr int TOKENS = 16;
constexpr int SIMD_GROUPS = 8;
constexpr int N = D / 32;
constexpr int PAST = TAPS > 0 ? TAPS - 1 : 0;
constexpr int KEPT = PAST > 0 ? PAST : 1;
constexpr int WEIGHTS = TAPS > 0 ? N * TAPS : N;
constexpr int C = H * D;
// Tokens whose channels a lane reads before it needs the first: 32 bytes.
constexpr int AHEAD = 32 / (N * sizeof(X));

threadgroup float cosines[TOKENS * D / 2];
threadgroup float sines[TOKENS * D / 2];

const int T = q_in_shape[1];
const int batch = threadgroup_position_in_grid.z;
const int first = threadgroup_position_in_grid.x * TOKENS;
const int tokens = metal::min(TOKENS, T - first);
const int thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const int first_item = threadgroup_position_in_grid.y * SIMD_GROUPS;
// Past the last item a SIMD-group reads with the others, and writes nothing.
const int own = first_item + simdgroup_index_in_threadgroup;
const int item = metal::min(own, 3 * H - 1);
const int which = item / H;
const int head = item % H;
const int channel = head * D + lane * N;
const size_t token = size_t(batch) * T + first;

const device X* now = q_in + batch * q_in_strides[0] + first * q_in_strides[1];
long row = q_in_strides[1];
long apart = q_in_strides[2];
if (which == 1) {
  now = k_in + batch * k_in_strides[0] + first * k_in_strides[1];
  row = k_in_strides[1];
  apart = k_in_strides[2];
} else if (which == 2) {
  now = v_in + batch * v_in_strides[0] + first * v_in_strides[1];
  row = v_in_strides[1];
  apart = v_in_strides[2];
}
now += channel * apart;
const bool wide = apart == 1 && row * sizeof(X) % pieces<N, X>::BYTES == 0 && may_be_wide<N>(now);
const device P* before = past;
const bool wide_past = may_be_wide<N>(before);
before += size_t(batch) * PAST * 3 * C + which * C + channel;

// All reads that need no angle are on their way before the angles are made.
X ahead[AHEAD][N];
#pragma unroll
for (short u = 0; u < AHEAD; u++) {
  if (u < tokens) {
    read_channels<N>(now + u * row, apart, wide, ahead[u]);
  }
}

float taps[WEIGHTS];
float seen[KEPT][N];
if (TAPS > 0) {
  const device W* weights = which == 0 ? q_conv : which == 1 ? k_conv : v_conv;
  W own_taps[WEIGHTS];
  read_channels<WEIGHTS>(weights + channel * TAPS, 1, may_be_wide<WEIGHTS>(weights), own_taps);
  for (short i = 0; i < WEIGHTS; i++) {
    taps[i] = float(own_taps[i]);
  }
  for (short j = 0; j < PAST; j++) {
    const int at = first - PAST + j;
    for (short i = 0; i < N; i++) {
      seen[j][i] = 0;
    }
    if (at >= 0) {
      if (!MASKED || mask[batch * T + at]) {
        X entry[N];
        read_channels<N>(now + (at - first) * row, apart, wide, entry);
        for (short i = 0; i < N; i++) {
          seen[j][i] = float(entry[i]);
        }
      }
    } else if (!FRESH) {
      // A first run is the first 16 tokens, and more than any convolution sees.
      P entry[N];
      read_channels<N>(before + (PAST + at) * 3 * C, 1, wide_past, entry);
      for (short i = 0; i < N; i++) {
        seen[j][i] = float(entry[i]);
      }
    }
  }
}

float norm[N];
for (short i = 0; i < N; i++) {
  norm[i] = which == 0 ? float(q_norm[lane * N + i]) : float(k_norm[lane * N + i]);
}

if (ROPE && first_item < 2 * H) {
  const int position = offset[offset_shape[0] == 1 ? 0 : batch] + first;
  for (int i = thread_index; i < TOKENS * D / 2; i += 32 * SIMD_GROUPS) {
    // Sixteen lanes read their first channels side by side, then their second ones.
    const int place = i % (D / 2);
    const int pair = place % 16 * N + place / 16;
    const float angle = rope_angle(position + i / (D / 2), float(frequencies[pair]));
    cosines[i] = metal::precise::cos(angle);
    sines[i] = metal::precise::sin(angle);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (own >= 3 * H) {
  return;
}

device X* out = which == 0 ? q : which == 1 ? k : v;
const bool wide_out = may_be_wide<N>((const device X*)out);
out += token * C + channel;
const float rotated = ROPE ? float(constants[1]) : 1.0f;
const float size = which == 0 ? metal::precise::rsqrt(float(D)) : 1.0f;
const float side = lane < 16 ? -1.0f : 1.0f;

for (short start = 0; start < TOKENS; start += AHEAD) {
  if (start >= tokens) {
    break;
  }
  if (start > 0) {
#pragma unroll
    for (short u = 0; u < AHEAD; u++) {
      if (start + u < tokens) {
        read_channels<N>(now + (start + u) * row, apart, wide, ahead[u]);
      }
    }
  }
#pragma unroll
  for (short u = 0; u < AHEAD; u++) {
    const int t = start + u;
    if (t < tokens) {
      float x[N];
      for (short i = 0; i < N; i++) {
        x[i] = float(ahead[u][i]);
      }
      if (TAPS > 0) {
        const bool counts = !MASKED || mask[token + t];
        for (short i = 0; i < N; i++) {
          const float entry = counts ? x[i] : 0.0f;
          float sum = taps[i * TAPS + PAST] * entry;
          for (short j = 0; j < PAST; j++) {
            sum += taps[i * TAPS + j] * seen[j][i];
          }
          for (short j = 0; j + 1 < PAST; j++) {
            seen[j][i] = seen[j + 1][i];
          }
          seen[KEPT - 1][i] = entry;
          x[i] = fast_silu(sum);
        }
      }

      if (which < 2) {
        // A rotation keeps the sum of squares, so that both norms are taken before it.
        float squares = 0;
        float weighted = 0;
        for (short i = 0; i < N; i++) {
          squares += x[i] * x[i];
          x[i] *= norm[i];
          weighted += x[i] * x[i];
        }
        const float rms =
            rotated * metal::precise::rsqrt(simd_sum(squares) / D + constants[0]);
        const float factor = size * rms *
            metal::precise::rsqrt(rms * rms * simd_sum(weighted) + L2_NORM_EPS);
        for (short i = 0; i < N; i++) {
          if (ROPE) {
            const int place = t * (D / 2) + 16 * i + lane % 16;
            const float other = simd_shuffle_xor(x[i], ushort(16));
            x[i] = x[i] * cosines[place] + side * other * sines[place];
          }
          x[i] *= factor;
        }
      }

      X rounded[N];
      for (short i = 0; i < N; i++) {
        rounded[i] = X(x[i]);
      }
      write_channels<N>(out + t * C, wide_out, rounded);
    }
  }
}

if (which == 2 && lane < tokens) {
  const size_t place = (token + lane) * H + head;
  const int t = first + lane;
  const long of_a = batch * a_strides[0] + t * a_strides[1] + head * a_strides[2];
  const long of_b = batch * b_strides[0] + t * b_strides[1] + head * b_strides[2];
  g[place] = decay_of(float(a[of_a]), dt_bias[head], A_log[head]);
  beta[place] = sigmoid(float(b[of_b]));
}

// What the convolution still sees after the last token.
if (PAST > 0 && first + TOKENS >= T) {
  const int end = ENDS ? metal::min(metal::max(int(lengths[batch]), 0), T) : T;
  device X* kept = new_past + size_t(batch) * PAST * 3 * C + which * C + channel;
  for (short j = 0; j < PAST; j++) {
    const int at = end - PAST + j;
    for (short i = 0; i < N; i++) {
      X entry = X(0.0f);
      if (at < 0) {
        if (!FRESH) {
          entry = X(float(before[(PAST + at) * 3 * C + i]));
        }
      } else if (!MASKED || mask[batch * T + at]) {
        entry = now[(at - first) * row + i * apart];
      }
      kept[j * 3 * C + i] = entry;
    }
  }
}
if (TAPS == 0 && item == 0 && batch == 0 && thread_index == 0 && first == 0) {
  new_past[0] = X(0.0f);
}
