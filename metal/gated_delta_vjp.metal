// Gated delta rule, backward pass, last of four kernels: dQ, dK, dg and dbeta of a chunk of 64
// tokens, from the state before it and the gradient of the state after it.
//
// With t, j tokens of the chunk, c_t the decay from its start to t, D[t, j] from j to t, e_j from j
// to its end, S the state before and S' the state after it (2412.06464, WY form), the forward is
//
//   L[t, j] = D[t, j] k_t.k_j  (j < t)      A = beta L        P[t, j] = D[t, j] q_t.k_j  (j <= t)
//   U = (I + A)^-1 beta (V - c K S^T)       Y = c Q S^T + P U
//   S' = c_64 S + (e U)^T K
//
// and the backward, with X the gradient of beta (V - c K S^T):
//
//   X = (I + A)^-T (P^T dY + e K dS'^T)                       gated_delta_vjp_updates
//   dS = c_64 dS' + dY^T wq - (e K dS'^T)^T wk                gated_delta_vjp_state
//        wk = (I + A)^-1 (beta c K), wq = c Q - P wk          gated_delta_vjp_prepare
//   dV = beta X
//   dP = dY U^T,  G = -X U^T,  M = D dP,  N = beta D G
//   dQ = c dY S + M K
//   dK = e U dS' - beta c X S + M^T Q + (N + N^T) K
//   dbeta_t = X_t.(V_t - c_t S k_t) + sum_j G[t, j] L[t, j]
//
// The gradient of log g_i is the sum of all that decays across i: with
// Z[t, j] = dP[t, j] P[t, j] + beta_t G[t, j] L[t, j],
//
//   g_i dg_i = sum_{j < i <= t} Z[t, j] + sum_{t >= i} c_t (q_t.(dY_t S) - beta_t k_t.(X_t S))
//            + sum_{j < i} e_j k_j.(U_j dS') + c_64 <S, dS'>
//
// Each term carries the factor g_i, so that the sums lose no digits however small g_i is.
//
// q, k         [B, T, H, Dk] of type T, contiguous
// v, dy        [B, T, H, Dv] of type T, contiguous
// checkpoints  [B, H, N, Dv, Dk] float, contiguous: the state before each chunk
// dstates, gates, scores, u, x   from the kernels before
// dq, dk       [B, T, H, Dk] of type T
// dg, dbeta    [B, T, H] float
//
// Template: T, Dk, Dv (multiples of 16). Grid: N x H x B threadgroups of 256 threads.
// Threadgroup memory: 25.4 KiB.

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
const int value_stride = heads * Dv;

constexpr short SIMDGROUPS = 8;
constexpr short THREADS = 32 * SIMDGROUPS;
constexpr short ROW_SUMS = SIMDGROUPS * CHUNK;
threadgroup float gate[GATES];
threadgroup float matrix[CHUNK * MATRIX_ROW];
threadgroup float row_sums[3 * ROW_SUMS];
threadgroup float across[2 * CHUNK];
threadgroup float rate_slopes[CHUNK];
threadgroup float decay_slopes[2 * CHUNK];
threadgroup float state_products[SIMDGROUPS];

