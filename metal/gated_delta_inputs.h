// Reads, writes and activation of gated_delta_inputs.

// The widest pieces that N elements can be cut into. One element of 2 bytes is none.
template <int N, typename T>
struct pieces {
  static constant constexpr int RUN = N * sizeof(T);
  static constant constexpr int BYTES = RUN % 16 == 0 ? 16 : RUN % 8 == 0 ? 8 : 4;
  static constant constexpr int COUNT = BYTES / sizeof(T);
};

// Whether runs of N elements may be read and written in pieces, where p starts one of them.
template <int N, typename T>
METAL_FUNC bool may_be_wide(const device T* p) {
  return N % pieces<N, T>::COUNT == 0 && starts_at_multiple_of(pieces<N, T>::BYTES, p);
}

template <int N, typename T>
METAL_FUNC void read_channels(const device T* source, long apart, bool wide, thread T* e) {
  constexpr int COUNT = pieces<N, T>::COUNT;
  if (wide) {
    for (short i = 0; i + COUNT <= N; i += COUNT) {
      read_run<COUNT>(source + i, e + i);
    }
  } else {
    for (short i = 0; i < N; i++) {
      e[i] = source[i * apart];
    }
  }
}

// A lane's RUNS runs of M channels, `run` elements apart, of ROWS tokens, of which those from
// `rows` on are the last one again.
template <int ROWS, int RUNS, int M, typename T>
METAL_FUNC void read_tokens(
    const device T* source,
    long row,
    int rows,
    long run,
    long apart,
    bool wide,
    thread T (&e)[ROWS][RUNS * M]) {
  constexpr int COUNT = pieces<M, T>::COUNT;
  // Asked once, so that all reads are on their way before one has to have arrived.
  if (wide) {
#pragma unroll
    for (short u = 0; u < ROWS; u++) {
      for (short i = 0; i + COUNT <= M; i += COUNT) {
        for (short r = 0; r < RUNS; r++) {
          read_run<COUNT>(source + r * run + i, e[u] + r * M + i);
        }
      }
      source += u + 1 < rows ? row : 0;
    }
  } else {
#pragma unroll
    for (short u = 0; u < ROWS; u++) {
      for (short i = 0; i < RUNS * M; i++) {
        e[u][i] = source[i / M * run + i % M * apart];
      }
      source += u + 1 < rows ? row : 0;
    }
  }
}

// To an output, which starts where it was allocated: at a multiple of any piece's size.
template <int N, typename T>
METAL_FUNC void write_channels(device T* target, const thread T* e) {
#ifdef MLX_HYDRA_CUDA
  constexpr int COUNT = pieces<N, T>::COUNT;
  if (N % COUNT == 0) {
    for (short i = 0; i + COUNT <= N; i += COUNT) {
      write_run<COUNT>(target + i, e + i);
    }
    return;
  }
#endif
  for (short i = 0; i < N; i++) {
    target[i] = e[i];
  }
}

// Sums over a SIMD-group of COUNT numbers a lane, of which lane l is given that of number
// l / (32 / COUNT): lanes split the numbers while they add them.
template <int COUNT>
METAL_FUNC float sum_of_each(thread float* x, short lane) {
  short mask = 16;
#pragma unroll
  for (short half = COUNT / 2; half > 0; half /= 2) {
    const bool upper = lane & mask;
    for (short i = 0; i < half; i++) {
      const float given = upper ? x[i] : x[half + i];
      x[i] = (upper ? x[half + i] : x[i]) + simd_shuffle_xor(given, ushort(mask));
    }
    mask /= 2;
  }
#pragma unroll
  for (short rest = 16 / COUNT; rest > 0; rest /= 2) {
    x[0] += simd_shuffle_xor(x[0], ushort(rest));
  }
  return x[0];
}

// N numbers, as wide as reads are; they start at a multiple of that.
template <int N>
METAL_FUNC void read_turns(const threadgroup float* source, thread float* e) {
#ifdef MLX_HYDRA_CUDA
  constexpr int COUNT = pieces<N, float>::COUNT;
  for (short i = 0; i < N; i += COUNT) {
    read_run<COUNT>(source + i, e + i);
  }
#else
  for (short i = 0; i < N; i++) {
    e[i] = source[i];
  }
#endif
}

// x sigmoid(x), of a power and a quotient that are an instruction each.
METAL_FUNC float fast_silu(float x) {
  return metal::fast::divide(x, 1.0f + power_of_two(metal::min(-LOG2_E * x, 126.0f)));
}
