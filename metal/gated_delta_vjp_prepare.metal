// Gated delta rule, backward pass, first of four kernels: what of a chunk of 64 tokens depends on
// neither the state nor its gradient. The formulas are in gated_delta_vjp.metal.
//
// q, k     [B, T, H, Dk] of type T, contiguous
// g, beta  [B, T, H] float, contiguous
// mask     [B, T] bool where `masked`, else any array
// gates    [B, H, N, 5, 64] float: decay, rate, decay from the chunk's start and to its end, kept
// inverse  [B, H, N, 64, 64] float: (I + A)^-1, zeros above the diagonal
// scores   [B, H, N, 64, 64] float: P on and below the diagonal, L^T above it
// wk, wq   [B, H, N, 64, Dk] float: (I + A)^-1 (beta c K) and c Q - P wk
//
// Template: T, Dk (a multiple of 16), masked. Grid: N x H x B threadgroups of 128 threads.
// Threadgroup memory: 23.5 KiB.

const int chunk = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const short thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const short simdgroup = simdgroup_index_in_threadgroup;
const int length = q_shape[1];
const int heads = q_shape[2];
const int first = chunk * CHUNK;
const size_t place =
    (size_t(batch) * heads + head) * ((length + CHUNK - 1) / CHUNK) + chunk;
const int stride = heads * Dk;

threadgroup float gate[GATES];
threadgroup float matrix[CHUNK * MATRIX_ROW];
threadgroup float diagonal[4 * 16 * COLUMN_ROW];

if (thread_index < CHUNK) {
  const int token = first + thread_index;
  bool kept = token < length;
  if (masked && kept) {
    kept = mask[batch * length + token];
  }
  const size_t at = (size_t(batch) * length + token) * heads + head;
  gate[DECAY + thread_index] = kept ? float(g[at]) : 1.0f;
  gate[RATE + thread_index] = kept ? float(beta[at]) : 0.0f;
  gate[KEPT + thread_index] = kept ? 1.0f : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index == 0) {
  float product = 1;
  for (short t = 0; t < CHUNK; t++) {
    product *= gate[DECAY + t];
    gate[FROM_START + t] = product;
  }
}
if (thread_index == 32) {
  float product = 1;
  for (short t = CHUNK - 1; t >= 0; t--) {
    gate[TO_END + t] = product;
    product *= gate[DECAY + t];
  }
}

