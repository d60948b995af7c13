"""Each function of the shim by itself, against NumPy: mathematics, integers, vectors."""

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim.testing import TYPES, ULP, evaluate, to_float

pytestmark = pytest.mark.skipif(not metalsim.available(), reason="needs Linux and ziglang")

ONE = {
    "exp": np.exp,
    "exp2": np.exp2,
    "exp10": lambda x: 10**x,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "rint": np.rint,
    "round": lambda x: np.floor(x + 0.5),
    "fabs": np.abs,
    "sign": np.sign,
    "fract": lambda x: x - np.floor(x),
    "saturate": lambda x: np.clip(x, 0, 1),
}
# Those that take arguments of size up to 1 or from 1 on, made of x in [0.05, 2.5].
BOUNDED = {
    "asin(x / 4)": lambda x: np.arcsin(x / 4),
    "acos(x / 4)": lambda x: np.arccos(x / 4),
    "atanh(x / 4)": lambda x: np.arctanh(x / 4),
    "acosh(x + 1)": lambda x: np.arccosh(x + 1),
}
SPACES = ["", "metal::", "metal::fast::", "metal::precise::"]


@pytest.mark.parametrize("dtype", TYPES)
def test_functions_of_one_argument(dtype):
    """Those of float, half and bfloat, in metal, fast and precise."""
    x = mx.linspace(0.05, 2.5, 64).astype(dtype)
    names = [(s, f) for f in ONE for s in SPACES]
    out = evaluate([f"{s}{f}(x[i])" for s, f in names], {"x": x}, dtype)
    for (_, f), values in zip(names, out):
        expected = ONE[f](to_float(x))
        np.testing.assert_allclose(
            values, expected, rtol=2 * ULP[dtype], atol=ULP[dtype], err_msg=f
        )


def test_functions_of_a_bounded_argument():
    x = mx.linspace(0.05, 2.5, 64)
    names = [s + f for f in BOUNDED for s in SPACES]
    out = evaluate(names, {"values": x}, before="float x = values[i];")
    for name, values in zip(names, out):
        expected = BOUNDED[name.rsplit("::")[-1]](to_float(x))
        np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=name)


TWO = {
    "max(a, b)": np.maximum,
    "min(a, b)": np.minimum,
    "fmax(a, b)": np.maximum,
    "fmin(a, b)": np.minimum,
    "pow(abs(a), b)": lambda a, b: np.abs(a) ** b,
    "powr(abs(a), b)": lambda a, b: np.abs(a) ** b,
    "fdim(a, b)": lambda a, b: np.maximum(a - b, 0),
    "max3(a, b, T(0.5))": lambda a, b: np.maximum(np.maximum(a, b), 0.5),
    "min3(a, b, T(0.5))": lambda a, b: np.minimum(np.minimum(a, b), 0.5),
    "signbit(a)": lambda a, b: np.signbit(a),
    "atan2(a, b)": np.arctan2,
    "fmod(a, b)": np.fmod,
    "copysign(a, b)": np.copysign,
    "fma(a, b, a)": lambda a, b: a * b + a,
    "mad(a, b, a)": lambda a, b: a * b + a,
    "mix(a, b, T(0.25))": lambda a, b: a + (b - a) / 4,
    "step(a, b)": lambda a, b: (b >= a).astype(float),
    "clamp(a, T(-0.5), T(0.5))": lambda a, b: np.clip(a, -0.5, 0.5),
    "select(a, b, a < b)": lambda a, b: np.where(a < b, b, a),
    "abs(a)": lambda a, b: np.abs(a),
    "divide(a, b)": lambda a, b: a / b,
}


@pytest.mark.parametrize("dtype", TYPES)
def test_functions_of_several_arguments(dtype):
    mx.random.seed(0)
    a, b = (mx.random.normal((64,)).astype(dtype) for _ in range(2))
    out = evaluate(list(TWO), {"x": a, "y": b}, dtype, before="T a = x[i], b = y[i];")
    for (name, f), values in zip(TWO.items(), out):
        expected = f(to_float(a), to_float(b))
        # An intermediate of mad and mix is rounded to the type.
        np.testing.assert_allclose(
            values, expected, rtol=2 * ULP[dtype], atol=4 * ULP[dtype], err_msg=name
        )


