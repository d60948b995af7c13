// A lane's channels of a row, read and written in the widest pieces, and fast activations.

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

// 1 / (1 + e^-x), of a power and a quotient that are an instruction each.
METAL_FUNC float fast_sigmoid(float x) {
  return metal::fast::divide(1.0f, 1.0f + power_of_two(metal::min(-LOG2_E * x, 126.0f)));
}

// x sigmoid(x), likewise.
METAL_FUNC float fast_silu(float x) {
  return metal::fast::divide(x, 1.0f + power_of_two(metal::min(-LOG2_E * x, 126.0f)));
}
