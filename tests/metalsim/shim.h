// Metal's language and standard library, as far as kernels here use them, in C++ for clang.
#pragma once

#include "runtime.h"

#define METALSIM_FN __attribute__((always_inline, nodebug)) inline
#define METALSIM_HERE                                                             \
  const char *ms_file = __builtin_FILE(), unsigned ms_line = __builtin_LINE(),    \
             unsigned ms_column = __builtin_COLUMN()

#ifdef METALSIM_ADDRESS_SPACES
#define METALSIM_DEVICE __attribute__((address_space(1)))
#define METALSIM_CONSTANT __attribute__((address_space(2)))
#define METALSIM_THREADGROUP __attribute__((address_space(3)))
#endif

#define __METAL__ 1
#define __METAL_VERSION__ 320

// ---- types ----

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef _Float16 half;
typedef __bf16 bfloat;

#define METALSIM_VECTORS(T)                                  \
  typedef T T##2 __attribute__((ext_vector_type(2)));        \
  typedef T T##3 __attribute__((ext_vector_type(3)));        \
  typedef T T##4 __attribute__((ext_vector_type(4)));
METALSIM_VECTORS(char)
METALSIM_VECTORS(uchar)
METALSIM_VECTORS(short)
METALSIM_VECTORS(ushort)
METALSIM_VECTORS(int)
METALSIM_VECTORS(uint)
METALSIM_VECTORS(long)
METALSIM_VECTORS(ulong)
METALSIM_VECTORS(half)
METALSIM_VECTORS(bfloat)
METALSIM_VECTORS(float)
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;

constexpr half operator""_metalsim_h(long double x) { return half(x); }
constexpr half operator""_metalsim_h(unsigned long long x) { return half(x); }
constexpr bfloat operator""_metalsim_bf(long double x) { return bfloat(float(x)); }
constexpr bfloat operator""_metalsim_bf(unsigned long long x) { return bfloat(float(x)); }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define MAXFLOAT __FLT_MAX__
#define HALF_MAX half(65504.0f)
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX 0xffffffffu
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_E_F 2.71828182845904523536f

namespace metal {

using ::size_t;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// Said of values that are the same in all threads; nothing here depends on it.
template <class T>
using uniform = T;
template <class T>
METALSIM_FN constexpr T make_uniform(T x) { return x; }

// ---- type traits ----

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <bool c, class T, class U>
struct conditional {
  using type = T;
};
template <class T, class U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool c, class T, class U>
using conditional_t = typename conditional<c, T, U>::type;
template <bool c, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool c, class T = void>
using enable_if_t = typename enable_if<c, T>::type;
template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T, class U>
inline constexpr bool is_same_v = __is_same(T, U);
template <class T, class U>
struct is_same : integral_constant<bool, __is_same(T, U)> {};
template <class T, class U>
inline constexpr bool is_convertible_v = __is_convertible(T, U);
template <class T>
inline constexpr bool is_floating_point_v =
    is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
    is_same_v<remove_cv_t<T>, bfloat>;
template <class T>
struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};
template <class T>
inline constexpr bool is_integral_v = __is_integral(T);
template <class T>
struct is_integral : integral_constant<bool, __is_integral(T)> {};
template <class T>
inline constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
inline constexpr bool is_signed_v = __is_signed(T) || is_floating_point_v<T>;
template <class T>
inline constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
inline constexpr bool is_pointer_v = __is_pointer(T);

template <class T>
struct metalsim_vector {
  static constexpr int n = 1;
  using element = T;
  template <class U>
  using with = U;
};
template <class T, int N>
struct metalsim_vector<T __attribute__((ext_vector_type(N)))> {
  static constexpr int n = N;
  using element = T;
  template <class U>
  using with = vec<U, N>;
};

// ---- vector constructors: float4(a, b), which ext_vector_type lacks ----

