// What the kernels that take a head through several tokens share: reads, sums and turns.

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
