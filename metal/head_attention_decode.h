// A few rows of queries against a range of keys: the part of head_attention_decode that is run by
// every SIMD-group on its own.

// What a lane holds: E elements of each of ROWS queries and outputs. LANES = D / E lanes share a
// key; m and l are the maximum and the sum over the keys that they have seen.
template <int ROWS, int E>
struct decode_rows {
  float q[ROWS][E];
  float o[ROWS][E];
  float m[ROWS];
  float l[ROWS];
  int last[ROWS];
  long mask[ROWS];
};

// The keys of [begin, end) that fall to this lane, AT_ONCE in each step of all SIMD-groups.
template <
    typename T, int D, int ROWS, int E, int N, int BITS, int GROUP, int AT_ONCE, bool WIDE,
    bool MASKED, typename Keys, typename Values, typename Mask>
METAL_FUNC void attend_range(
    thread decode_rows<ROWS, E>& rows,
    const thread Keys& keys,
    const thread Values& values,
    Mask mask,
    long mask_step,
    int begin,
    int end,
    int simdgroups,
    int simdgroup,
    int lane) {
  constexpr int LANES = D / E;
  const int stride = simdgroups * (32 / LANES);
  const int first = (lane % LANES) * N;

  for (int start = begin; start < end; start += AT_ONCE * stride) {
    const int own = start + simdgroup * (32 / LANES) + lane / LANES;
    piece<T, N, BITS, GROUP, WIDE> k[AT_ONCE][E / N];
    piece<T, N, BITS, GROUP, WIDE> v[AT_ONCE][E / N];
    for (short u = 0; u < AT_ONCE; u++) {
      const long row = metal::min(own + u * stride, end - 1);
      for (short j = 0; j < E / N; j++) {
        k[u][j].read(keys, row, first + j * LANES * N);
      }
    }
    for (short u = 0; u < AT_ONCE; u++) {
      const long row = metal::min(own + u * stride, end - 1);
      for (short j = 0; j < E / N; j++) {
        v[u][j].read(values, row, first + j * LANES * N);
      }
    }

    float p[AT_ONCE][ROWS];
    for (short u = 0; u < AT_ONCE; u++) {
      for (short r = 0; r < ROWS; r++) {
        p[u][r] = 0;
      }
      for (short j = 0; j < E / N; j++) {
        for (short i = 0; i < N; i++) {
          const float x = k[u][j].at(i);
          for (short r = 0; r < ROWS; r++) {
            p[u][r] = metal::fma(rows.q[r][j * N + i], x, p[u][r]);
          }
        }
      }
      const int key = own + u * stride;
      for (short r = 0; r < ROWS; r++) {
        for (short apart = 1; apart < LANES; apart *= 2) {
          p[u][r] += simd_shuffle_xor(p[u][r], ushort(apart));
        }
        bool seen = key < end;
        if (MASKED) {
          seen = seen && float(mask[rows.mask[r] + metal::min(key, end - 1) * mask_step]) != 0;
        } else {
          seen = seen && key <= rows.last[r];
        }
        p[u][r] = seen ? p[u][r] : HIDDEN;
      }
    }

    for (short r = 0; r < ROWS; r++) {
      float m = rows.m[r];
      for (short u = 0; u < AT_ONCE; u++) {
        m = metal::max(m, p[u][r]);
      }
      const float kept = power_of_two(rows.m[r] - m);
      rows.m[r] = m;
      rows.l[r] *= kept;
      for (short e = 0; e < E; e++) {
        rows.o[r][e] *= kept;
      }
      for (short u = 0; u < AT_ONCE; u++) {
        p[u][r] = power_of_two(p[u][r] - m);
        rows.l[r] += p[u][r];
      }
    }
    for (short u = 0; u < AT_ONCE; u++) {
      for (short j = 0; j < E / N; j++) {
        for (short i = 0; i < N; i++) {
          const float x = v[u][j].at(i);
          for (short r = 0; r < ROWS; r++) {
            rows.o[r][j * N + i] = metal::fma(p[u][r], x, rows.o[r][j * N + i]);
          }
        }
      }
    }
  }
}
