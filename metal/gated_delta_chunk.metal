// Gated delta rule, second kernel: the chunks of 16 tokens in turn, in matrix products.
// gated_delta_prepare has found `prepared`, and says what is in it.
//
// A SIMD-group keeps 16 rows of the state S in registers, Dk / 2 floats a lane, from the first
// chunk to the last. It works on transposes, so that what one product yields is the next one's left
// operand without leaving its lane. With c and e the decays from the start and to the end:
//
//   U^T = (V - c K S^T)^T inverse^T
//   Y^T = c S Q^T + U^T scores^T,    S = c_15 S + (e U)^T K
//
// No operand is rounded to T on Apple's GPUs. On tensor cores S and U are sums of two T where they
// meet q and k, and so are all operands where T is bfloat (gated_delta.h): 16 bits of each.
//
// A sequence may be cut into segments that run side by side. The state after a segment is linear in
// the one before it, S A + B: with `ends` the kernel finds B, from S = 0, and A, as Dk more rows
// that start as the identity and write no values. gated_delta_starts makes of these the state
// before each segment, and without `ends` every segment runs from its own.
//
// q, k         [B, T, H, Dk] of type T, contiguous
// v, y         [B, T, H, Dv] of type T, contiguous
// mask         [B, T] bool, contiguous, where `masked`; else any array
// state        [B, H, segments, Dv, Dk] float, contiguous; unread with `ends`
// prepared     [B, H, N, PREPARED] float
// new_state    [B, H, Dv, Dk] float; with `ends` [B, H, segments - 1, Dv + Dk, Dk], A times UNIT
// checkpoints  [B, H, ceil(T / 64), Dv, Dk] float, where `save`: the state before each 64 tokens;
//              else untouched, as is y with `ends`
//
// Template: T, Dk, Dv (multiples of 16), slice (rows of the state a threadgroup has: a multiple of
// 16 that divides Dv, or Dv + Dk with `ends`), masked, save, ends. Grid: rows / slice x
// H * segments x B threadgroups of 2 slice threads, with `ends` for all segments but the last.
// Threadgroup memory: q and k of one or two chunks, up to 32 KiB (48 KiB on CUDA, with `prepared`).

constexpr short PIECE = 16 / sizeof(T);
constexpr short THREADS = 2 * slice;
constexpr short MATRICES = ends ? 1 : 2;
constexpr short PADDING = 2 * TOKENS * (Dk + PIECE) * sizeof(T) <= 32768 ? PIECE : 0;
constexpr short ROW = Dk + PADDING;
constexpr short ROW_PIECES = Dk / PIECE;
constexpr short PIECES_EACH = (TOKENS * ROW_PIECES + THREADS - 1) / THREADS;
constexpr short MATRIX = TOKENS * ROW / PIECE;
constexpr short KNOWN = (ends ? SCORES : PREPARED) / 4;
// Where two fit, one is filled while the other is read.
constexpr short BUFFERS = 2 * 16 * (MATRICES * MATRIX + COPIES * KNOWN) <= MOST_BYTES ? 2 : 1;
constexpr bool COPIED = COPIES && BUFFERS == 2;
constexpr short BUFFER = MATRICES * MATRIX + COPIED * KNOWN;

threadgroup uint4 staged[BUFFERS * BUFFER];

const short thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const int length = q_shape[1];
const int heads = q_shape[2];
const int batch = threadgroup_position_in_grid.z;
const int runs = threadgroups_per_grid.y / heads;
const int head = threadgroup_position_in_grid.y / runs;
const int segment = threadgroup_position_in_grid.y % runs;
const int segments = runs + ends;
const int row = threadgroup_position_in_grid.x * slice + simdgroup_index_in_threadgroup * 16;
const int chunks = (length + TOKENS - 1) / TOKENS;
const int blocks = (chunks + 3) / 4;
const int begin = segment * ((blocks + segments - 1) / segments) * 4;
const int end = metal::min(begin + (blocks + segments - 1) / segments * 4, chunks);
const size_t sequence = size_t(batch) * heads + head;

