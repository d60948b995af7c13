// Softmax attention of many queries, tile by tile, for heads that share KV heads in any grouping.
//
// Inputs and outputs are those of head_attention_decode. The queries of all heads that read one KV
// head are rows, token by token: row = t * heads + head; blocks counts tiles of rows.
// Template: T; D, a multiple of 16 up to 256; SIMDGROUPS of 1, 2, 4, 8; ROW_TILES of 1, 2; KEYS, a
// multiple of 16: keys a tile; AT_ONCE, a multiple of 16 and divisor of KEYS: keys whose scores are
// held; BITS of 0 (plain), 4, 8; GROUP; MASKED; WHOLE; BUFFERS of 1, or 2 where the next tile is to
// be on its way while one is worked on.
// Grid: splits * blocks, the n KV heads, B threadgroups of 32 * SIMDGROUPS * (D > 128 ? 2 : 1).
// A SIMD-group has ROW_TILES times 16 rows, for which it reads a tile of keys or values once; where
// D > 128 two have them, each with half of the output's columns. The last rows, which see most,
// come first.
// Threadgroup memory: 2 * BUFFERS * KEYS * STRIDE elements of T, with one buffer 32 KB at most.

constexpr int PARTS = D > 128 ? 2 : 1;
constexpr int COLUMNS = D / PARTS;
constexpr int SIMDGROUP_ROWS = 16 * ROW_TILES;
constexpr int ROWS = SIMDGROUP_ROWS * SIMDGROUPS;
constexpr int THREADS = 32 * SIMDGROUPS * PARTS;
// Rows start at multiples of 16 bytes, in different banks where there is room.
constexpr int STRIDE = D * int(sizeof(T)) < 1024 ? D + 16 / int(sizeof(T)) : D;

alignas(16) threadgroup T key_tiles[BUFFERS * KEYS * STRIDE];
alignas(16) threadgroup T value_tiles[BUFFERS * KEYS * STRIDE];

const short lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int first_column = simdgroup % PARTS * COLUMNS;
const int offset = position[0];
const int blocks = layout[0];
const int n = layout[1];
const int splits = int(threadgroups_per_grid.x) / blocks;
const int block = blocks - 1 - int(threadgroup_position_in_grid.x) / splits;
const int split = int(threadgroup_position_in_grid.x) % splits;
const int group = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const int n_heads = q_shape[1];
const int n_tokens = q_shape[2];
const int kv_head = layout[2 + group];
const int first_head = layout[2 + n + group];
const int group_size = layout[3 + n + group] - first_head;
const int n_rows = group_size * n_tokens;
if (block * ROWS >= n_rows) {
  return;
}

// A lane has elements of two rows of a tile: those of elements 0 and 2.
const int simdgroup_row = block * ROWS + simdgroup / PARTS * SIMDGROUP_ROWS;
int last[ROW_TILES][2];
int place[ROW_TILES][2];
long mask_row[ROW_TILES][2];
long q_row[ROW_TILES][2];
#pragma unroll
for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
  for (short j = 0; j < 2; j++) {
    const int row = metal::min(simdgroup_row + r * 16 + tile_row(lane, 2 * j), n_rows - 1);
    const int t = row / group_size;
    const int head = layout[3 + 2 * n + first_head + row % group_size];
    last[r][j] = offset + t;
    place[r][j] = (batch * n_heads + head) * n_tokens + t;
    mask_row[r][j] = MASKED ? batch * mask_strides[0] + t * mask_strides[2] : 0;
    q_row[r][j] = batch * q_strides[0] + head * q_strides[1] + t * q_strides[2];
  }
}
tile<T> queries[ROW_TILES][D / 16];
const bool in_pairs = q_strides[3] == 1 && starts_at_multiple_of(2 * int(sizeof(T)), q) &&
    (q_strides[0] | q_strides[1] | q_strides[2]) % 2 == 0;
