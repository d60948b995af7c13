// From the projections of x to what softmax attention reads.
//
// A head's queries and keys go through RMSNorm and RoPE, queries through the log scale
// log(t + a) / log(a) of position t (HypeNet, arXiv 2601.22156); values are only laid out by heads.
// All in float32, and rounded once.
//
//   q_in            [B, T, Hf * D], or [B, Hf * D] of one token, with any strides, as are
//   k_in, v_in      [B, T, Hk * D]; not read where constants tell Hf and Hk: then all are in q_in,
//                   q, k and v side by side
//   q_norm, k_norm  [D]
//   frequencies     float [D / 2]: angle a position; not read unless ROPE
//   offset          int [B] or [1]: the first token's position; a scale counts those below 0 as 0
//   constants       float [6]: eps of the norms, RoPE's scale, a, 1 / log(a), Hf, Hk; or 0 for these
//   q               [B, Hf, T, D]
//   k, v            [B, Hk, T, D]
//
// Template: X the type of q_in, k_in, v_in, q, k and v; W that of q_norm and k_norm; D (32, 64, 128
// or 256); TOKENS, a power of two up to 32; ROPE, LOG_SCALE.
// Grid: (ceil(T / TOKENS), ceil((Hf + 2 Hk) / S), B) threadgroups of 32 S threads, S up to 32. A
// SIMD-group takes one head's q, k or v through TOKENS tokens, which it reads at once. With RoPE a
// lane has channels of both halves of a head, which are turned against each other; the turns of
// those tokens are made once a threadgroup. Threadgroup memory: 4 TOKENS D bytes, 16 without ROPE.

constexpr int N = D / 32;
// A lane's runs of channels, each in its half of the head; one channel has its partner elsewhere.
constexpr int RUNS = ROPE && N > 1 ? 2 : 1;
constexpr int M = N / RUNS;
// Lanes that a token's sum of squares is given to.
constexpr int LANES = 32 / TOKENS;

// Of each token and pair of channels the cosine and the sine.
threadgroup float4 turns[ROPE ? TOKENS * D / 4 : 1];

// The axis of channels; k_in and v_in have as many.
const int last = q_in_ndim - 1;
const int T = last == 1 ? 1 : q_in_shape[1];
const bool is_joined = constants[4] > 0;
const int n_heads = is_joined ? int(constants[4]) : q_in_shape[last] / D;
const int n_kv_heads = is_joined ? int(constants[5]) : k_in_shape[last] / D;
// Queries, then keys, then values.
const int first_value = n_heads + n_kv_heads;
const int items = first_value + n_kv_heads;
const int batch = threadgroup_position_in_grid.z;
const int first = threadgroup_position_in_grid.x * TOKENS;
const int tokens = metal::min(TOKENS, T - first);
const int threads = threads_per_threadgroup.x;
const int thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const int first_item = threadgroup_position_in_grid.y * (threads / 32);
// Past the last item a SIMD-group reads with the others, and writes nothing.
const int own = first_item + simdgroup_index_in_threadgroup;
const int item = metal::min(own, items - 1);
const bool is_query = item < n_heads;
const bool is_value = item >= first_value;

const device X* now = q_in + batch * q_in_strides[0] + first * q_in_strides[1];
long row = q_in_strides[1];
long apart = q_in_strides[last];
const device W* weights = q_norm;
long between = q_norm_strides[0];
device X* out = q;
int head = item;
int heads = n_heads;
// Where the head's channels are, counted in heads.
int from = item;
if (!is_query) {
  weights = k_norm;
  between = k_norm_strides[0];
  out = is_value ? v : k;
  head = item - (is_value ? first_value : n_heads);
  heads = n_kv_heads;
}
if (!is_query && !is_joined) {
  from = head;
  now = k_in + batch * k_in_strides[0] + first * k_in_strides[1];
  row = k_in_strides[1];
  apart = k_in_strides[last];
}
if (is_value && !is_joined) {
  now = v_in + batch * v_in_strides[0] + first * v_in_strides[1];
  row = v_in_strides[1];
  apart = v_in_strides[last];
}
if (last == 1) {
  // What was taken for its stride is that of channels.
  row = 0;
}
now += (from * D + lane * M) * apart;
out += ((size_t(batch) * heads + head) * T + first) * D + lane * M;
const bool wide = apart == 1 && row * sizeof(X) % pieces<M, X>::BYTES == 0 && may_be_wide<M>(now);

// All reads are on their way before the first is waited for.
X e[TOKENS][N];
read_tokens<TOKENS, RUNS, M>(now, row, tokens, D / 2 * apart, apart, wide, e);
W norm[N];
if (!is_value) {
  const device W* of_lane = weights + lane * M * between;
  const bool wide_norm = between == 1 && may_be_wide<M>(of_lane);
  for (short r = 0; r < RUNS; r++) {
    read_channels<M>(of_lane + r * (D / 2) * between, between, wide_norm, norm + r * M);
  }
}
int position = 0;
if (ROPE || LOG_SCALE) {
  position = offset[offset_shape[0] == 1 ? 0 : batch * offset_strides[0]] + first;
}

if (ROPE) {
  if (first_item < first_value) {
    for (int i = thread_index; i < TOKENS * D / 2; i += threads) {
      const float angle = rope_angle(position + i / (D / 2), float(frequencies[i % (D / 2)]));
      threadgroup float* turn = (threadgroup float*)turns + 2 * i;
      turn[0] = metal::precise::cos(angle);
      turn[1] = metal::precise::sin(angle);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (own >= items) {
  return;
}

if (!is_value) {
  float x[TOKENS][N];
  float squares[TOKENS];
#pragma unroll
  for (short u = 0; u < TOKENS; u++) {
    squares[u] = 0;
    for (short i = 0; i < N; i++) {
      const float entry = float(e[u][i]);
      squares[u] += entry * entry;
      x[u][i] = entry * float(norm[i]);
    }
  }
  // Of the token that a lane is given; a rotation keeps the sum of squares.
  const float mean = sum_of_each<TOKENS>(squares, lane) / D;
  float factors = metal::precise::rsqrt(mean + constants[0]);
  if (ROPE) {
    factors *= constants[1];
  }
  if (LOG_SCALE && is_query) {
    const int t = metal::max(position + lane / LANES, 0);
    factors *= metal::precise::log(float(t) + constants[2]) * constants[3];
  }
  const float side = lane < 16 ? -1.0f : 1.0f;
#pragma unroll
  for (short u = 0; u < TOKENS; u++) {
    const float factor = simd_shuffle(factors, ushort(u * LANES));
    if (ROPE) {
      const int place = u * D + 2 * (lane * M % (D / 2));
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
      e[u][i] = X(x[u][i] * factor);
    }
  }
}

#pragma unroll
for (short u = 0; u < TOKENS; u++) {
  if (u < tokens) {
    for (short r = 0; r < RUNS; r++) {
      write_channels<M>(out + u * D + r * (D / 2), e[u] + r * M);
    }
  }
}