tile<float> S[Dk / 16];
#pragma unroll
for (short d = 0; d < Dk / 16; d++) {
  if (ends) {
    for (short i = 0; i < 8; i++) {
      const bool diagonal = row + tile_row(lane, i) == Dv + 16 * d + tile_col(lane, i);
      S[d].e[i] = diagonal ? UNIT : 0.0f;
    }
  } else {
    load(S[d], state + ((sequence * segments + segment) * Dv + row) * Dk + 16 * d, Dk, lane);
  }
}

// These move on with the chunks: the next one's inputs, and this one's outputs.
size_t token = size_t(batch) * length + begin * TOKENS;
const int stride = heads * Dk, v_stride = heads * Dv;
const device T* next[2] = {k + token * stride + head * Dk, q + token * stride + head * Dk};
const device T* next_v = v + token * v_stride + head * Dv + row;
const device float* next_prepared = prepared + (sequence * chunks + begin) * PREPARED;
const device float* now_prepared = next_prepared;
device T* now_y = y + token * v_stride + head * Dv + row;
const bool whole = in_pieces(q) && in_pieces(k);

uint4 ahead[MATRICES][PIECES_EACH];
tile<T> v_ahead;
for (short i = 0; i < 8; i++) {
  v_ahead.e[i] = T(0.0f);
}

