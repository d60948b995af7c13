// 16 x 16 tiles, one a SIMD-group, eight elements a lane.
//
// Element i of a tile stands at (tile_row(lane, i), tile_col(lane, i)), of a right_tile at
// (right_row(lane, i), right_col(lane, i)). Where lanes keep which element is the machine's own:
// here that of Apple's 8 x 8 simdgroup matrices, in compat/tile.h that of the tensor cores. A
// kernel asks these functions and knows neither. Elements 2j and 2j + 1 always stand side by side:
// in one row of a tile, in one column of a right_tile's transpose.

#ifndef MLX_HYDRA_CUDA

// Accumulators (float) and left operands.
template <typename T>
struct tile {
  T e[8];
};

// Right operands.
template <typename T>
struct right_tile {
  T e[8];
};

METAL_FUNC short tile_row(short lane, short i) {
  return ((lane >> 2) & 4) + ((lane >> 1) & 3) + 8 * ((i >> 1) & 1);
}

METAL_FUNC short tile_col(short lane, short i) {
  return ((lane >> 1) & 4) + 2 * (lane & 1) + (i & 1) + 8 * (i >> 2);
}

// Elements side by side, as e[0] and e[1].
template <typename T>
METAL_FUNC void set_pair(thread T* e, T x, T y) {
  e[0] = x;
  e[1] = y;
}

METAL_FUNC short right_row(short lane, short i) {
  return tile_row(lane, i);
}

METAL_FUNC short right_col(short lane, short i) {
  return tile_col(lane, i);
}

// The largest and the sum of a value over the lanes that share a row of a tile.
METAL_FUNC float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// c += a b. Operands go to the matrix units as float, as MLX's own kernels do: exact, and no
// slower there.
template <typename T>
METAL_FUNC void multiply_add(
    thread tile<float>& c, const thread tile<T>& a, const thread right_tile<T>& b) {
  simdgroup_float8x8 A[4], B[4];
#pragma unroll
  for (short p = 0; p < 4; p++) {
    A[p].thread_elements()[0] = float(a.e[2 * p]);
    A[p].thread_elements()[1] = float(a.e[2 * p + 1]);
    B[p].thread_elements()[0] = float(b.e[2 * p]);
    B[p].thread_elements()[1] = float(b.e[2 * p + 1]);
  }
#pragma unroll
  for (short p = 0; p < 4; p++) {
    simdgroup_float8x8 C;
    C.thread_elements()[0] = c.e[2 * p];
    C.thread_elements()[1] = c.e[2 * p + 1];
    const short row = p & 1, column = p & 2;
    simdgroup_multiply_accumulate(C, A[row], B[column], C);
    simdgroup_multiply_accumulate(C, A[row + 2], B[column + 1], C);
    c.e[2 * p] = C.thread_elements()[0];
    c.e[2 * p + 1] = C.thread_elements()[1];
  }
}

#endif

METAL_FUNC void clear(thread tile<float>& t) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = 0;
  }
}

METAL_FUNC void negate(thread tile<float>& t) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = -t.e[i];
  }
}

// t[r, c] = source[r * stride + c]
template <typename T, typename Source>
METAL_FUNC void load(thread tile<T>& t, Source source, int stride, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = T(source[tile_row(lane, i) * stride + tile_col(lane, i)]);
  }
}

template <typename T, typename Source>
METAL_FUNC void load(thread right_tile<T>& t, Source source, int stride, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = T(source[right_row(lane, i) * stride + right_col(lane, i)]);
  }
}

// t[r, c] = source[c * stride + r]
template <typename T, typename Source>
METAL_FUNC void load_transposed(thread tile<T>& t, Source source, int stride, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = T(source[tile_col(lane, i) * stride + tile_row(lane, i)]);
  }
}

template <typename T, typename Source>
METAL_FUNC void load_transposed(thread right_tile<T>& t, Source source, int stride, short lane) {
  for (short i = 0; i < 8; i++) {
    t.e[i] = T(source[right_col(lane, i) * stride + right_row(lane, i)]);
  }
}

// target[r * stride + c] = t[r, c]
template <typename T, typename U>
METAL_FUNC void store(const thread tile<T>& t, threadgroup U* target, int stride, short lane) {
  for (short i = 0; i < 8; i++) {
    target[tile_row(lane, i) * stride + tile_col(lane, i)] = U(t.e[i]);
  }
}

METAL_FUNC void store_device(
    const thread tile<float>& t, device float* target, int stride, short lane) {
  for (short i = 0; i < 8; i++) {
    target[tile_row(lane, i) * stride + tile_col(lane, i)] = t.e[i];
  }
}

// An accumulator as a left operand.
template <typename T>
METAL_FUNC tile<T> as_operand(const thread tile<float>& t) {
  tile<T> operand;
  for (short i = 0; i < 8; i++) {
    operand.e[i] = T(t.e[i]);
  }
  return operand;
}

// Right operands from threadgroup memory whose rows start at multiples of 16 bytes: b[r, c] =
// source[r * stride + c], and transposed b[r, c] = source[c * stride + r].
template <typename T>
METAL_FUNC void load_aligned(
    thread right_tile<T>& b, const threadgroup T* source, int stride, short lane) {
  load(b, source, stride, lane);
}

template <typename T>
METAL_FUNC void load_transposed_aligned(
    thread right_tile<T>& b, const threadgroup T* source, int stride, short lane) {
  load_transposed(b, source, stride, lane);
}

#ifdef MLX_HYDRA_CUDA

METAL_FUNC void load_aligned(right_tile<half>& b, const half* source, int stride, short lane) {
  right_tile_by_ldmatrix(b, source, stride, lane);
}

METAL_FUNC void load_aligned(right_tile<bfloat>& b, const bfloat* source, int stride, short lane) {
  right_tile_by_ldmatrix(b, source, stride, lane);
}

METAL_FUNC void load_transposed_aligned(
    right_tile<half>& b, const half* source, int stride, short lane) {
  transposed_right_tile_by_ldmatrix(b, source, stride, lane);
}

METAL_FUNC void load_transposed_aligned(
    right_tile<bfloat>& b, const bfloat* source, int stride, short lane) {
  transposed_right_tile_by_ldmatrix(b, source, stride, lane);
}

#endif
