// Gated delta rule, backward pass, third of four kernels: the corrections U of each chunk, their
// gradients X, and dV. The formulas are in gated_delta_vjp.metal.
//
// k            [B, T, H, Dk] of type T, contiguous
// v, dy        [B, T, H, Dv] of type T, contiguous
// checkpoints  [B, H, N, Dv, Dk] float, contiguous: the state before each chunk
// dstates      from gated_delta_vjp_state; gates, inverse, scores from gated_delta_vjp_prepare
// u, x         [B, H, N, 64, Dv] float
// dv           [B, T, H, Dv] of type T
//
// Template: T, Dk, Dv (multiples of 16). Grid: N x H x B threadgroups of 128 threads.
// Threadgroup memory: 21.25 KiB.

const int chunk = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const short thread_index = thread_index_in_threadgroup;
const short lane = thread_index_in_simdgroup;
const short simdgroup = simdgroup_index_in_threadgroup;
const int length = k_shape[1];
const int heads = k_shape[2];
const int first = chunk * CHUNK;
const size_t place =
    (size_t(batch) * heads + head) * ((length + CHUNK - 1) / CHUNK) + chunk;
const int stride = heads * Dk;
const int value_stride = heads * Dv;

threadgroup float gate[GATES];
threadgroup float columns[4 * CHUNK * COLUMN_ROW];

for (short i = thread_index; i < GATES; i += 128) {
  gate[i] = gates[place * GATES + i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const size_t token0 = size_t(batch) * length + first;
const device T* keys = k + token0 * stride + head * Dk;
const device T* values = v + token0 * value_stride + head * Dv;
const device T* slopes = dy + token0 * value_stride + head * Dv;
const device float* state = checkpoints + place * (Dv * Dk);
const device float* state_slopes = dstates + place * (Dv * Dk);
const device float* solve = inverse + place * (CHUNK * CHUNK);
const device float* attention = scores + place * (CHUNK * CHUNK);
threadgroup float* column = columns + simdgroup * (CHUNK * COLUMN_ROW);

for (int d = 16 * simdgroup; d < Dv; d += 64) {
  tile<float> sums[4];
  tile<float> left;
  right_tile<float> right;

  // U = (I + A)^-1 beta (V - c K S^T)
  for (short r = 0; r < 4; r++) {
    clear(sums[r]);
  }
  for (int e = 0; e < Dk; e += 16) {
    load_transposed(right, state + d * Dk + e, Dk, lane);
    for (short r = 0; r < 4; r++) {
      load_tokens(left, keys + 16 * r * stride + e, stride, gate + KEPT + 16 * r, lane);
      multiply_add(sums[r], left, right);
    }
  }
  for (short r = 0; r < 4; r++) {
    load_tokens(left, values + 16 * r * value_stride + d, value_stride, gate + KEPT + 16 * r, lane);
    scale_rows(sums[r], gate + FROM_START + 16 * r, lane);
    for (short i = 0; i < 8; i++) {
      sums[r].e[i] = left.e[i] - sums[r].e[i];
    }
    scale_rows(sums[r], gate + RATE + 16 * r, lane);
    store(sums[r], column + 16 * r * COLUMN_ROW, COLUMN_ROW, lane);
    clear(sums[r]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (short m = 0; m < 4; m++) {
    load(right, column + 16 * m * COLUMN_ROW, COLUMN_ROW, lane);
    for (short r = 0; r < 4; r++) {
      if (r >= m) {
        load(left, solve + 16 * r * CHUNK + 16 * m, CHUNK, lane);
        multiply_add(sums[r], left, right);
      }
    }
  }
  for (short r = 0; r < 4; r++) {
    store_device(sums[r], u + (place * CHUNK + 16 * r) * Dv + d, Dv, lane);
    clear(sums[r]);
  }

  // X = (I + A)^-T (e K dS'^T + P^T dY)
  for (int e = 0; e < Dk; e += 16) {
    load_transposed(right, state_slopes + d * Dk + e, Dk, lane);
    for (short r = 0; r < 4; r++) {
      load_tokens(left, keys + 16 * r * stride + e, stride, gate + KEPT + 16 * r, lane);
      multiply_add(sums[r], left, right);
    }
  }
  for (short r = 0; r < 4; r++) {
    scale_rows(sums[r], gate + TO_END + 16 * r, lane);
  }
  for (short m = 0; m < 4; m++) {
    load_tokens(
        right, slopes + 16 * m * value_stride + d, value_stride, gate + KEPT + 16 * m, lane);
    for (short r = 0; r < 4; r++) {
      if (r <= m) {
        load_transposed(left, attention + 16 * m * CHUNK + 16 * r, CHUNK, lane);
        if (r == m) {
          clear_lower(left, lane);
        }
        multiply_add(sums[r], left, right);
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (short r = 0; r < 4; r++) {
    store(sums[r], column + 16 * r * COLUMN_ROW, COLUMN_ROW, lane);
    clear(sums[r]);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (short m = 0; m < 4; m++) {
    load(right, column + 16 * m * COLUMN_ROW, COLUMN_ROW, lane);
    for (short r = 0; r < 4; r++) {
      if (r <= m) {
        load_transposed(left, solve + 16 * m * CHUNK + 16 * r, CHUNK, lane);
        multiply_add(sums[r], left, right);
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (short r = 0; r < 4; r++) {
    store_device(sums[r], x + (place * CHUNK + 16 * r) * Dv + d, Dv, lane);
    for (short i = 0; i < 8; i++) {
      const short t = 16 * r + tile_row(lane, i);
      if (first + t < length) {
        dv[(token0 + t) * value_stride + head * Dv + d + tile_col(lane, i)] =
            T(gate[RATE + t] * sums[r].e[i]);
      }
    }
  }
}