def test_special_values():
    """max and min give the number beside a NaN; tests for NaN and infinity."""
    x = mx.array([float("nan"), float("inf"), -float("inf"), 1.0] * 16)
    names = ["isnan(x[i])", "isinf(x[i])", "isfinite(x[i])", "max(x[i], 2.0f)", "min(2.0f, x[i])"]
    nan, inf, finite, high, low = evaluate(names, {"x": x})
    assert nan[:4].tolist() == [1, 0, 0, 0]
    assert inf[:4].tolist() == [0, 1, 1, 0]
    assert finite[:4].tolist() == [0, 0, 0, 1]
    assert high[:4].tolist() == [2, np.inf, 2, 2]
    assert low[:4].tolist() == [2, 2, -np.inf, 1]


def test_limits_and_constants():
    names = {
        "Limits<half>::finite_max": 65504,
        "Limits<bfloat16_t>::finite_max": 3.3895313892515355e38,
        "Limits<float>::min": -np.inf,
        "numeric_limits<int>::max()": 2.0**31,
        "numeric_limits<uchar>::max()": 255,
        "M_PI_F": np.float32(np.pi),
        "M_LOG2E_F": np.float32(np.log2(np.e)),
        "INFINITY": np.inf,
        "FLT_MAX": np.finfo(np.float32).max,
    }
    out = evaluate(list(names), {"x": mx.zeros((1,))})
    assert out[:, 0].tolist() == list(names.values())


INTEGER = {
    "popcount(u)": lambda u: np.array([bin(v).count("1") for v in u]),
    "clz(u)": lambda u: np.array([32 - int(v).bit_length() for v in u]),
    "ctz(u)": lambda u: np.array([(int(v) & -int(v)).bit_length() - 1 if v else 32 for v in u]),
    "max(u, 7u)": lambda u: np.maximum(u, 7),
    "min(int(u), 7)": lambda u: np.minimum(u.astype(np.int32), 7),
    "abs(int(u) - 50)": lambda u: np.abs(u.astype(np.int64).astype(np.int32) - 50),
    "extract_bits(u, 3u, 5u)": lambda u: u >> 3 & 31,
    "rotate(u, 8u) & 255u": lambda u: u >> 24,
}


def test_integers():
    u = np.arange(64, dtype=np.uint32) * 12345
    out = evaluate(list(INTEGER), {"x": mx.array(u)}, before="uint u = x[i];")
    for (name, f), values in zip(INTEGER.items(), out):
        np.testing.assert_array_equal(values, f(u), err_msg=name)


# ---- vectors ----

