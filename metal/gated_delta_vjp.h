// What the four kernels of the gated delta rule's backward pass share; see gated_delta_vjp.metal.

constant constexpr short CHUNK = 64;

// A loop whose loads shall all be on their way at once, where a thread may have registers for it.
#ifdef MLX_HYDRA_CUDA
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED
#endif

// Threadgroup memory is laid out in rows a little longer than needed, against bank conflicts.
constant constexpr short MATRIX_ROW = CHUNK + 4;
constant constexpr short COLUMN_ROW = 20;

// The rows of `gates`, one float a token. Masked tokens and those past the end are not kept: they
// decay by 1 and update by 0.
constant constexpr short DECAY = 0;
constant constexpr short RATE = CHUNK;
constant constexpr short FROM_START = 2 * CHUNK;
constant constexpr short TO_END = 3 * CHUNK;
constant constexpr short KEPT = 4 * CHUNK;
constant constexpr short GATES = 5 * CHUNK;

// Tiles whose rows (or, transposed, columns) are tokens: those not kept are zeros, and not read.
template <typename T, typename Source>
METAL_FUNC void load_tokens(
    thread tile<T>& t,
    const device Source* source,
    int stride,
    const threadgroup float* kept,
    short lane) {
  for (short i = 0; i < 8; i++) {
    const short row = tile_row(lane, i);
    t.e[i] = kept[row] != 0 ? T(source[row * stride + tile_col(lane, i)]) : T(0.0f);
  }
}

template <typename T, typename Source>
METAL_FUNC void load_tokens(
    thread right_tile<T>& t,
    const device Source* source,
    int stride,
    const threadgroup float* kept,
    short lane) {
  for (short i = 0; i < 8; i++) {
    const short row = right_row(lane, i);
    t.e[i] = kept[row] != 0 ? T(source[row * stride + right_col(lane, i)]) : T(0.0f);
  }
}

template <typename T, typename Source>
METAL_FUNC void load_tokens_transposed(
    thread tile<T>& t,
    const device Source* source,
    int stride,
    const threadgroup float* kept,
    short lane) {
  for (short i = 0; i < 8; i++) {
    const short row = tile_col(lane, i);
    t.e[i] = kept[row] != 0 ? T(source[row * stride + tile_row(lane, i)]) : T(0.0f);
  }
}

template <typename T, typename Source>
METAL_FUNC void load_tokens_transposed(
    thread right_tile<T>& t,
    const device Source* source,
    int stride,
    const threadgroup float* kept,
    short lane) {
  for (short i = 0; i < 8; i++) {
    const short row = right_col(lane, i);
    t.e[i] = kept[row] != 0 ? T(source[row * stride + right_row(lane, i)]) : T(0.0f);
  }
}

// Keep what is on or below the diagonal, or on or above it.
METAL_FUNC void clear_upper(thread tile<float>& t, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = tile_row(lane, i) >= tile_col(lane, i) ? t.e[i] : 0.0f;
  }
}

METAL_FUNC void clear_lower(thread tile<float>& t, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = tile_row(lane, i) <= tile_col(lane, i) ? t.e[i] : 0.0f;
  }
}

METAL_FUNC void scale_rows(thread tile<float>& t, const threadgroup float* factors, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] *= factors[tile_row(lane, i)];
  }
}

METAL_FUNC void
scale_rows(thread right_tile<float>& t, const threadgroup float* factors, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] *= factors[right_row(lane, i)];
  }
}

// sums[row] += the products of two tiles' entries, summed over each row. A lane's eight elements
// stand in two rows.
METAL_FUNC void add_row_products(
    threadgroup float* sums, const thread tile<float>& a, const thread tile<float>& b, short lane) {
  const short first = tile_row(lane, 0);
  float here = 0, there = 0;
  short second = first;
  for (short i = 0; i < 8; i++) {
    const float product = a.e[i] * b.e[i];
    if (tile_row(lane, i) == first) {
      here += product;
    } else {
      there += product;
      second = tile_row(lane, i);
    }
  }
  here = row_sum(here);
  there = row_sum(there);
  if (tile_col(lane, 0) == 0) {
    sums[first] += here;
    sums[second] += there;
  }
}

// Where block `number` stands of the ten on or below the diagonal of a 4 x 4 grid, row by row.
METAL_FUNC short block_row(short number) {
  return (number >= 1) + (number >= 3) + (number >= 6);
}

METAL_FUNC short block_column(short number) {
  const short row = block_row(number);
  return number - row * (row + 1) / 2;
}
