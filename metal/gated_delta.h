// What the kernels of the gated delta rule share.

// Tokens that gated_delta_chunk takes at once: the side of a tile.
constant constexpr short TOKENS = 16;

// One 16 x 16 matrix in threadgroup memory, its rows padded against bank conflicts; a second one
// behind it starts half a set of banks later.
constant constexpr short SQUARE_ROW = 20;
constant constexpr short SQUARE = TOKENS * SQUARE_ROW + TOKENS;

// What gated_delta_prepare finds of a chunk, in floats: the inverse, the decays from before it to
// each token and from each to its last, the scores.
constant constexpr short DECAYS = 256;
constant constexpr short SCORES = DECAYS + 2 * TOKENS;
constant constexpr short PREPARED = SCORES + 256;

// Where S is the map from one state to a later one it starts as UNIT times the identity: so the map
// stays within half's range longer when it decays.
constant constexpr float UNIT = 1024;

// wide_tile: a float accumulator as a left operand beside right operands of T, without loss of its
// digits. Apple's matrix units take float beside T; tensor cores take T, so there it is a sum of
// two T (16 bits with bfloat; 22 with half, whose range it must not leave).
//
// multiply_add_floats: the product of two float operands in a kernel for T. Where T is bfloat,
// tensor cores take both as sums of two, which costs less there than TF32.
//
// piece_at: 16 bytes of device memory.
//
// copy_piece: the same into threadgroup memory, or zeros, there after wait_until_copied and a
// barrier. Where COPIES is false, registers are the better way, and nobody calls it. WHOLE: what
// in_pieces says of `source`. copied: where to read floats that have been copied, here or far away.

#ifndef MLX_HYDRA_CUDA

constant constexpr bool COPIES = false;
constant constexpr int MOST_BYTES = 32768;

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

template <typename T>
METAL_FUNC bool in_pieces(const device T*) {
  return true;
}

template <bool WHOLE, typename T>
METAL_FUNC void copy_piece(threadgroup uint4* target, const device T* source, bool kept) {
  uint4 piece = 0;
  if (kept) {
    piece = piece_at(source);
  }
  *target = piece;
}

METAL_FUNC void wait_until_copied() {}

METAL_FUNC const device float* copied(const threadgroup uint4*, const device float* far_away) {
  return far_away;
}

#else

constexpr bool COPIES = true;
constexpr int MOST_BYTES = 49152;

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

template <typename T>
METAL_FUNC bool in_pieces(const T* source) {
  return starts_at_multiple_of(16, source);
}

template <bool WHOLE, typename T>
METAL_FUNC void copy_piece(uint4* target, const T* source, bool kept) {
  if (WHOLE) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((unsigned int)__cvta_generic_to_shared(target)),
                   "l"(source),
                   "r"(kept ? 16 : 0)
                 : "memory");
  } else {
    *target = kept ? piece_at(source) : make_uint4(0, 0, 0, 0);
  }
}

METAL_FUNC void wait_until_copied() {
  wait_for_copies();
}

METAL_FUNC const float* copied(const uint4* at_hand, const float*) {
  return reinterpret_cast<const float*>(at_hand);
}

#endif

// Which piece of rows of ROW_PIECES a thread takes as its i-th. Where the rows divide the threads,
// they are equal steps apart.
template <short ROW_PIECES, short THREADS>
METAL_FUNC short piece_row(short i, short thread_index) {
  return THREADS % ROW_PIECES == 0 ? i * (THREADS / ROW_PIECES) + thread_index / ROW_PIECES
                                   : (i * THREADS + thread_index) / ROW_PIECES;
}

template <short ROW_PIECES, short THREADS>
METAL_FUNC short piece_column(short i, short thread_index) {
  return (THREADS % ROW_PIECES == 0 ? thread_index : i * THREADS + thread_index) % ROW_PIECES;
}

// TOKENS rows into threadgroup memory, ROW pieces apart, those not kept as zeros.
template <typename T, short ROW_PIECES, short ROW, short THREADS, bool WHOLE>
METAL_FUNC void copy_rows(
    threadgroup uint4* target,
    const device T* source,
    int stride,
    const thread bool* kept,
    short thread_index) {
  constexpr short EACH = (TOKENS * ROW_PIECES + THREADS - 1) / THREADS;
#pragma unroll
  for (short i = 0; i < EACH; i++) {
    const short row = piece_row<ROW_PIECES, THREADS>(i, thread_index);
    const short column = piece_column<ROW_PIECES, THREADS>(i, thread_index);
    if (TOKENS * ROW_PIECES % THREADS == 0 || row < TOKENS) {
      copy_piece<WHOLE>(
          target + row * ROW + column, source + row * stride + column * 16 / sizeof(T), kept[i]);
    }
  }
}

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