VECTORS = {
    "float4(a, b, a, b).z": lambda a, b: a,
    "float4(float2(a, b), a, 3).w": lambda a, b: 3 + 0 * a,
    "float4(a).y": lambda a, b: a,
    "float4(half4(1, 2, 3, 4)).w": lambda a, b: 4 + 0 * a,
    "half2(a, b).y": lambda a, b: b.astype(np.float16),
    "float3(a, b, 2).zyx.y": lambda a, b: b,
    "(float2(a, b) * 2 + float2(b, a)).x": lambda a, b: 2 * a + b,
    "dot(float4(a, b, a, b), float4(1, 2, 3, 4))": lambda a, b: 4 * a + 6 * b,
    "length_squared(float2(a, b))": lambda a, b: a * a + b * b,
    "unpack_unorm4x8_to_float(0xff003300u).y * 5": lambda a, b: 1 + 0 * a,
    "make_uniform(a)": lambda a, b: a,
    "max(float2(a, b), float2(b, a)).x": np.maximum,
    "metal::exp(float2(a, b)).y": lambda a, b: np.exp(b),
    "select(float2(a, b), float2(b, a), float2(a, b) < 0).x": lambda a, b: np.where(a < 0, b, a),
    "any(float2(a, b) > 0)": lambda a, b: (a > 0) | (b > 0),
    "all(float2(a, b) > 0)": lambda a, b: (a > 0) & (b > 0),
    "vec<float, 2>(a, b).y": lambda a, b: b,
    "vec<T, 4>(T(a)).w": lambda a, b: a.astype(np.float16),
    "as_type<float>(as_type<uint>(float(a)))": lambda a, b: a,
    "as_type<half2>(as_type<uint>(half2(a, b))).y": lambda a, b: b.astype(np.float16),
    "as_type<ushort>(bfloat(a)) >> 7 & 255": lambda a, b: np.floor(np.log2(np.abs(a))) + 127,
    "float(0.5h) + float(0.25bf)": lambda a, b: 0.75 + 0 * a,
    "sizeof(packed_float3)": lambda a, b: 12 + 0 * a,
    "float3(packed_float3(float3(a, b, a))).y": lambda a, b: b,
    "bfloat4(bfloat(a), bfloat(2), bfloat(3), bfloat(4)).w": lambda a, b: 4 + 0 * a,
    "uint4(1, 2, 3, 4).w": lambda a, b: 4 + 0 * a,
    "1.0 / 3.0 == 1.0f / 3.0f": lambda a, b: 1 + 0 * a,
}


def test_vectors():
    rng = np.random.default_rng(1)
    # Three bits of fraction: exact in every type but where a function rounds.
    a, b = (rng.integers(1, 8, 64) * rng.choice([-0.5, 0.5], 64) for _ in range(2))
    inputs = {"x": mx.array(a, mx.float32), "y": mx.array(b, mx.float32)}
    out = evaluate(list(VECTORS), inputs, mx.float16, before="float a = x[i], b = y[i];")
    for (name, f), values in zip(VECTORS.items(), out):
        np.testing.assert_allclose(values, f(a, b).astype(np.float64), rtol=3e-7, err_msg=name)


def test_vector_loads_through_a_pointer():
    """Four elements at a time from device, threadgroup and packed memory."""
    x = mx.arange(256, dtype=mx.float16)
    before = """
        threadgroup half s[256];
        ((threadgroup half4*)s)[i] = ((const device half4*)x)[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        half4 v = *(const threadgroup half4*)(s + 4 * (63 - i));
        packed_half3 p = ((const device packed_half3*)x)[i];
    """
    out = evaluate(["v.x", "v.w", "p[2]"], {"x": x}, before=before)
    i = np.arange(64)
    np.testing.assert_array_equal(out, [4 * (63 - i), 4 * (63 - i) + 3, 3 * i + 2])


def test_helpers_and_control_flow_of_the_language():
    header = """
        template <typename T, int N>
        struct pair_of { T e[N]; };
        constant constexpr float table[4] = {1, 2, 4, 8};
        template <typename T, int N>
        METAL_FUNC void fill(thread pair_of<T, N>& p, threadgroup const T* s, const device T* d) {
          static_assert(N == 2, "two");
        #pragma unroll
          for (int j = 0; j < N; j++) { p.e[j] = s[j] + d[j]; }
        }
        template <bool plus>
        METAL_FUNC float apply(float x) {
          if constexpr (plus) { return x + 1; } else { return x - 1; }
        }
    """
    before = """
        threadgroup float s[64];
        s[i] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        pair_of<float, 2> p;
        fill(p, s + (i & 62), x + (i & 62));
        thread float* q = p.e;
        float sum = 0;
        _Pragma("clang loop unroll(full)")
        for (int j = 0; j < 4; j++) { sum += table[j]; }
    """
    x = mx.arange(64, dtype=mx.float32)
    names = ["q[0]", "q[1]", "apply<true>(x[i])", "apply<false>(x[i])", "sum"]
    out = evaluate(names, {"x": x}, header=header, before=before)
    i = np.arange(64)
    even = 2 * (i & 62)
    np.testing.assert_array_equal(out, [even, even + 2, i + 1, i - 1, np.full(64, 15)])
