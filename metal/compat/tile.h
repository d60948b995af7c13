// Tiles, in the layout of mma.sync: m16n8k16 for half and bfloat, and for float m16n8k8 in TF32,
// three products each, which keeps float's digits. See tile.h for what these functions mean.

template <typename T>
struct tile {
  T e[8];
};

template <typename T>
struct right_tile {
  T e[8];
};

METAL_FUNC short tile_row(short lane, short i) {
  return lane / 4 + 8 * ((i >> 1) & 1);
}

METAL_FUNC short tile_col(short lane, short i) {
  return 2 * (lane % 4) + (i & 1) + 8 * (i >> 2);
}

METAL_FUNC short right_row(short lane, short i) {
  return 2 * (lane % 4) + (i & 1) + 8 * ((i >> 1) & 1);
}

METAL_FUNC short right_col(short lane, short i) {
  return lane / 4 + 8 * (i >> 2);
}

METAL_FUNC float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

METAL_FUNC float row_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

METAL_FUNC void mma_16(float* c, const unsigned int* a, const unsigned int* b, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

METAL_FUNC void mma_16(float* c, const unsigned int* a, const unsigned int* b, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

METAL_FUNC void mma_tf32(float* c, const unsigned int* a, const unsigned int* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Cut, not rounded: two instructions, and what is cut off a number is the second term's to keep.
METAL_FUNC unsigned int to_tf32(float x) {
  return __float_as_uint(x) & 0xffffe000u;
}

template <typename T>
METAL_FUNC unsigned int pair_bits(T x, T y) {
  const T both[2] = {x, y};
  unsigned int bits;
  memcpy(&bits, both, sizeof(bits));
  return bits;
}

// As one word: the compiler keeps the halves of pairs that are written singly in registers each.
template <typename T>
METAL_FUNC void set_pair(T* e, T x, T y) {
  const unsigned int bits = pair_bits(x, y);
  memcpy(e, &bits, sizeof(bits));
}

METAL_FUNC void set_pair(float* e, float x, float y) {
  e[0] = x;
  e[1] = y;
}

template <typename T>
METAL_FUNC void multiply_add(tile<float>& c, const tile<T>& a, const right_tile<T>& b) {
  unsigned int left[4], right[4];
  for (int p = 0; p < 4; p++) {
    left[p] = pair_bits(a.e[2 * p], a.e[2 * p + 1]);
    right[p] = pair_bits(b.e[2 * p], b.e[2 * p + 1]);
  }
  mma_16(c.e, left, right, T());
  mma_16(c.e + 4, left, right + 2, T());
}

// A pair of columns is dealt to places t and t + 4 of the instruction's eight, of both operands
// alike, so that elements stay where the 16-bit layout has them.
METAL_FUNC void multiply_add(
    tile<float>& c, const tile<float>& a, const right_tile<float>& b) {
  unsigned int left[8], left_rest[8], right[8], right_rest[8];
  for (int i = 0; i < 8; i++) {
    left[i] = to_tf32(a.e[i]);
    left_rest[i] = to_tf32(a.e[i] - __uint_as_float(left[i]));
    right[i] = to_tf32(b.e[i]);
    right_rest[i] = to_tf32(b.e[i] - __uint_as_float(right[i]));
  }
  for (int step = 0; step < 2; step++) {
    const int s = 4 * step;
    const unsigned int A[4] = {left[s], left[s + 2], left[s + 1], left[s + 3]};
    const unsigned int A_rest[4] = {
        left_rest[s], left_rest[s + 2], left_rest[s + 1], left_rest[s + 3]};
    for (int n = 0; n < 2; n++) {
      const int j = 4 * n + 2 * step;
      mma_tf32(c.e + 4 * n, A_rest, right + j);
      mma_tf32(c.e + 4 * n, A, right_rest + j);
      mma_tf32(c.e + 4 * n, A, right + j);
    }
  }
}

// tile.h's loads of threadgroup memory where rows start at multiples of 16 bytes, by ldmatrix.

METAL_FUNC void ldmatrix(unsigned int* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((unsigned int)__cvta_generic_to_shared(row))
               : "memory");
}

METAL_FUNC void ldmatrix_transposed(unsigned int* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((unsigned int)__cvta_generic_to_shared(row))
               : "memory");
}

template <typename T>
METAL_FUNC void split_pairs(T* e, const unsigned int* r) {
  memcpy(e, r, 4 * sizeof(unsigned int));
}

template <typename T>
METAL_FUNC void right_tile_by_ldmatrix(
    right_tile<T>& t, const T* source, int stride, short lane) {
  unsigned int r[4];
  ldmatrix_transposed(r, source + (lane & 15) * stride + 8 * (lane >> 4));
  split_pairs(t.e, r);
}

template <typename T>
METAL_FUNC void transposed_right_tile_by_ldmatrix(
    right_tile<T>& t, const T* source, int stride, short lane) {
  unsigned int r[4];
  ldmatrix(r, source + ((lane & 7) + 8 * (lane >> 4)) * stride + (lane & 8));
  split_pairs(t.e, r);
}
