// Lets a kernel body written for Metal compile as CUDA, for mx.fast.cuda_kernel (NVRTC).
//
// A SIMD-group is a warp, a threadgroup a block. kernels.py turns `threadgroup T name[...]` into
// `__shared__ T name[...]` and drops the address spaces elsewhere.
#define MLX_HYDRA_CUDA 1

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define METAL_FUNC __device__ __forceinline__

using uint = unsigned int;
using ushort = unsigned short;
using bfloat = __nv_bfloat16;
using bfloat16_t = __nv_bfloat16;
using float16_t = __half;

#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_position_in_threadgroup threadIdx
#define threads_per_threadgroup blockDim
#define thread_index_in_threadgroup \
  ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)
#define thread_index_in_simdgroup (thread_index_in_threadgroup % 32)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup / 32)
#define thread_position_in_grid                  \
  make_uint3(                                    \
      blockIdx.x * blockDim.x + threadIdx.x,     \
      blockIdx.y * blockDim.y + threadIdx.y,     \
      blockIdx.z * blockDim.z + threadIdx.z)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) {
  return b;
}

METAL_FUNC void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

METAL_FUNC void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

constexpr unsigned int ALL_LANES = 0xffffffff;

template <typename T>
METAL_FUNC T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}

template <typename T>
METAL_FUNC T simd_broadcast(T x, ushort lane) {
  return __shfl_sync(ALL_LANES, x, lane);
}

template <typename T>
METAL_FUNC T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(ALL_LANES, x, mask);
}

template <typename T>
METAL_FUNC T simd_shuffle_up(T x, ushort delta) {
  return __shfl_up_sync(ALL_LANES, x, delta);
}

template <typename T>
METAL_FUNC T simd_shuffle_down(T x, ushort delta) {
  return __shfl_down_sync(ALL_LANES, x, delta);
}

METAL_FUNC bool simd_any(bool x) {
  return __any_sync(ALL_LANES, x);
}

template <typename T>
METAL_FUNC T simd_sum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(ALL_LANES, x, mask);
  }
  return x;
}

template <typename T>
METAL_FUNC T simd_max(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    T other = __shfl_xor_sync(ALL_LANES, x, mask);
    x = other > x ? other : x;
  }
  return x;
}

template <typename T>
METAL_FUNC T simd_prefix_inclusive_sum(T x) {
  for (int delta = 1; delta < 32; delta *= 2) {
    T before = __shfl_up_sync(ALL_LANES, x, delta);
    x += thread_index_in_simdgroup >= delta ? before : T(0);
  }
  return x;
}

namespace metal {

// clang-format off
METAL_FUNC float exp(float x) { return ::expf(x); }
METAL_FUNC float exp2(float x) { return ::exp2f(x); }
METAL_FUNC float log(float x) { return ::logf(x); }
METAL_FUNC float log2(float x) { return ::log2f(x); }
METAL_FUNC float sqrt(float x) { return ::sqrtf(x); }
METAL_FUNC float rsqrt(float x) { return ::rsqrtf(x); }
METAL_FUNC float sin(float x) { return ::sinf(x); }
METAL_FUNC float cos(float x) { return ::cosf(x); }
METAL_FUNC float abs(float x) { return ::fabsf(x); }
METAL_FUNC float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
template <typename T> METAL_FUNC T max(T a, T b) { return a > b ? a : b; }
METAL_FUNC float max(float a, float b) { return ::fmaxf(a, b); }
template <typename T> METAL_FUNC T min(T a, T b) { return a < b ? a : b; }
template <typename T> METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
// clang-format on

namespace precise {
using metal::cos;
using metal::exp;
using metal::log;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
} // namespace precise

namespace fast {
METAL_FUNC float exp(float x) {
  return __expf(x);
}
METAL_FUNC float exp2(float x) {
  return ::exp2f(x);
}
METAL_FUNC float log(float x) {
  return __logf(x);
}
} // namespace fast

} // namespace metal

// Pieces of 16 bytes in device memory, for pointers that are multiples of 16 bytes.

template <typename T>
METAL_FUNC bool starts_at_multiple_of(int bytes, const T* p) {
  return reinterpret_cast<unsigned long long>(p) % bytes == 0;
}

template <int BYTES>
struct device_piece;

template <>
struct device_piece<16> {
  using type = uint4;
};

template <>
struct device_piece<8> {
  using type = uint2;
};

template <>
struct device_piece<4> {
  using type = unsigned int;
};

template <int N, typename T>
METAL_FUNC void read_run(const T* source, T* e) {
  constexpr int AT_ONCE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
  using Piece = typename device_piece<AT_ONCE * sizeof(T)>::type;
  for (int i = 0; i < N; i += AT_ONCE) {
    const Piece piece = *reinterpret_cast<const Piece*>(source + i);
    memcpy(e + i, &piece, sizeof(Piece));
  }
}

template <int N, typename T>
METAL_FUNC void write_run(T* target, const T* e) {
  constexpr int AT_ONCE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
  using Piece = typename device_piece<AT_ONCE * sizeof(T)>::type;
  for (int i = 0; i < N; i += AT_ONCE) {
    Piece piece;
    memcpy(&piece, e + i, sizeof(Piece));
    *reinterpret_cast<Piece*>(target + i) = piece;
  }
}

template <int N, typename T>
METAL_FUNC void write_device_run(T* target, const T* e) {
  write_run<N>(target, e);
}

// From device to threadgroup memory, 16 bytes, on its way until wait_for_copies.
template <int N, typename T>
METAL_FUNC void copy_run(T* target, const T* source) {
  static_assert(N * sizeof(T) == 16, "what cp.async takes");
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"((unsigned int)__cvta_generic_to_shared(target)), "l"(source)
               : "memory");
}

METAL_FUNC void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// 2^x in one instruction, zero where it is subnormal.
METAL_FUNC float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

namespace metal {
namespace fast {

// x / y to two units in the last place; zero where y is over 2^126.
METAL_FUNC float divide(float x, float y) {
  return __fdividef(x, y);
}

} // namespace fast
} // namespace metal