template <class V, class A>
METALSIM_FN constexpr void metalsim_append(V& v, int& at, A a) {
  using S = typename metalsim_vector<V>::element;
  if constexpr (metalsim_vector<A>::n == 1) {
    v[at++] = static_cast<S>(a);
  } else {
    for (int i = 0; i < metalsim_vector<A>::n; ++i) v[at++] = static_cast<S>(a[i]);
  }
}
template <class S, int N, class... A>
METALSIM_FN constexpr vec<S, N> metalsim_make(A... a) {
  vec<S, N> v{};
  if constexpr (sizeof...(A) == 1 && (metalsim_vector<A>::n + ... + 0) == 1) {
    ((v = static_cast<S>(a)), ...);
  } else if constexpr (sizeof...(A) > 0) {
    static_assert((metalsim_vector<A>::n + ... + 0) == N, "a vector of another length");
    int at = 0;
    (metalsim_append(v, at, a), ...);
  }
  return v;
}

#define METALSIM_PACKED(T, N)                                                      \
  struct packed_##T##N {                                                           \
    T v[N];                                                                        \
    packed_##T##N() = default;                                                     \
    METALSIM_FN packed_##T##N(T##N x) {                                            \
      for (int i = 0; i < N; ++i) v[i] = x[i];                                     \
    }                                                                              \
    METALSIM_FN operator T##N() const {                                            \
      T##N x;                                                                      \
      for (int i = 0; i < N; ++i) x[i] = v[i];                                     \
      return x;                                                                    \
    }                                                                              \
    METALSIM_FN T operator[](int i) const { return v[i]; }                         \
    METALSIM_FN T& operator[](int i) { return v[i]; }                              \
  };                                                                               \
  template <>                                                                      \
  struct metalsim_vector<packed_##T##N> : metalsim_vector<T##N> {};
#ifdef METALSIM_ADDRESS_SPACES
// Classes cannot be copied across address spaces; only types are looked at here.
#undef METALSIM_PACKED
#define METALSIM_PACKED(T, N) using packed_##T##N = T##N;
#endif
#define METALSIM_PACKED_ALL(T) METALSIM_PACKED(T, 2) METALSIM_PACKED(T, 3) METALSIM_PACKED(T, 4)
METALSIM_PACKED_ALL(char)
METALSIM_PACKED_ALL(uchar)
METALSIM_PACKED_ALL(short)
METALSIM_PACKED_ALL(ushort)
METALSIM_PACKED_ALL(int)
METALSIM_PACKED_ALL(uint)
METALSIM_PACKED_ALL(half)
METALSIM_PACKED_ALL(bfloat)
METALSIM_PACKED_ALL(float)

template <class To, class From>
METALSIM_FN constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  return __builtin_bit_cast(To, x);
}

// ---- limits ----

template <class T>
struct numeric_limits;
#define METALSIM_INTEGER_LIMITS(T)                                                            \
  template <>                                                                                 \
  struct numeric_limits<T> {                                                                  \
    static constexpr bool is_signed = T(-1) < T(0), is_integer = true;                        \
    static constexpr int digits = sizeof(T) * 8 - is_signed;                                  \
    static constexpr T max() { return T(~ulong(0) >> (64 - digits)); }                        \
    static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }                     \
    static constexpr T lowest() { return min(); }                                             \
  };
METALSIM_INTEGER_LIMITS(char)
METALSIM_INTEGER_LIMITS(int8_t)
METALSIM_INTEGER_LIMITS(uchar)
METALSIM_INTEGER_LIMITS(short)
METALSIM_INTEGER_LIMITS(ushort)
METALSIM_INTEGER_LIMITS(int)
METALSIM_INTEGER_LIMITS(uint)
METALSIM_INTEGER_LIMITS(long)
METALSIM_INTEGER_LIMITS(ulong)
#define METALSIM_FLOAT_LIMITS(T, MAX, MIN, EPS, DIGITS)                                       \
  template <>                                                                                 \
  struct numeric_limits<T> {                                                                  \
    static constexpr bool is_signed = true, is_integer = false;                               \
    static constexpr int digits = DIGITS;                                                     \
    static constexpr T max() { return T(MAX); }                                               \
    static constexpr T min() { return T(MIN); }                                               \
    static constexpr T lowest() { return T(-MAX); }                                           \
    static constexpr T epsilon() { return T(EPS); }                                           \
    static constexpr T infinity() { return T(__builtin_inff()); }                             \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }                          \
  };
