// Tiles of keys and values for head_attention_prefill.

// A maximum is not raised before a score is 2^GROWTH above it: weights stay far inside half's
// range, and what is summed seldom has to be scaled again.
constant constexpr float GROWTH = 8;

// With it HIDDEN / factor is a number.
constant constexpr float SMALLEST_FACTOR = 1e-8f;

template <int BITS>
struct bits_of {};

// KEYS rows from `start` on, as T, by all threads of a threadgroup; past `end` the last row again.
// They are there after wait_for_copies and a barrier.
template <
    typename T, int D, int KEYS, int STRIDE, int THREADS, int GROUP, bool WIDE, typename Keys,
    typename Values>
METAL_FUNC void fill_tiles(
    bits_of<0>,
    threadgroup T* key_tile,
    threadgroup T* value_tile,
    const thread Keys& keys,
    const thread Values& values,
    int start,
    int end,
    int index) {
  constexpr int N = 16 / int(sizeof(T));
  constexpr int ACROSS = D / N;
  constexpr int PIECES = KEYS * ACROSS;
  // A thread's pieces are one above the other.
  constexpr int DOWN = THREADS / ACROSS;
  if (WIDE && THREADS % ACROSS == 0 && PIECES % THREADS == 0 && start + KEYS <= end) {
    const int row = index / ACROSS;
    const int first = index % ACROSS * N;
    const auto key = keys.words + (start + row) * keys.stride + first;
    const auto value = values.words + (start + row) * values.stride + first;
#pragma unroll
    for (short u = 0; u < KEYS * ACROSS / THREADS; u++) {
      const int place = (row + u * DOWN) * STRIDE + first;
      copy_run<N>(key_tile + place, key + u * (DOWN * keys.stride));
      copy_run<N>(value_tile + place, value + u * (DOWN * values.stride));
    }
    return;
  }
#pragma unroll 1
  for (int p = index; p < PIECES; p += THREADS) {
    const long row = metal::min(start + p / (D / N), end - 1);
    const int first = p % (D / N) * N;
    const int place = p / (D / N) * STRIDE + first;
    if (WIDE) {
      copy_run<N>(key_tile + place, keys.words + row * keys.stride + first);
      copy_run<N>(value_tile + place, values.words + row * values.stride + first);
    } else {
      for (short i = 0; i < N; i++) {
        key_tile[place + i] = keys.words[row * keys.stride + (first + i) * keys.step];
        value_tile[place + i] = values.words[row * values.stride + (first + i) * values.step];
      }
    }
  }
}

template <
    typename T, int D, int KEYS, int STRIDE, int THREADS, int GROUP, bool WIDE, int BITS,
    typename Keys, typename Values>
METAL_FUNC void fill_tiles(
    bits_of<BITS>,
    threadgroup T* key_tile,
    threadgroup T* value_tile,
    const thread Keys& keys,
    const thread Values& values,
    int start,
    int end,
    int index) {
  constexpr int N = 8;
  constexpr int PIECES = KEYS * D / N;
  constexpr int EACH = (PIECES + THREADS - 1) / THREADS;
  constexpr int AT_ONCE = EACH < 2 ? EACH : 2;
  for (int base = index; base < PIECES; base += AT_ONCE * THREADS) {
    piece<T, N, BITS, GROUP, WIDE> k[AT_ONCE];
    piece<T, N, BITS, GROUP, WIDE> v[AT_ONCE];
#pragma unroll
    for (short u = 0; u < AT_ONCE; u++) {
      const int p = metal::min(base + u * THREADS, PIECES - 1);
      const int row = metal::min(start + p / (D / N), end - 1);
      k[u].read(keys, row, p % (D / N) * N);
      v[u].read(values, row, p % (D / N) * N);
    }
#pragma unroll
    for (short u = 0; u < AT_ONCE; u++) {
      const int p = base + u * THREADS;
      if (p < PIECES) {
        const int place = p / (D / N) * STRIDE + p % (D / N) * N;
        T e[N];
        for (short i = 0; i < N; i++) {
          e[i] = T(k[u].at(i));
        }
        write_run<N>(key_tile + place, e);
        for (short i = 0; i < N; i++) {
          e[i] = T(v[u].at(i));
        }
        write_run<N>(value_tile + place, e);
      }
    }
  }
}
