// What the kernels of the gated delta rule share.

// Tokens that gated_delta_chunk takes at once: the side of a tile.
constant constexpr short TOKENS = 16;

// One 16 x 16 matrix in threadgroup memory, its rows padded against bank conflicts; a second one
// behind it starts half a set of banks later.
constant constexpr short SQUARE_ROW = 20;
constant constexpr short SQUARE = TOKENS * SQUARE_ROW + TOKENS;

// wide_tile: a float accumulator as a left operand beside right operands of T, without loss of its
// digits. Apple's matrix units take float beside T; tensor cores take T, so there it is a sum of
// two T (16 bits with bfloat; 22 with half, whose range it must not leave).
//
// multiply_add_floats: the product of two float operands in a kernel for T. Where T is bfloat,
// tensor cores take both as sums of two, which costs less there than TF32.
//
// piece_at: 16 bytes of device memory.

#ifndef MLX_HYDRA_CUDA

template <typename T>
struct wide_tile {
  tile<float> whole;
};

template <typename T>
METAL_FUNC wide_tile<T> as_wide(const thread tile<float>& t) {
  wide_tile<T> wide;
  wide.whole = t;
  return wide;
}

template <typename T>
METAL_FUNC void multiply_add(
    thread tile<float>& c, const thread wide_tile<T>& a, const thread right_tile<T>& b) {
  right_tile<float> right;
  for (short i = 0; i < 8; i++) {
    right.e[i] = float(b.e[i]);
  }
  multiply_add(c, a.whole, right);
}

template <typename T>
METAL_FUNC void multiply_add_floats(
    thread tile<float>& c, const thread tile<float>& a, const thread right_tile<float>& b) {
  multiply_add(c, a, b);
}

template <typename T>
METAL_FUNC uint4 piece_at(const device T* source) {
  return *reinterpret_cast<const device uint4*>(source);
}

#else

// Two elements of T in each word.
template <typename T>
struct wide_tile {
  unsigned int high[4], rest[4];
};

template <>
struct wide_tile<float> {
  tile<float> whole;
};

METAL_FUNC void split_pair(float x, float y, unsigned int& high, unsigned int& rest, bfloat) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
  memcpy(&high, &rounded, 4);
  const __nv_bfloat162 left = __floats2bfloat162_rn(
      x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
  memcpy(&rest, &left, 4);
}

METAL_FUNC void split_pair(float x, float y, unsigned int& high, unsigned int& rest, half) {
  const __half2 rounded = __floats2half2_rn(x, y);
  memcpy(&high, &rounded, 4);
  const float2 wide = __half22float2(rounded);
  const __half2 left = __floats2half2_rn(x - wide.x, y - wide.y);
  memcpy(&rest, &left, 4);
}

template <typename T>
METAL_FUNC void split(const float* e, unsigned int* high, unsigned int* rest) {
  for (int p = 0; p < 4; p++) {
    split_pair(e[2 * p], e[2 * p + 1], high[p], rest[p], T());
  }
}

template <typename T>
METAL_FUNC void widen(const tile<float>& t, wide_tile<T>& wide) {
  split<T>(t.e, wide.high, wide.rest);
}

METAL_FUNC void widen(const tile<float>& t, wide_tile<float>& wide) {
  wide.whole = t;
}

template <typename T>
METAL_FUNC wide_tile<T> as_wide(const tile<float>& t) {
  wide_tile<T> wide;
  widen(t, wide);
  return wide;
}

template <typename T>
METAL_FUNC void multiply_add(tile<float>& c, const wide_tile<T>& a, const right_tile<T>& b) {
  unsigned int right[4];
  for (int p = 0; p < 4; p++) {
    right[p] = pair_bits(b.e[2 * p], b.e[2 * p + 1]);
  }
  for (int n = 0; n < 2; n++) {
    mma_16(c.e + 4 * n, a.rest, right + 2 * n, T());
    mma_16(c.e + 4 * n, a.high, right + 2 * n, T());
  }
}

METAL_FUNC void multiply_add(
    tile<float>& c, const wide_tile<float>& a, const right_tile<float>& b) {
  multiply_add(c, a.whole, b);
}

template <typename T>
METAL_FUNC void multiply_add_floats(
    tile<float>& c, const tile<float>& a, const right_tile<float>& b) {
  multiply_add(c, a, b);
}

template <>
METAL_FUNC void multiply_add_floats<bfloat>(
    tile<float>& c, const tile<float>& a, const right_tile<float>& b) {
  unsigned int left[4], left_rest[4], right[4], right_rest[4];
  split<bfloat>(a.e, left, left_rest);
  split<bfloat>(b.e, right, right_rest);
  for (int n = 0; n < 2; n++) {
    mma_16(c.e + 4 * n, left_rest, right + 2 * n, bfloat());
    mma_16(c.e + 4 * n, left, right_rest + 2 * n, bfloat());
    mma_16(c.e + 4 * n, left, right + 2 * n, bfloat());
  }
}

template <typename T>
METAL_FUNC uint4 piece_at(const T* source) {
  uint4 piece;
  if (starts_at_multiple_of(16, source)) {
    piece = *reinterpret_cast<const uint4*>(source);
  } else {
    memcpy(&piece, source, sizeof(T));
    for (int i = 1; i < 16 / sizeof(T); i++) {
      memcpy(reinterpret_cast<T*>(&piece) + i, source + i, sizeof(T));
    }
  }
  return piece;
}

#endif

// Where a matrix of 16 x 16 lies in device memory as a right_tile: each lane's elements in two runs
// of four, so that lanes side by side read what stands side by side.
METAL_FUNC short place_in_order(short lane, short i) {
  return i / 4 * 128 + 4 * lane + i % 4;
}

METAL_FUNC void load_in_order(thread right_tile<float>& t, const device float* source, short lane) {
  for (short run = 0; run < 2; run++) {
    const float4 four = reinterpret_cast<const device float4*>(source)[32 * run + lane];
    t.e[4 * run] = four.x;
    t.e[4 * run + 1] = four.y;
    t.e[4 * run + 2] = four.z;
    t.e[4 * run + 3] = four.w;
  }
}