METALSIM_FLOAT_LIMITS(float, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__, 24)
METALSIM_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-05f, 9.765625e-04f, 11)
METALSIM_FLOAT_LIMITS(bfloat, 3.3895313892515355e38f, __FLT_MIN__, 7.8125e-03f, 8)

// ---- mathematics ----

#define METALSIM_UNARY(name, value)                                                        \
  template <class T>                                                                       \
  METALSIM_FN T name(T a) {                                                                \
    using S = typename metalsim_vector<T>::element;                                        \
    static_assert(is_floating_point_v<S>, #name " takes half, bfloat or float");           \
    if constexpr (metalsim_vector<T>::n == 1) {                                            \
      float x = float(a);                                                                  \
      return S(value);                                                                     \
    } else {                                                                               \
      T out;                                                                               \
      for (int i = 0; i < metalsim_vector<T>::n; ++i) {                                    \
        float x = float(a[i]);                                                             \
        out[i] = S(value);                                                                 \
      }                                                                                    \
      return out;                                                                          \
    }                                                                                      \
  }
#define METALSIM_BINARY(name, value)                                                       \
  template <class T>                                                                       \
  METALSIM_FN T name(T a, T b) {                                                           \
    using S = typename metalsim_vector<T>::element;                                        \
    static_assert(is_floating_point_v<S>, #name " takes half, bfloat or float");           \
    if constexpr (metalsim_vector<T>::n == 1) {                                            \
      float x = float(a), y = float(b);                                                    \
      return S(value);                                                                     \
    } else {                                                                               \
      T out;                                                                               \
      for (int i = 0; i < metalsim_vector<T>::n; ++i) {                                    \
        float x = float(a[i]), y = float(b[i]);                                            \
        out[i] = S(value);                                                                 \
      }                                                                                    \
      return out;                                                                          \
    }                                                                                      \
  }
#define METALSIM_MATHS                                     \
  METALSIM_UNARY(exp, __builtin_expf(x))                   \
  METALSIM_UNARY(exp2, __builtin_exp2f(x))                 \
  METALSIM_UNARY(exp10, __builtin_powf(10.0f, x))          \
  METALSIM_UNARY(log, __builtin_logf(x))                   \
  METALSIM_UNARY(log2, __builtin_log2f(x))                 \
  METALSIM_UNARY(log10, __builtin_log10f(x))               \
  METALSIM_UNARY(sqrt, __builtin_sqrtf(x))                 \
  METALSIM_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))         \
  METALSIM_UNARY(sin, __builtin_sinf(x))                   \
  METALSIM_UNARY(cos, __builtin_cosf(x))                   \
  METALSIM_UNARY(tan, __builtin_tanf(x))                   \
  METALSIM_UNARY(asin, __builtin_asinf(x))                 \
  METALSIM_UNARY(acos, __builtin_acosf(x))                 \
  METALSIM_UNARY(atan, __builtin_atanf(x))                 \
  METALSIM_UNARY(sinh, __builtin_sinhf(x))                 \
  METALSIM_UNARY(cosh, __builtin_coshf(x))                 \
  METALSIM_UNARY(tanh, __builtin_tanhf(x))                 \
  METALSIM_UNARY(asinh, __builtin_asinhf(x))               \
  METALSIM_UNARY(acosh, __builtin_acoshf(x))               \
  METALSIM_UNARY(atanh, __builtin_atanhf(x))               \
  METALSIM_UNARY(fabs, __builtin_fabsf(x))                 \
  METALSIM_UNARY(floor, __builtin_floorf(x))               \
  METALSIM_UNARY(ceil, __builtin_ceilf(x))                 \
  METALSIM_UNARY(trunc, __builtin_truncf(x))               \
  METALSIM_UNARY(round, __builtin_roundf(x))               \
  METALSIM_UNARY(rint, __builtin_rintf(x))                 \
  METALSIM_UNARY(fract, x - __builtin_floorf(x))           \
  METALSIM_UNARY(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f) \
  METALSIM_UNARY(sign, float(x > 0.0f) - float(x < 0.0f))  \
  METALSIM_BINARY(pow, __builtin_powf(x, y))               \
  METALSIM_BINARY(powr, __builtin_powf(x, y))              \
  METALSIM_BINARY(fmod, __builtin_fmodf(x, y))             \
  METALSIM_BINARY(atan2, __builtin_atan2f(x, y))           \
  METALSIM_BINARY(fmax, __builtin_fmaxf(x, y))             \
  METALSIM_BINARY(fmin, __builtin_fminf(x, y))             \
  METALSIM_BINARY(divide, x / y)                           \
  METALSIM_BINARY(copysign, __builtin_copysignf(x, y))     \
  METALSIM_BINARY(fdim, x > y ? x - y : 0.0f)