for (short i = thread_index; i < GATES; i += THREADS) {
  gate[i] = gates[place * GATES + i];
}
for (short i = thread_index; i < 3 * ROW_SUMS; i += THREADS) {
  row_sums[i] = 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const size_t token0 = size_t(batch) * length + first;
const device T* queries = q + token0 * stride + head * Dk;
const device T* keys = k + token0 * stride + head * Dk;
const device T* values = v + token0 * value_stride + head * Dv;
const device T* slopes = dy + token0 * value_stride + head * Dv;
const device float* state = checkpoints + place * (Dv * Dk);
const device float* state_slopes = dstates + place * (Dv * Dk);
const device float* attention = scores + place * (CHUNK * CHUNK);
const device float* updates = u + place * (CHUNK * Dv);
const device float* update_slopes = x + place * (CHUNK * Dv);

// dP at [t, j], G at [j, t].
for (short number = simdgroup; number < 10; number += SIMDGROUPS) {
  const short row0 = 16 * block_row(number), col0 = 16 * block_column(number);
  tile<float> dp, xu;
  clear(dp);
  clear(xu);
  for (int d = 0; d < Dv; d += 16) {
    tile<float> left;
    right_tile<float> right;
    load_transposed(right, updates + col0 * Dv + d, Dv, lane);
    load_tokens(left, slopes + row0 * value_stride + d, value_stride, gate + KEPT + row0, lane);
    multiply_add(dp, left, right);
    load(left, update_slopes + row0 * Dv + d, Dv, lane);
    multiply_add(xu, left, right);
  }
  for (short i = 0; i < 8; i++) {
    const short t = row0 + tile_row(lane, i), j = col0 + tile_col(lane, i);
    if (t >= j) {
      matrix[t * MATRIX_ROW + j] = dp.e[i];
    }
    if (t > j) {
      matrix[j * MATRIX_ROW + t] = -xu.e[i];
    }
  }
}

// Sums over a row: X_t.V_t; over everything: <S, dS'>.
for (short t = simdgroup; t < CHUNK; t += SIMDGROUPS) {
  float sum = 0;
  if (gate[KEPT + t] != 0) {
    for (int d = lane; d < Dv; d += 32) {
      sum += update_slopes[t * Dv + d] * float(values[t * value_stride + d]);
    }
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    rate_slopes[t] = sum;
  }
}
{
  float sum = 0;
  for (int i = thread_index; i < Dv * Dk; i += THREADS) {
    sum += state[i] * state_slopes[i];
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    state_products[simdgroup] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (simdgroup < 2) {
  // The sum of Z over the rectangle of tokens that decay across i.
  const short j = thread_index;
  float below = 0;
  for (short i = CHUNK - 1; i > 0; i--) {
    below += matrix[i * MATRIX_ROW + j] * attention[i * CHUNK + j] +
        gate[RATE + i] * matrix[j * MATRIX_ROW + i] * attention[j * CHUNK + i];
    const float sum = simd_sum(j < i ? below : 0.0f);
    if (lane == 0) {
      across[simdgroup * CHUNK + i] = sum;
    }
  }
  if (lane == 0) {
    across[simdgroup * CHUNK] = 0;
  }
} else if (simdgroup < 4) {
  const short t = thread_index - CHUNK;
  float sum = rate_slopes[t];
  for (short j = 0; j < t; j++) {
    sum += matrix[j * MATRIX_ROW + t] * attention[j * CHUNK + t];
  }
  rate_slopes[t] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// M at [t, j], N at [j, t].
if (simdgroup < 4) {
  const short j = thread_index % CHUNK;
  const bool above = thread_index >= CHUNK;
  float between = 1;
  for (short t = j + 1; t < CHUNK; t++) {
    between *= gate[DECAY + t];
    matrix[above ? j * MATRIX_ROW + t : t * MATRIX_ROW + j] *=
        above ? gate[RATE + t] * between : between;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

threadgroup float* read_sums = row_sums + simdgroup * CHUNK;
// Half of the tokens and 16 columns at a time; unrolled so that CUDA gets by with 128 registers,
// and two threadgroups fit.
for (short job = simdgroup; job < Dk / 8; job += SIMDGROUPS) {
  const int d = job / 2 * 16;
  const short half0 = job % 2 * 2;
  tile<float> sums[2];
  tile<float> left;
  right_tile<float> right;

  // dQ = c dY S + M K
#pragma unroll
  for (short n = 0; n < 2; n++) {
    clear(sums[n]);
  }
  for (int e = 0; e < Dv; e += 16) {
    load(right, state + e * Dk + d, Dk, lane);
#pragma unroll
    for (short n = 0; n < 2; n++) {
      const short r = half0 + n;
      load_tokens(
          left, slopes + 16 * r * value_stride + e, value_stride, gate + KEPT + 16 * r, lane);
      multiply_add(sums[n], left, right);
    }
  }
#pragma unroll
  for (short n = 0; n < 2; n++) {
    const short r = half0 + n;
    scale_rows(sums[n], gate + FROM_START + 16 * r, lane);
    load_tokens(left, queries + 16 * r * stride + d, stride, gate + KEPT + 16 * r, lane);
    add_row_products(read_sums + 16 * r, sums[n], left, lane);
  }
#pragma unroll 2
  for (short m = 0; m < 4; m++) {
    load_tokens(right, keys + 16 * m * stride + d, stride, gate + KEPT + 16 * m, lane);
#pragma unroll
    for (short n = 0; n < 2; n++) {
      const short r = half0 + n;
      if (r >= m) {
        load(left, matrix + 16 * r * MATRIX_ROW + 16 * m, MATRIX_ROW, lane);
        if (r == m) {
          clear_upper(left, lane);
        }
        multiply_add(sums[n], left, right);
      }
    }
  }
#pragma unroll
  for (short n = 0; n < 2; n++) {
    const short r = half0 + n;
    for (short i = 0; i < 8; i++) {
      const short t = 16 * r + tile_row(lane, i);
      if (first + t < length) {
        dq[(token0 + t) * stride + head * Dk + d + tile_col(lane, i)] = T(sums[n].e[i]);
      }
    }
    clear(sums[n]);
  }

  // dK = e U dS' - beta c X S + M^T Q + (N + N^T) K
  for (int e = 0; e < Dv; e += 16) {
    load(right, state + e * Dk + d, Dk, lane);
#pragma unroll
    for (short n = 0; n < 2; n++) {
      const short r = half0 + n;
      load(left, update_slopes + 16 * r * Dv + e, Dv, lane);
      multiply_add(sums[n], left, right);
    }
  }
  tile<float> written[2];
#pragma unroll
  for (short n = 0; n < 2; n++) {
    clear(written[n]);
  }
  for (int e = 0; e < Dv; e += 16) {
    load(right, state_slopes + e * Dk + d, Dk, lane);
#pragma unroll
    for (short n = 0; n < 2; n++) {
      const short r = half0 + n;
      load(left, updates + 16 * r * Dv + e, Dv, lane);
      multiply_add(written[n], left, right);
    }
  }
#pragma unroll
  for (short n = 0; n < 2; n++) {
    const short r = half0 + n;
    load_tokens(left, keys + 16 * r * stride + d, stride, gate + KEPT + 16 * r, lane);
    scale_rows(sums[n], gate + FROM_START + 16 * r, lane);
    add_row_products(read_sums + ROW_SUMS + 16 * r, sums[n], left, lane);
    scale_rows(sums[n], gate + RATE + 16 * r, lane);
    scale_rows(written[n], gate + TO_END + 16 * r, lane);
    add_row_products(read_sums + 2 * ROW_SUMS + 16 * r, written[n], left, lane);
    for (short i = 0; i < 8; i++) {
      sums[n].e[i] = written[n].e[i] - sums[n].e[i];
    }
  }
#pragma unroll 2
  for (short m = 0; m < 4; m++) {
    load_tokens(right, keys + 16 * m * stride + d, stride, gate + KEPT + 16 * m, lane);
#pragma unroll
    for (short n = 0; n < 2; n++) {
      const short r = half0 + n;
      const threadgroup float* block = matrix + 16 * r * MATRIX_ROW + 16 * m;
      if (r > m) {
        load_transposed(left, matrix + 16 * m * MATRIX_ROW + 16 * r, MATRIX_ROW, lane);
      } else if (r < m) {
        load(left, block, MATRIX_ROW, lane);
      } else {
        for (short i = 0; i < 8; i++) {
          const short row = tile_row(lane, i), col = tile_col(lane, i);
          const short low = row < col ? row : col, high = row < col ? col : row;
          left.e[i] = row == col ? 0.0f : block[low * MATRIX_ROW + high];
        }
      }
      multiply_add(sums[n], left, right);
    }
    load_tokens(right, queries + 16 * m * stride + d, stride, gate + KEPT + 16 * m, lane);
#pragma unroll
    for (short n = 0; n < 2; n++) {
      const short r = half0 + n;
      if (r <= m) {
        load_transposed(left, matrix + 16 * m * MATRIX_ROW + 16 * r, MATRIX_ROW, lane);
        if (r == m) {
          clear_lower(left, lane);
        }
        multiply_add(sums[n], left, right);
      }
    }
  }
#pragma unroll
  for (short n = 0; n < 2; n++) {
    const short r = half0 + n;
    for (short i = 0; i < 8; i++) {
      const short t = 16 * r + tile_row(lane, i);
      if (first + t < length) {
        dk[(token0 + t) * stride + head * Dk + d + tile_col(lane, i)] = T(sums[n].e[i]);
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (thread_index < CHUNK) {
  const short t = thread_index;
  float queried = 0, recalled = 0, written = 0;
  for (short s = 0; s < SIMDGROUPS; s++) {
    queried += row_sums[s * CHUNK + t];
    recalled += row_sums[ROW_SUMS + s * CHUNK + t];
    written += row_sums[2 * ROW_SUMS + s * CHUNK + t];
  }
  decay_slopes[t] = queried - gate[RATE + t] * recalled;
  decay_slopes[CHUNK + t] = written;
  if (first + t < length) {
    dbeta[(token0 + t) * heads + head] = rate_slopes[t] - recalled;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index < CHUNK && first + thread_index < length) {
  const short i = thread_index;
  float sum = 0;
  for (short s = 0; s < SIMDGROUPS; s++) {
    sum += state_products[s];
  }
  sum = sum * gate[FROM_START + CHUNK - 1] + across[i] + across[CHUNK + i];
  for (short t = 0; t < CHUNK; t++) {
    sum += decay_slopes[t < i ? CHUNK + t : t];
  }
  // A decay that underflowed to zero has no terms; it gets a gradient of zero.
  const float slope = sum / metal::max(gate[DECAY + i], 1.2e-38f);
  dg[(token0 + i) * heads + head] = gate[KEPT + i] != 0 ? slope : 0.0f;
}
