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
// q, k or v through 16 tokens, and keeps what the convolution still sees; a lane has channels of
// both halves of a head, which RoPE turns against each other. The turns of those tokens are made
// once a threadgroup. Threadgroup memory: 64 D bytes.

constexpr int TOKENS = 16;
constexpr int SIMD_GROUPS = 8;
constexpr int N = D / 32;
// A lane's runs of channels, each in its half of the head; one channel has its partner elsewhere.
constexpr int RUNS = N > 1 ? 2 : 1;
constexpr int M = N / RUNS;
constexpr int PAST = TAPS > 0 ? TAPS - 1 : 0;
constexpr int KEPT = PAST > 0 ? PAST : 1;
constexpr int WEIGHTS = TAPS > 0 ? M * TAPS : M;
constexpr int C = H * D;
// Tokens that are read, and worked on, at once: 32 bytes a lane.
constexpr int AHEAD = 32 / (N * sizeof(X));

// Of each token and pair of channels the cosine and the sine.
threadgroup float4 turns[TOKENS * D / 4];

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
const int channel = head * D + lane * M;
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
const bool wide = apart == 1 && row * sizeof(X) % pieces<M, X>::BYTES == 0 && may_be_wide<M>(now);
const long run = D / 2 * apart;
const device P* before = past + size_t(batch) * PAST * 3 * C + which * C + channel;

// All reads are on their way before the first is waited for.
X ahead[AHEAD][N];
read_tokens<AHEAD, RUNS, M>(now, row, tokens, run, apart, wide, ahead);
X earlier[KEPT][N];
W own_taps[RUNS * WEIGHTS];
if (TAPS > 0) {
  if (first > 0) {
    read_tokens<KEPT, RUNS, M>(now - PAST * row, row, PAST, run, apart, wide, earlier);
  }
  const device W* weights = which == 0 ? q_conv : which == 1 ? k_conv : v_conv;
  const bool wide_taps = may_be_wide<WEIGHTS>(weights);
  for (short r = 0; r < RUNS; r++) {
    read_channels<WEIGHTS>(
        weights + (channel + r * (D / 2)) * TAPS, 1, wide_taps, own_taps + r * WEIGHTS);
  }
}
const int pair = thread_index % (D / 2);
int position = 0;
float frequency = 0;
if (ROPE) {
  position = offset[offset_shape[0] == 1 ? 0 : batch] + first;
  frequency = float(frequencies[pair]);
}
const float eps = constants[0];
const float rotated = ROPE ? float(constants[1]) : 1.0f;
float norm[N];
for (short i = 0; i < N; i++) {
  const int c = i / M * (D / 2) + lane * M + i % M;
  norm[i] = which == 0 ? float(q_norm[c]) : float(k_norm[c]);
}

if (which == 2 && own < 3 * H && lane < tokens) {
  const size_t place = (token + lane) * H + head;
  const int t = first + lane;
  const long of_a = batch * a_strides[0] + t * a_strides[1] + head * a_strides[2];
  const long of_b = batch * b_strides[0] + t * b_strides[1] + head * b_strides[2];
  g[place] = decay_of(float(a[of_a]), dt_bias[head], A_log[head]);
  beta[place] = sigmoid(float(b[of_b]));
}