METALSIM_MATHS
namespace precise {
METALSIM_MATHS
}
namespace fast {
METALSIM_MATHS
}

template <class T>
METALSIM_FN T metalsim_max(T a, T b) {
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fmaxf(float(a), float(b)));
  else
    return a < b ? b : a;
}
template <class T>
METALSIM_FN T metalsim_min(T a, T b) {
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fminf(float(a), float(b)));
  else
    return b < a ? b : a;
}
#define METALSIM_LANEWISE(name, of, ...)                                            \
  {                                                                                 \
    if constexpr (metalsim_vector<T>::n == 1) {                                     \
      return of(__VA_ARGS__);                                                       \
    } else {                                                                        \
      T out;                                                                        \
      for (int i = 0; i < metalsim_vector<T>::n; ++i) out[i] = name;                \
      return out;                                                                   \
    }                                                                               \
  }
template <class T>
METALSIM_FN T max(T a, T b) METALSIM_LANEWISE(metalsim_max(a[i], b[i]), metalsim_max, a, b)
template <class T>
METALSIM_FN T min(T a, T b) METALSIM_LANEWISE(metalsim_min(a[i], b[i]), metalsim_min, a, b)
template <class T>
METALSIM_FN T max3(T a, T b, T c) { return max(max(a, b), c); }
template <class T>
METALSIM_FN T min3(T a, T b, T c) { return min(min(a, b), c); }
template <class T>
METALSIM_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T>
METALSIM_FN T metalsim_abs(T a) {
  if constexpr (is_floating_point_v<T>)
    return T(__builtin_fabsf(float(a)));
  else
    return a < T(0) ? T(-a) : a;
}
template <class T>
METALSIM_FN T abs(T a) METALSIM_LANEWISE(metalsim_abs(a[i]), metalsim_abs, a)
template <class T>
METALSIM_FN T metalsim_fma(T a, T b, T c) {
  return T(__builtin_fmaf(float(a), float(b), float(c)));
}
template <class T>
METALSIM_FN T fma(T a, T b, T c)
    METALSIM_LANEWISE(metalsim_fma(a[i], b[i], c[i]), metalsim_fma, a, b, c)
template <class T>
METALSIM_FN T mad(T a, T b, T c) { return a * b + c; }
template <class T>
METALSIM_FN T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T>
METALSIM_FN T step(T edge, T x) { return x < edge ? T(0) : T(1); }
namespace fast {
using metal::abs;
using metal::clamp;
using metal::fma;
using metal::max;
using metal::min;
}  // namespace fast
namespace precise {
using metal::abs;
using metal::clamp;
using metal::fma;
using metal::max;
using metal::min;
}  // namespace precise