// Products of queries and of keys with keys: q_t k_j at [t, j], k_t k_j at [j, t].
const device T* queries = q + (size_t(batch) * length + first) * stride + head * Dk;
const device T* keys = k + (size_t(batch) * length + first) * stride + head * Dk;
for (short number = simdgroup; number < 10; number += 4) {
  const short row0 = 16 * block_row(number), col0 = 16 * block_column(number);
  tile<float> qk, kk;
  clear(qk);
  clear(kk);
  for (int d = 0; d < Dk; d += 16) {
    tile<T> left;
    right_tile<T> right;
    load_tokens_transposed(right, keys + col0 * stride + d, stride, gate + KEPT + col0, lane);
    load_tokens(left, queries + row0 * stride + d, stride, gate + KEPT + row0, lane);
    multiply_add(qk, left, right);
    load_tokens(left, keys + row0 * stride + d, stride, gate + KEPT + row0, lane);
    multiply_add(kk, left, right);
  }
  for (short i = 0; i < 8; i++) {
    const short t = row0 + tile_row(lane, i), j = col0 + tile_col(lane, i);
    if (t >= j) {
      matrix[t * MATRIX_ROW + j] = qk.e[i];
    }
    if (t > j) {
      matrix[j * MATRIX_ROW + t] = kk.e[i];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Times the decay between the two tokens: a running product, never a quotient, so that no digits
// are lost on decays of 1e-6 beside decays of 1.
{
  const short j = thread_index % CHUNK;
  const bool above = thread_index >= CHUNK;
  float between = 1;
  for (short t = j + 1; t < CHUNK; t++) {
    between *= gate[DECAY + t];
    matrix[above ? j * MATRIX_ROW + t : t * MATRIX_ROW + j] *= between;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (short i = thread_index; i < GATES; i += 128) {
  gates[place * GATES + i] = gate[i];
}
for (int i = thread_index; i < CHUNK * CHUNK; i += 128) {
  scores[place * (CHUNK * CHUNK) + i] = matrix[i / CHUNK * MATRIX_ROW + i % CHUNK];
}

// (I + A)^-1: the blocks on the diagonal column by column, then block column by block column,
// written over P, which is safe in device memory.
if (thread_index < CHUNK) {
  const short block = thread_index / 16, j = thread_index % 16;
  threadgroup float* column = diagonal + block * (16 * COLUMN_ROW) + j;
  for (short t = 0; t < 16; t++) {
    float sum = 0;
    for (short i = j; i < t; i++) {
      sum += matrix[(16 * block + i) * MATRIX_ROW + 16 * block + t] * column[i * COLUMN_ROW];
    }
    column[t * COLUMN_ROW] = t == j ? 1.0f : -gate[RATE + 16 * block + t] * sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
{
  const short c = simdgroup;
  for (short r = c + 1; r < 4; r++) {
    tile<float> corner;
    clear(corner);
    for (short m = c; m < r; m++) {
      tile<float> left, product;
      right_tile<float> right;
      load(left, diagonal + r * (16 * COLUMN_ROW), COLUMN_ROW, lane);
      load_transposed(right, matrix + 16 * m * MATRIX_ROW + 16 * r, MATRIX_ROW, lane);
      scale_rows(right, gate + RATE + 16 * r, lane);
      clear(product);
      multiply_add(product, left, right);
      if (m == c) {
        load(right, diagonal + c * (16 * COLUMN_ROW), COLUMN_ROW, lane);
      } else {
        load(right, matrix + 16 * m * MATRIX_ROW + 16 * c, MATRIX_ROW, lane);
      }
      multiply_add(corner, product, right);
    }
    for (short i = 0; i < 8; i++) {
      corner.e[i] = -corner.e[i];
    }
    store(corner, matrix + 16 * r * MATRIX_ROW + 16 * c, MATRIX_ROW, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_index; i < CHUNK * CHUNK; i += 128) {
  const short t = i / CHUNK, j = i % CHUNK;
  float value = 0;
  if (t / 16 == j / 16) {
    value = diagonal[t * COLUMN_ROW + j % 16];
  } else if (t > j) {
    value = matrix[t * MATRIX_ROW + j];
  }
  inverse[place * (CHUNK * CHUNK) + i] = value;
}

device float* weighted_keys = wk + place * (CHUNK * Dk);
device float* weighted_queries = wq + place * (CHUNK * Dk);
const device float* attention = scores + place * (CHUNK * CHUNK);
for (int d = 16 * simdgroup; d < Dk; d += 64) {
  tile<float> sums[4];
  for (short r = 0; r < 4; r++) {
    clear(sums[r]);
  }
  for (short m = 0; m < 4; m++) {
    right_tile<float> right;
    load_tokens(right, keys + 16 * m * stride + d, stride, gate + KEPT + 16 * m, lane);
    scale_rows(right, gate + RATE + 16 * m, lane);
    scale_rows(right, gate + FROM_START + 16 * m, lane);
    for (short r = 0; r < 4; r++) {
      if (r >= m) {
        tile<float> left;
        if (r == m) {
          load(left, diagonal + r * (16 * COLUMN_ROW), COLUMN_ROW, lane);
        } else {
          load(left, matrix + 16 * r * MATRIX_ROW + 16 * m, MATRIX_ROW, lane);
        }
        multiply_add(sums[r], left, right);
      }
    }
  }
  for (short r = 0; r < 4; r++) {
    store_device(sums[r], weighted_keys + 16 * r * Dk + d, Dk, lane);
    clear(sums[r]);
  }
  simdgroup_barrier(mem_flags::mem_device);
  for (short m = 0; m < 4; m++) {
    right_tile<float> right;
    load(right, weighted_keys + 16 * m * Dk + d, Dk, lane);
    for (short r = 0; r < 4; r++) {
      if (r >= m) {
        tile<float> left;
        load(left, attention + 16 * r * CHUNK + 16 * m, CHUNK, lane);
        if (r == m) {
          clear_upper(left, lane);
        }
        multiply_add(sums[r], left, right);
      }
    }
  }
  for (short r = 0; r < 4; r++) {
    tile<float> query;
    load_tokens(query, queries + 16 * r * stride + d, stride, gate + KEPT + 16 * r, lane);
    scale_rows(query, gate + FROM_START + 16 * r, lane);
    for (short i = 0; i < 8; i++) {
      query.e[i] -= sums[r].e[i];
    }
    store_device(query, weighted_queries + 16 * r * Dk + d, Dk, lane);
  }
}