if (ROPE && first_item < 2 * H) {
  for (int t = thread_index / (D / 2); t < TOKENS; t += 64 * SIMD_GROUPS / D) {
    const float angle = rope_angle(position + t, frequency);
    threadgroup float* turn = (threadgroup float*)turns + t * D + 2 * pair;
    turn[0] = metal::precise::cos(angle);
    turn[1] = metal::precise::sin(angle);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (own >= 3 * H) {
  return;
}

float taps[RUNS * WEIGHTS];
float seen[KEPT][N];
if (TAPS > 0) {
  for (short i = 0; i < RUNS * WEIGHTS; i++) {
    taps[i] = float(own_taps[i]);
  }
  for (short j = 0; j < PAST; j++) {
    for (short i = 0; i < N; i++) {
      seen[j][i] = 0;
    }
    if (first > 0) {
      if (!MASKED || mask[token - PAST + j]) {
        for (short i = 0; i < N; i++) {
          seen[j][i] = float(earlier[j][i]);
        }
      }
    } else if (!FRESH) {
      // A first run is the first 16 tokens, and more than any convolution sees.
      for (short i = 0; i < N; i++) {
        seen[j][i] = float(before[j * 3 * C + i / M * (D / 2) + i % M]);
      }
    }
  }
}

device X* out = which == 0 ? q : which == 1 ? k : v;
out += token * C + channel;
const float size = which == 0 ? metal::precise::rsqrt(float(D)) : 1.0f;
const float side = lane < 16 ? -1.0f : 1.0f;

for (short start = 0; start < tokens; start += AHEAD) {
  float x[AHEAD][N];
#pragma unroll
  for (short u = 0; u < AHEAD; u++) {
    for (short i = 0; i < N; i++) {
      x[u][i] = float(ahead[u][i]);
    }
  }
  const int next = start + AHEAD;
  if (next < tokens) {
    read_tokens<AHEAD, RUNS, M>(now + next * row, row, tokens - next, run, apart, wide, ahead);
  }

  if (TAPS > 0) {
#pragma unroll
    for (short u = 0; u < AHEAD; u++) {
      const bool counts = !MASKED || mask[token + metal::min(start + u, tokens - 1)];
      for (short i = 0; i < N; i++) {
        const float entry = counts ? x[u][i] : 0.0f;
        float sum = taps[i * TAPS + PAST] * entry;
        for (short j = 0; j < PAST; j++) {
          sum += taps[i * TAPS + j] * seen[j][i];
        }
        for (short j = 0; j + 1 < PAST; j++) {
          seen[j][i] = seen[j + 1][i];
        }
        seen[KEPT - 1][i] = entry;
        x[u][i] = fast_silu(sum);
      }
    }
  }

  if (which < 2) {
    // A rotation keeps the sum of squares, so that both norms are taken before it, of all these
    // tokens at once: each has 32 / AHEAD lanes.
    float squares[AHEAD];
    float weighted[AHEAD];
#pragma unroll
    for (short u = 0; u < AHEAD; u++) {
      squares[u] = 0;
      weighted[u] = 0;
      for (short i = 0; i < N; i++) {
        squares[u] += x[u][i] * x[u][i];
        x[u][i] *= norm[i];
        weighted[u] += x[u][i] * x[u][i];
      }
    }
    const float mean = sum_of_each<AHEAD>(squares, lane) / D;
    const float rms = rotated * metal::precise::rsqrt(mean + eps);
    const float of_weighted = sum_of_each<AHEAD>(weighted, lane);
    const float factors =
        size * rms * metal::precise::rsqrt(rms * rms * of_weighted + L2_NORM_EPS);
#pragma unroll
    for (short u = 0; u < AHEAD; u++) {
      const float factor = simd_shuffle(factors, ushort(u * (32 / AHEAD)));
      if (ROPE) {
        const int place = (start + u) * D + 2 * (lane * M % (D / 2));
        float turn[2 * M];
        read_turns<2 * M>((const threadgroup float*)turns + place, turn);
        for (short i = 0; i < M; i++) {
          const float c = turn[2 * i];
          const float s = turn[2 * i + 1];
          if (RUNS == 1) {
            x[u][i] = x[u][i] * c + side * simd_shuffle_xor(x[u][i], ushort(16)) * s;
          } else {
            const float low = x[u][i];
            const float high = x[u][N - M + i];
            x[u][i] = low * c - high * s;
            x[u][N - M + i] = high * c + low * s;
          }
        }
      }
      for (short i = 0; i < N; i++) {
        x[u][i] *= factor;
      }
    }
  }

#pragma unroll
  for (short u = 0; u < AHEAD; u++) {
    if (start + u < tokens) {
      X rounded[N];
      for (short i = 0; i < N; i++) {
        rounded[i] = X(x[u][i]);
      }
      for (short r = 0; r < RUNS; r++) {
        write_channels<M>(out + u * C + r * (D / 2), rounded + r * M);
      }
    }
  }
  out += AHEAD * C;
}

// What the convolution still sees after the last token.
if (PAST > 0 && first + TOKENS >= T) {
  const int end = ENDS ? metal::min(metal::max(int(lengths[batch]), 0), T) : T;
  device X* kept = new_past + size_t(batch) * PAST * 3 * C + which * C + channel;
  for (short j = 0; j < PAST; j++) {
    const int at = end - PAST + j;
    for (short i = 0; i < N; i++) {
      X entry = X(0.0f);
      const int c = i / M * (D / 2) + i % M;
      if (at < 0) {
        if (!FRESH) {
          entry = X(float(before[(PAST + at) * 3 * C + c]));
        }
      } else if (!MASKED || mask[batch * T + at]) {
        entry = now[(at - first) * row + c * apart];
      }
      kept[j * 3 * C + c] = entry;
    }
  }
}
if (TAPS == 0 && item == 0 && batch == 0 && thread_index == 0 && first == 0) {
  new_past[0] = X(0.0f);
}