template <class T, class C>
METALSIM_FN T select(T a, T b, C c) {
  if constexpr (metalsim_vector<T>::n == 1) {
    return c ? b : a;
  } else {
    T out;
    for (int i = 0; i < metalsim_vector<T>::n; ++i) out[i] = c[i] ? b[i] : a[i];
    return out;
  }
}
#define METALSIM_TEST(name, value)                                                        \
  template <class T>                                                                      \
  METALSIM_FN auto name(T a) {                                                            \
    if constexpr (metalsim_vector<T>::n == 1) {                                           \
      float x = float(a);                                                                 \
      return bool(value);                                                                 \
    } else {                                                                              \
      vec<int, metalsim_vector<T>::n> out;                                                \
      for (int i = 0; i < metalsim_vector<T>::n; ++i) {                                   \
        float x = float(a[i]);                                                            \
        out[i] = (value) ? -1 : 0;                                                        \
      }                                                                                   \
      return out;                                                                         \
    }                                                                                     \
  }
METALSIM_TEST(isnan, __builtin_isnan(x))
METALSIM_TEST(isinf, __builtin_isinf(x))
METALSIM_TEST(isfinite, __builtin_isfinite(x))
METALSIM_TEST(signbit, __builtin_signbitf(x))
template <class T>
METALSIM_FN bool any(T a) {
  bool out = false;
  for (int i = 0; i < metalsim_vector<T>::n; ++i) out = out || a[i];
  return out;
}
template <class T>
METALSIM_FN bool all(T a) {
  bool out = true;
  for (int i = 0; i < metalsim_vector<T>::n; ++i) out = out && a[i];
  return out;
}
template <class T>
METALSIM_FN typename metalsim_vector<T>::element dot(T a, T b) {
  typename metalsim_vector<T>::element out = a[0] * b[0];
  for (int i = 1; i < metalsim_vector<T>::n; ++i) out += a[i] * b[i];
  return out;
}
template <class T>
METALSIM_FN typename metalsim_vector<T>::element length_squared(T a) { return dot(a, a); }
template <class T>
METALSIM_FN T popcount(T a) { return T(__builtin_popcountll(ulong(a) & (~0ul >> (64 - 8 * sizeof(T))))); }
template <class T>
METALSIM_FN T clz(T a) {
  ulong x = ulong(a) & (~0ul >> (64 - 8 * sizeof(T)));
  return x ? T(__builtin_clzll(x) - (64 - 8 * sizeof(T))) : T(8 * sizeof(T));
}
template <class T>
METALSIM_FN T ctz(T a) { return a ? T(__builtin_ctzll(ulong(a))) : T(8 * sizeof(T)); }
template <class T>
METALSIM_FN T rotate(T a, T n) {
  constexpr T bits = 8 * sizeof(T);
  n &= bits - 1;
  return n ? T(a << n | a >> (bits - n)) : a;
}
template <class T>
METALSIM_FN T extract_bits(T a, uint offset, uint bits) {
  return bits ? T(T(a << (8 * sizeof(T) - bits - offset)) >> (8 * sizeof(T) - bits)) : T(0);
}
METALSIM_FN float4 unpack_unorm4x8_to_float(uint x) {
  float4 out;
  for (int i = 0; i < 4; ++i) out[i] = float(x >> (8 * i) & 0xff) / 255.0f;
  return out;
}

