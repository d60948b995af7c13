// The weights that a lane of normed_linear has at hand, and what it makes of them.

// AT_ONCE pieces of N numbers, 32 * N columns apart, of each of EACH rows.
template <typename X, int EACH, int AT_ONCE, int N, int BITS, int GROUP, bool WIDE>
struct lane_weights {
  piece<X, N, BITS, GROUP, WIDE> w[AT_ONCE][EACH];

  // Those from a column on; the last columns again where no others are left.
  template <typename Rows>
  METAL_FUNC void read(
      const thread Rows& rows, const thread long (&row)[EACH], int start, int K, int lane) thread {
#pragma unroll
    for (short u = 0; u < AT_ONCE; u++) {
      const int c = metal::min(start + (u * 32 + lane) * N, K - N);
      for (short r = 0; r < EACH; r++) {
        w[u][r].read(rows, row[r], c);
      }
    }
  }

  // Adds up their products with x, which lies as normed_linear says, `apart` numbers a row of it.
  template <int ROWS>
  METAL_FUNC void multiply(
      const threadgroup float4* x,
      int apart,
      int lane,
      thread float (&products)[EACH][ROWS]) const thread {
#pragma unroll
    for (short u = 0; u < AT_ONCE; u++) {
      for (short j = 0; j < N / 4; j++) {
        for (short b = 0; b < ROWS; b++) {
          const float4 part = x[b * apart + (u * (N / 4) + j) * 32 + lane];
          const float four[4] = {part.x, part.y, part.z, part.w};
          for (short i = 0; i < 4; i++) {
            for (short r = 0; r < EACH; r++) {
              products[r][b] = metal::fma(w[u][r].at(4 * j + i), four[i], products[r][b]);
            }
          }
        }
      }
    }
  }
};

// The products of a SIMD-group's rows with all of h + update, weighted, and that sum's squares.
template <int BITS, int GROUP, bool WIDE, int SLAB, int THREADS, int N, typename X, typename W,
          typename Rows, int EACH, int ROWS>
METAL_FUNC void multiply_rows(
    const device X* h,
    const device X* update,
    const device W* norm,
    device X* total,
    const thread Rows& rows,
    const thread long (&row)[EACH],
    threadgroup float4* x,
    int K,
    int index,
    bool writes,
    thread float (&products)[EACH][ROWS],
    thread float (&squares)[ROWS]) {
  // By the registers that they take; numbers that come one by one have one each.
  constexpr int MOST = !WIDE ? 1 : BITS == 0 ? 64 / (N * int(sizeof(X))) : 4;
  constexpr int AT_ONCE = SLAB / (32 * N) < MOST ? SLAB / (32 * N) : MOST;
  constexpr int STEP = AT_ONCE * 32 * N;
  const int lane = index % 32;
  // On their way while x is made.
  lane_weights<X, EACH, AT_ONCE, N, BITS, GROUP, WIDE> weights;
  weights.read(rows, row, 0, K, lane);
  for (int start = 0; start < K; start += SLAB) {
    if (start > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int end = metal::min(K, start + SLAB);
    for (int place = index; place * 4 < (end - start + STEP - 1) / STEP * STEP; place += THREADS) {
      const int c = start + place / (8 * N) * (32 * N) + place % 32 * N + place / 32 % (N / 4) * 4;
      W scale[4];
      if (c < K) {
        read_channels<4>(norm + c, 1, WIDE, scale);
      }
#pragma unroll
      for (short b = 0; b < ROWS; b++) {
        float4 part;
        part.x = part.y = part.z = part.w = 0.0f;
        if (c < K) {
          X e[4];
          X more[4];
          read_channels<4>(h + b * K + c, 1, WIDE, e);
          read_channels<4>(update + b * K + c, 1, WIDE, more);
          float sums[4];
          for (short i = 0; i < 4; i++) {
            const X sum = X(float(e[i]) + float(more[i]));
            sums[i] = float(sum);
            squares[b] += sums[i] * sums[i];
            if (writes) {
              total[b * K + c + i] = sum;
            }
          }
          part.x = sums[0] * float(scale[0]);
          part.y = sums[1] * float(scale[1]);
          part.z = sums[2] * float(scale[2]);
          part.w = sums[3] * float(scale[3]);
        }
        x[b * (SLAB / 4) + place] = part;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int c = start; c < end; c += STEP) {
      weights.multiply(x + (c - start) / 4, SLAB / 4, lane, products);
      if (c + STEP < K) {
        weights.read(rows, row, c + STEP, K, lane);
      }
    }
  }
}