if (in_pairs) {
#pragma unroll
  for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
    for (short c = 0; c < D / 16; c++) {
#pragma unroll
      for (short i = 0; i < 8; i += 2) {
        read_run<2>(q + q_row[r][i >> 1 & 1] + c * 16 + tile_col(lane, i), queries[r][c].e + i);
      }
    }
  }
} else {
#pragma unroll
  for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
    for (short c = 0; c < D / 16; c++) {
#pragma unroll
      for (short i = 0; i < 8; i += 2) {
        const long first = q_row[r][i >> 1 & 1] + (c * 16 + tile_col(lane, i)) * q_strides[3];
        set_pair(queries[r][c].e + i, q[first], q[first + q_strides[3]]);
      }
    }
  }
}

const int total = MASKED ? int(k_shape[2]) : offset + n_tokens;
const int last_row = metal::min(block * ROWS + ROWS, n_rows) - 1;
const int seen_by_all = MASKED ? -1 : offset + simdgroup_row / group_size;
const int seen_by_any = MASKED ? total - 1 : offset + last_row / group_size;
const int seen_by_simdgroup = MASKED
    ? total - 1
    : offset + metal::min(simdgroup_row + SIMDGROUP_ROWS - 1, n_rows - 1) / group_size;
const int range = (total + splits - 1) / splits;
const int begin = split * range;
const int end = metal::min(begin + range, seen_by_any + 1);
const int simdgroup_end = metal::min(end, seen_by_simdgroup + 1);

// With a factor above zero the largest product is the largest score.
const bool negative = scale[0] < 0;
const float factor = metal::max(metal::abs(scale[0]) * LOG2_E, SMALLEST_FACTOR);

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
constexpr int BYTES = BITS != 0 ? BITS : 16;
const bool wide = lie_side_by_side<BYTES>(keys) && lie_side_by_side<BYTES>(values);

tile<float> output[ROW_TILES][COLUMNS / 16];
float m[ROW_TILES][2];
float l[ROW_TILES][2];
#pragma unroll
for (short r = 0; r < ROW_TILES; r++) {
  m[r][0] = m[r][1] = LOWEST;
  l[r][0] = l[r][1] = 0;
#pragma unroll
  for (short c = 0; c < COLUMNS / 16; c++) {
    clear(output[r][c]);
  }
}

// Step s asks for tile s and works on tile s - BUFFERS + 1.
const int tiles = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
for (int step = 0; step < tiles + BUFFERS - 1; step++) {
  wait_for_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (step < tiles) {
    const int asked = begin + step * KEYS;
    const int place = step % BUFFERS * (KEYS * STRIDE);
    if (wide) {
      fill_tiles<T, D, KEYS, STRIDE, THREADS, GROUP, true>(
          bits_of<BITS>(), key_tiles + place, value_tiles + place, keys, values, asked, end,
          thread_index_in_threadgroup);
    } else {
      fill_tiles<T, D, KEYS, STRIDE, THREADS, GROUP, false>(
          bits_of<BITS>(), key_tiles + place, value_tiles + place, keys, values, asked, end,
          thread_index_in_threadgroup);
    }
  }
  if (BUFFERS == 1) {
    wait_for_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (step < BUFFERS - 1) {
    continue;
  }
  const int in_use = (step + BUFFERS - 1) % BUFFERS * (KEYS * STRIDE);
#pragma unroll
  for (short part = 0; part < KEYS; part += AT_ONCE) {
    const int start = begin + (step - BUFFERS + 1) * KEYS + part;
    if (start >= simdgroup_end) {
      continue;
    }
    const threadgroup T* keys_in_use = key_tiles + in_use + part * STRIDE;
    const threadgroup T* values_in_use = value_tiles + in_use + part * STRIDE + first_column;

    tile<float> scores[ROW_TILES][AT_ONCE / 16];
#pragma unroll
    for (short b = 0; b < AT_ONCE / 16; b++) {
#pragma unroll
      for (short r = 0; r < ROW_TILES; r++) {
        clear(scores[r][b]);
      }
    }
#pragma unroll
    for (short c = 0; c < D / 16; c++) {
#pragma unroll
      for (short b = 0; b < AT_ONCE / 16; b++) {
        right_tile<T> right;
        load_transposed_aligned(right, keys_in_use + b * 16 * STRIDE + c * 16, STRIDE, lane);
#pragma unroll
        for (short r = 0; r < ROW_TILES; r++) {
          multiply_add(scores[r][b], queries[r][c], right);
        }
      }
    }

    if (negative) {
#pragma unroll
      for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (short b = 0; b < AT_ONCE / 16; b++) {
          negate(scores[r][b]);
        }
      }
    }
    if (start + AT_ONCE > end || start + AT_ONCE - 1 > seen_by_all) {
      const float hidden = metal::fast::divide(HIDDEN, factor);
#pragma unroll
      for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (short b = 0; b < AT_ONCE / 16; b++) {
#pragma unroll
          for (short i = 0; i < 8; i++) {
            const short j = (i >> 1) & 1;
            const int key = start + b * 16 + tile_col(lane, i);
            bool seen = key < end;
            if (MASKED) {
              const long element = mask_row[r][j] + metal::min(key, end - 1) * mask_strides[3];
              seen = seen && float(mask[element]) != 0;
            } else {
              seen = seen && key <= last[r][j];
            }
            scores[r][b].e[i] = seen ? scores[r][b].e[i] : hidden;
          }
        }
      }
    }

    float largest[ROW_TILES][2];
    bool grows = false;
#pragma unroll
    for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
      for (short j = 0; j < 2; j++) {
        largest[r][j] = scores[r][0].e[2 * j];
#pragma unroll
        for (short b = 0; b < AT_ONCE / 16; b++) {
#pragma unroll
          for (short i = 2 * j; i < 8; i += 4) {
            largest[r][j] = metal::max(
                largest[r][j], metal::max(scores[r][b].e[i], scores[r][b].e[i + 1]));
          }
        }
        grows = grows || metal::fma(largest[r][j], factor, -m[r][j]) > GROWTH;
      }
    }
    if (simd_any(grows)) {
#pragma unroll
      for (short r = 0; r < ROW_TILES; r++) {
        float kept[2];
#pragma unroll
        for (short j = 0; j < 2; j++) {
          const float found = metal::max(m[r][j], row_max(largest[r][j]) * factor);
          kept[j] = power_of_two(m[r][j] - found);
          m[r][j] = found;
          l[r][j] *= kept[j];
        }
#pragma unroll
        for (short c = 0; c < COLUMNS / 16; c++) {
#pragma unroll
          for (short i = 0; i < 8; i++) {
            output[r][c].e[i] *= kept[(i >> 1) & 1];
          }
        }
      }
    }