// ---- barriers ----

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
METALSIM_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint(a) | uint(b));
}
METALSIM_FN constexpr uint metalsim_flags(mem_flags f) {
  return (uint(f) & 2 ? metalsim::kThreadgroup : 0) | (uint(f) & 1 ? metalsim::kDevice : 0);
}
METALSIM_FN void threadgroup_barrier(mem_flags f, METALSIM_HERE) {
  metalsim_threadgroup_barrier(ms_file, ms_line, ms_column, metalsim_flags(f));
}
METALSIM_FN void simdgroup_barrier(mem_flags f, METALSIM_HERE) {
  metalsim_collective(nullptr, "simdgroup_barrier", ms_file, ms_line, ms_column,
                      metalsim::kOrders | metalsim::kWhole | metalsim::kBarrier | metalsim_flags(f));
}

}  // namespace metal

#include "simdgroup.h"

// ---- words of the language; they come last, so that the text above can use them ----

#define kernel
#ifdef METALSIM_ADDRESS_SPACES
#define device METALSIM_DEVICE
#define constant const METALSIM_CONSTANT
#define threadgroup METALSIM_THREADGROUP
#define METALSIM_SHARED static METALSIM_THREADGROUP
#else
#define device
#define constant const
#define threadgroup
#define METALSIM_SHARED \
  static __attribute__((section("metalsim_shared"), used, aligned(METALSIM_ALIGNMENT)))
#endif
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST constant

#define char2(...) metalsim_make<char, 2>(__VA_ARGS__)
#define char3(...) metalsim_make<char, 3>(__VA_ARGS__)
#define char4(...) metalsim_make<char, 4>(__VA_ARGS__)
#define uchar2(...) metalsim_make<uchar, 2>(__VA_ARGS__)
#define uchar3(...) metalsim_make<uchar, 3>(__VA_ARGS__)
#define uchar4(...) metalsim_make<uchar, 4>(__VA_ARGS__)
#define short2(...) metalsim_make<short, 2>(__VA_ARGS__)
#define short3(...) metalsim_make<short, 3>(__VA_ARGS__)
#define short4(...) metalsim_make<short, 4>(__VA_ARGS__)
#define ushort2(...) metalsim_make<ushort, 2>(__VA_ARGS__)
#define ushort3(...) metalsim_make<ushort, 3>(__VA_ARGS__)
#define ushort4(...) metalsim_make<ushort, 4>(__VA_ARGS__)
#define int2(...) metalsim_make<int, 2>(__VA_ARGS__)
#define int3(...) metalsim_make<int, 3>(__VA_ARGS__)
#define int4(...) metalsim_make<int, 4>(__VA_ARGS__)
#define uint2(...) metalsim_make<uint, 2>(__VA_ARGS__)
#define uint3(...) metalsim_make<uint, 3>(__VA_ARGS__)
#define uint4(...) metalsim_make<uint, 4>(__VA_ARGS__)
#define long2(...) metalsim_make<long, 2>(__VA_ARGS__)
#define long3(...) metalsim_make<long, 3>(__VA_ARGS__)
#define long4(...) metalsim_make<long, 4>(__VA_ARGS__)
#define ulong2(...) metalsim_make<ulong, 2>(__VA_ARGS__)
#define ulong3(...) metalsim_make<ulong, 3>(__VA_ARGS__)
#define ulong4(...) metalsim_make<ulong, 4>(__VA_ARGS__)
#define half2(...) metalsim_make<half, 2>(__VA_ARGS__)
#define half3(...) metalsim_make<half, 3>(__VA_ARGS__)
#define half4(...) metalsim_make<half, 4>(__VA_ARGS__)
#define bfloat2(...) metalsim_make<bfloat, 2>(__VA_ARGS__)
#define bfloat3(...) metalsim_make<bfloat, 3>(__VA_ARGS__)
#define bfloat4(...) metalsim_make<bfloat, 4>(__VA_ARGS__)
#define float2(...) metalsim_make<float, 2>(__VA_ARGS__)
#define float3(...) metalsim_make<float, 3>(__VA_ARGS__)
#define float4(...) metalsim_make<float, 4>(__VA_ARGS__)

using namespace metal;
