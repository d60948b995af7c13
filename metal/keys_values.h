// Keys and values, plain or packed, and what the kernels of softmax attention share.

// Scores are held in powers of two. One that may not be seen is HIDDEN, and no maximum is below
// LOWEST: 2^(HIDDEN - maximum) is zero even for a row that sees nothing.
constant constexpr float LOG2_E = 1.4426950408889634f;
constant constexpr float HIDDEN = -1e30f;
constant constexpr float LOWEST = -1e29f;

// One row a token: words of T, or of packed integers with a scale and a bias a group.
template <typename Words, typename Scales>
struct token_rows {
  Words words;
  Scales scales;
  Scales biases;
  long stride, step;
  long scale_stride, scale_step;
  long bias_stride, bias_step;
};

template <typename Words, typename Scales>
METAL_FUNC token_rows<Words, Scales> rows_of(
    Words words,
    Scales scales,
    Scales biases,
    long stride,
    long step,
    long scale_stride,
    long scale_step,
    long bias_stride,
    long bias_step) {
  token_rows<Words, Scales> rows;
  rows.words = words;
  rows.scales = scales;
  rows.biases = biases;
  rows.stride = stride;
  rows.step = step;
  rows.scale_stride = scale_stride;
  rows.scale_step = scale_step;
  rows.bias_stride = bias_stride;
  rows.bias_step = bias_step;
  return rows;
}

#ifndef MLX_HYDRA_CUDA

METAL_FUNC bool starts_at_multiple_of(int, const device void*) {
  return true;
}

// N elements side by side; see compat/cuda.h for what is read at once there.
template <int N, typename T>
METAL_FUNC void read_run(const device T* source, thread T* e) {
  for (short i = 0; i < N; i++) {
    e[i] = source[i];
  }
}

template <int N, typename T>
METAL_FUNC void write_run(threadgroup T* target, const thread T* e) {
  for (short i = 0; i < N; i++) {
    target[i] = e[i];
  }
}

template <int N, typename T>
METAL_FUNC void write_device_run(device T* target, const thread T* e) {
  for (short i = 0; i < N; i++) {
    target[i] = e[i];
  }
}

template <int N, typename T>
METAL_FUNC void copy_run(threadgroup T* target, const device T* source) {
  for (short i = 0; i < N; i++) {
    target[i] = source[i];
  }
}

METAL_FUNC void wait_for_copies() {}

METAL_FUNC float power_of_two(float x) {
  return metal::fast::exp2(x);
}

#endif

// N elements of a row, as they lie in memory; WIDE where they lie side by side, aligned.
template <typename T, int N, int BITS, int GROUP, bool WIDE>
struct piece {
  uint words[N * BITS / 32];
  float scale, bias;

  template <typename Rows>
  METAL_FUNC void read(const thread Rows& rows, long row, int first) thread {
    const long word = row * rows.stride + first * BITS / 32 * rows.step;
    if (WIDE) {
      read_run<N * BITS / 32>(rows.words + word, words);
    } else {
      for (short i = 0; i < N * BITS / 32; i++) {
        words[i] = rows.words[word + i * rows.step];
      }
    }
    const int group = first / GROUP;
    scale = float(rows.scales[row * rows.scale_stride + group * rows.scale_step]);
    bias = float(rows.biases[row * rows.bias_stride + group * rows.bias_step]);
  }

  METAL_FUNC float at(short i) const thread {
    const uint q = (words[i * BITS / 32] >> (i * BITS % 32)) & ((1u << BITS) - 1);
    return metal::fma(scale, float(q), bias);
  }
};

template <typename T, int N, int GROUP, bool WIDE>
struct piece<T, N, 0, GROUP, WIDE> {
  T e[N];

  template <typename Rows>
  METAL_FUNC void read(const thread Rows& rows, long row, int first) thread {
    const long start = row * rows.stride + first * rows.step;
    if (WIDE) {
      read_run<N>(rows.words + start, e);
    } else {
      for (short i = 0; i < N; i++) {
        e[i] = rows.words[start + i * rows.step];
      }
    }
  }

  METAL_FUNC float at(short i) const thread {
    return float(e[i]);
  }
};

// Whether every piece of these rows lies side by side and starts where a piece may.
template <int BYTES, typename Rows>
METAL_FUNC bool lie_side_by_side(const thread Rows& rows) {
  return rows.step == 1 && starts_at_multiple_of(BYTES, rows.words) &&
      starts_at_multiple_of(BYTES, rows.words + rows.stride);
}