#pragma unroll
    for (short b = 0; b < AT_ONCE / 16; b++) {
      tile<T> weights[ROW_TILES];
#pragma unroll
      for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (short i = 0; i < 8; i++) {
          const short j = (i >> 1) & 1;
          const float p = power_of_two(metal::fma(scores[r][b].e[i], factor, -m[r][j]));
          scores[r][b].e[i] = p;
          l[r][j] += p;
        }
        weights[r] = as_operand<T>(scores[r][b]);
      }
#pragma unroll
      for (short c = 0; c < COLUMNS / 16; c++) {
        right_tile<T> right;
        load_aligned(right, values_in_use + b * 16 * STRIDE + c * 16, STRIDE, lane);
#pragma unroll
        for (short r = 0; r < ROW_TILES; r++) {
          multiply_add(output[r][c], weights[r], right);
        }
      }
    }
  }
}

#pragma unroll
for (short r = 0; r < ROW_TILES; r++) {
#pragma unroll
  for (short j = 0; j < 2; j++) {
    const float sum = row_sum(l[r][j]);
    if (simdgroup_row + r * 16 + tile_row(lane, 2 * j) < n_rows) {
      const long part = WHOLE ? place[r][j] : long(place[r][j]) * splits + split;
      const float factor = WHOLE ? (sum > 0 ? 1 / sum : 0.0f) : 1.0f;
      device Out* target = o + part * D + first_column;
#pragma unroll
      for (short c = 0; c < COLUMNS / 16; c++) {
#pragma unroll
        for (short i = 2 * j; i < 8; i += 4) {
          const Out pair[2] = {
              Out(output[r][c].e[i] * factor), Out(output[r][c].e[i + 1] * factor)};
          write_device_run<2>(target + c * 16 + tile_col(lane, i), pair);
        }
      }
      if (!WHOLE && first_column == 0 && tile_col(lane, 0) == 0) {
        stats[part * 2] = m[r][j];
        stats[part * 2 + 1] = sum;
      }
    }
  }
}
