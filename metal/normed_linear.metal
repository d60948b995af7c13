// Decode: a residual sum, its RMSNorm, and linear layers of that, for a few rows at once.
//
//   h, update       [ROWS, K]: the sum's parts
//   norm            [K]: RMSNorm's weight
//   weight          [N, K] of X, or BITS a number packed into uint32 [N, K * BITS / 32] with
//   scales, biases  [N, K / GROUP] of X; not read if BITS is 0
//   tail            [M, K] of X: layers that are not packed, after the others; not read unless TAIL
//   eps             float [1]
//   total           [ROWS, K]: h + update
//   y               [ROWS, N + M], M being 0 unless TAIL; or with SWIGLU, which has no tail,
//                   [ROWS, N / 2]: SiLU of the first half of the outputs times the second
//
// In float32 but for the sum, which is rounded to X before its norm. The norm's factor is a row's
// own, and multiplies its outputs.
// Template: X the type of h, update, total and y; W that of norm; ROWS, 1 to 4; BITS of 0, 4, 8;
// GROUP; TAIL, SWIGLU.
// Grid: N / 16 threadgroups, rounded up, and as many of M, of 256 threads: a SIMD-group has 2 rows
// of weights, with SWIGLU one of each half, and reads them once for all ROWS. K is a multiple of
// what a lane reads at once: 16 bytes, packed 16 numbers.
// Threadgroup memory: 16.1 KB. The sum, weighted, lies there by pieces of four: the first of each
// lane, then the second of each, as they are read; of 4096 / ROWS columns at a time.

constexpr int SIMD_GROUPS = 8;
constexpr int EACH = 2;
constexpr int OUTPUTS = SWIGLU ? EACH / 2 : EACH;
constexpr int SLAB = 4096 / (ROWS == 3 ? 4 : ROWS);
// Numbers that a lane reads at once.
constexpr int AT_HAND = BITS == 0 ? 16 / int(sizeof(X)) : 16;
constexpr int BYTES = BITS == 0 ? 16 : AT_HAND * BITS / 8;

threadgroup float4 x[ROWS * SLAB / 4];
threadgroup float parts[ROWS * SIMD_GROUPS];

const int K = h_shape[1];
const int N = weight_shape[0];
const int M = TAIL ? int(tail_shape[0]) : 0;
const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;

// Which outputs are this SIMD-group's, of those of the weights or of the tail. One that has none
// works on the last again.
const int own = SWIGLU ? N / 2 : N;
const int groups = (own + SIMD_GROUPS * OUTPUTS - 1) / (SIMD_GROUPS * OUTPUTS);
const int group = threadgroup_position_in_grid.x;
const bool is_tail = TAIL && group >= groups;
const int count = is_tail ? M : own;
const int first = ((is_tail ? group - groups : group) * SIMD_GROUPS + simd_group) * OUTPUTS;
long row[EACH];
for (short r = 0; r < EACH; r++) {
  row[r] = metal::min(first + r % OUTPUTS, count - 1) + (r < OUTPUTS ? 0 : own);
}
float products[EACH][ROWS];
float squares[ROWS];
for (short b = 0; b < ROWS; b++) {
  squares[b] = 0;
  for (short r = 0; r < EACH; r++) {
    products[r][b] = 0;
  }
}

const bool are_wide = may_be_wide<4>(h) && may_be_wide<4>(update) && may_be_wide<4>(norm);
if (is_tail) {
  const auto rows = rows_of(tail, scales, biases, K, 1, 0, 0, 0, 0);
  if (are_wide && lie_side_by_side<16>(rows)) {
    multiply_rows<0, 1, true, SLAB, 32 * SIMD_GROUPS, AT_HAND>(
        h, update, norm, total, rows, row, x, K, index, false, products, squares);
  } else {
    multiply_rows<0, 1, false, SLAB, 32 * SIMD_GROUPS, AT_HAND>(
        h, update, norm, total, rows, row, x, K, index, false, products, squares);
  }
} else {
  const auto rows = rows_of(
      weight, scales, biases, BITS == 0 ? K : K * BITS / 32, 1, K / GROUP, 1, K / GROUP, 1);
  if (are_wide && lie_side_by_side<BYTES>(rows)) {
    multiply_rows<BITS, GROUP, true, SLAB, 32 * SIMD_GROUPS, AT_HAND>(
        h, update, norm, total, rows, row, x, K, index, group == 0, products, squares);
  } else {
    multiply_rows<BITS, GROUP, false, SLAB, 32 * SIMD_GROUPS, AT_HAND>(
        h, update, norm, total, rows, row, x, K, index, group == 0, products, squares);
  }
}

for (short b = 0; b < ROWS; b++) {
  const float part = simd_sum(squares[b]);
  if (lane == 0) {
    parts[b * SIMD_GROUPS + simd_group] = part;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (short b = 0; b < ROWS; b++) {
  float sum = 0;
  for (short i = 0; i < SIMD_GROUPS; i++) {
    sum += parts[b * SIMD_GROUPS + i];
  }
  const float factor = metal::precise::rsqrt(sum / K + eps[0]);
  for (short r = 0; r < EACH; r++) {
    products[r][b] = factor * simd_sum(products[r][b]);
  }
  for (short r = 0; r < OUTPUTS; r++) {
    float output = products[r][b];
    if (SWIGLU) {
      output = silu(output) * products[EACH - OUTPUTS + r][b];
    }
    if (lane == 0 && first + r < count) {
      y[b * (own + M) + (is_tail ? own : 0) + first + r] = X(output);
    }
  }
}