for (int chunk = begin - 1; chunk < end; chunk++) {
  const tile<T> values = v_ahead;
  const bool more = chunk + 1 < end;
  if (more) {
    const int left = length - (chunk + 1) * TOKENS;
    threadgroup uint4* target = staged + (chunk + 1) % BUFFERS * BUFFER;
    bool kept[PIECES_EACH];
#pragma unroll
    for (short i = 0; i < PIECES_EACH; i++) {
      const short t = piece_row<ROW_PIECES, THREADS>(i, thread_index);
      kept[i] = t < left && t < TOKENS;
      if (masked && kept[i]) {
        kept[i] = mask[token + t];
      }
    }
#pragma unroll
    for (short m = 0; m < MATRICES; m++) {
      if (!COPIED) {
#pragma unroll
        for (short i = 0; i < PIECES_EACH; i++) {
          ahead[m][i].x = ahead[m][i].y = ahead[m][i].z = ahead[m][i].w = 0;
          if (kept[i]) {
            const short t = piece_row<ROW_PIECES, THREADS>(i, thread_index);
            const short column = piece_column<ROW_PIECES, THREADS>(i, thread_index);
            ahead[m][i] = piece_at(next[m] + t * stride + column * PIECE);
          }
        }
      } else if (whole) {
        copy_rows<T, ROW_PIECES, ROW / PIECE, THREADS, true>(
            target + m * MATRIX, next[m], stride, kept, thread_index);
      } else {
        copy_rows<T, ROW_PIECES, ROW / PIECE, THREADS, false>(
            target + m * MATRIX, next[m], stride, kept, thread_index);
      }
      next[m] += TOKENS * stride;
    }
    if (COPIED) {
#pragma unroll
      for (short i = 0; i < (KNOWN + THREADS - 1) / THREADS; i++) {
        const short p = i * THREADS + thread_index;
        if (p < KNOWN) {
          copy_piece<true>(target + MATRICES * MATRIX + p, next_prepared + 4 * p, true);
        }
      }
      next_prepared += PREPARED;
    }
#pragma unroll
    for (short i = 0; i < 8; i++) {
      const short t = tile_col(lane, i);
      bool kept = t < left && !(ends && row >= Dv);
      if (masked && kept) {
        kept = mask[token + t];
      }
      v_ahead.e[i] = T(0.0f);
      if (kept) {
        v_ahead.e[i] = next_v[t * v_stride + tile_row(lane, i)];
      }
    }
    next_v += TOKENS * v_stride;
    token += TOKENS;
  }

  if (chunk >= begin) {
    const threadgroup uint4* buffer = staged + chunk % BUFFERS * BUFFER;
    const threadgroup T* keys = reinterpret_cast<const threadgroup T*>(buffer);
    const threadgroup T* queries = reinterpret_cast<const threadgroup T*>(buffer + MATRIX);

    if (save && chunk % 4 == 0) {
#pragma unroll
      for (short d = 0; d < Dk / 16; d++) {
        const size_t at = ((sequence * blocks + chunk / 4) * Dv + row) * Dk + 16 * d;
        store_device(S[d], checkpoints + at, Dk, lane);
      }
    }

    const device float* found =
        COPIED ? copied(buffer + MATRICES * MATRIX, now_prepared) : now_prepared;
    now_prepared += PREPARED;
    right_tile<float> solve;
    load_in_order(solve, found, lane);
    float from_start[8], to_end[8];
    for (short i = 0; i < 8; i++) {
      from_start[i] = found[DECAYS + tile_col(lane, i)];
      to_end[i] = found[DECAYS + TOKENS + tile_col(lane, i)];
    }
    const float through = found[DECAYS + TOKENS - 1];

    // With `ends` half of what is known goes into `read`: two sums that need not wait for another.
    tile<float> known, read;
    clear(known);
    clear(read);
#pragma unroll
    for (short d = 0; d < Dk / 16; d++) {
      const wide_tile<T> left = as_wide<T>(S[d]);
      right_tile<T> right;
      load_transposed_aligned(right, keys + 16 * d, ROW, lane);
      if (ends && d % 2) {
        multiply_add(read, left, right);
      } else {
        multiply_add(known, left, right);
      }
      if (!ends) {
        load_transposed_aligned(right, queries + 16 * d, ROW, lane);
        multiply_add(read, left, right);
      }
    }

    tile<float> errors, u;
    for (short i = 0; i < 8; i++) {
      known.e[i] += ends ? read.e[i] : 0.0f;
      errors.e[i] = float(values.e[i]) - from_start[i] * known.e[i];
      read.e[i] *= from_start[i];
    }
    clear(u);
    multiply_add_floats<T>(u, errors, solve);
    if (!ends) {
      right_tile<float> attend;
      load_in_order(attend, found + SCORES, lane);
      multiply_add_floats<T>(read, u, attend);
    }

    for (short i = 0; i < 8; i++) {
      u.e[i] *= to_end[i];
    }
    const wide_tile<T> writes = as_wide<T>(u);
#pragma unroll
    for (short d = 0; d < Dk / 16; d++) {
      right_tile<T> right;
      load_aligned(right, keys + 16 * d, ROW, lane);
      for (short i = 0; i < 8; i++) {
        S[d].e[i] *= through;
      }
      multiply_add(S[d], writes, right);
    }

    if (!ends) {
      for (short i = 0; i < 8; i++) {
        const short t = tile_col(lane, i);
        if (t < length - chunk * TOKENS) {
          now_y[t * v_stride + tile_row(lane, i)] = T(read.e[i]);
        }
      }
      now_y += TOKENS * v_stride;
    }
  }

  if (more) {
    if (COPIED) {
      wait_until_copied();
    } else {
      if (BUFFERS == 1) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
#pragma unroll
      for (short m = 0; m < MATRICES; m++) {
#pragma unroll
        for (short i = 0; i < PIECES_EACH; i++) {
          const short t = piece_row<ROW_PIECES, THREADS>(i, thread_index);
          const short column = piece_column<ROW_PIECES, THREADS>(i, thread_index);
          if (t < TOKENS) {
            staged[(chunk + 1) % BUFFERS * BUFFER + m * MATRIX + t * (ROW / PIECE) + column] =
                ahead[m][i];
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

if (ends || segment == segments - 1) {
  const size_t at = ends ? (sequence * runs + segment) * (Dv + Dk) : sequence * Dv;
#pragma unroll
  for (short d = 0; d < Dk / 16; d++) {
    store_device(S[d], new_state + (at + row) * Dk + 16 * d, Dk, lane);
  }
}
