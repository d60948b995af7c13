"""SIMD-group functions, simdgroup_matrix and atomics, against NumPy."""

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim.testing import TYPES, evaluate, to_float

pytestmark = pytest.mark.skipif(not metalsim.available(), reason="needs Linux and ziglang")

# ---- SIMD-groups ----

LANE = np.arange(64) % 32
FIRST = np.arange(64) - LANE


def per_group(f):
    return lambda v: np.concatenate([np.broadcast_to(f(h), 32) for h in (v[:32], v[32:])])


def scan(f, start, inclusive):
    def values(v):
        out = []
        for h in (v[:32], v[32:]):
            total = start
            for x in h:
                before, total = total, f(total, x)
                out.append(total if inclusive else before)
        return np.array(out)

    return values


SIMD = {
    "simd_sum(v)": per_group(np.sum),
    "simd_max(v)": per_group(np.max),
    "simd_min(v)": per_group(np.min),
    "simd_product(1 + v / 100)": per_group(lambda h: np.prod(1 + h / 100)),
    "simd_prefix_inclusive_sum(v)": scan(np.add, 0, True),
    "simd_prefix_exclusive_sum(v)": scan(np.add, 0, False),
    "simd_prefix_inclusive_product(1 + v / 100)": lambda v: scan(np.multiply, 1, True)(1 + v / 100),
    "simd_prefix_exclusive_product(1 + v / 100)": lambda v: scan(np.multiply, 1, False)(
        1 + v / 100
    ),
    "simd_shuffle(v, ushort(31 - i % 32))": lambda v: v[FIRST + 31 - LANE],
    "simd_shuffle_xor(v, ushort(5))": lambda v: v[FIRST + (LANE ^ 5)],
    "simd_shuffle_down(v, ushort(3))": lambda v: np.where(LANE < 29, np.roll(v, -3), v),
    "simd_shuffle_up(v, ushort(3))": lambda v: np.where(LANE >= 3, np.roll(v, 3), v),
    "simd_shuffle_rotate_down(v, ushort(3))": lambda v: v[FIRST + (LANE + 3) % 32],
    "simd_shuffle_rotate_up(v, ushort(3))": lambda v: v[FIRST + (LANE - 3) % 32],
    "simd_shuffle_and_fill_down(v, -v, ushort(3))": lambda v: np.where(
        LANE < 29, np.roll(v, -3), -v[FIRST + (LANE + 3) % 32]
    ),
    "simd_shuffle_and_fill_up(v, -v, ushort(3))": lambda v: np.where(
        LANE >= 3, np.roll(v, 3), -v[FIRST + (LANE - 3) % 32]
    ),
    "simd_broadcast(v, ushort(7))": lambda v: v[FIRST + 7],
    "simd_broadcast_first(v)": lambda v: v[FIRST],
    "quad_sum(v)": lambda v: v.reshape(16, 4).sum(1).repeat(4),
    "quad_shuffle_xor(v, ushort(1))": lambda v: v[np.arange(64) ^ 1],
    "quad_shuffle(v, ushort(3))": lambda v: v[np.arange(64) // 4 * 4 + 3],
    "quad_broadcast(v, ushort(2))": lambda v: v[np.arange(64) // 4 * 4 + 2],
    "simd_and(uint(i % 32) | 16u)": lambda v: np.full(64, 16),
    "simd_or(uint(i % 32) & 9u)": lambda v: np.full(64, 9),
    "simd_xor(uint(i % 32) & 1u)": lambda v: np.zeros(64),
    "simd_any(i == 3)": lambda v: np.arange(64) < 32,
    "simd_all(i < 32)": lambda v: np.arange(64) < 32,
    "popcount(ulong(simd_vote::vote_t(simd_ballot(i % 3 == 0))))": lambda v: np.full(64, 11),
    "simd_is_first()": lambda v: LANE == 0,
    "simd_sum(float4(v, 1, v, 2)).z": per_group(np.sum),
    "simd_shuffle(ulong(i) << 40, ushort(1)) >> 40": lambda v: FIRST + 1,
}


def test_simd_functions():
    v = np.random.default_rng(2).integers(-8, 8, 64).astype(np.float64)
    inputs = {"x": mx.array(v, mx.float32)}
    out = evaluate(list(SIMD), inputs, before="float v = x[i];")
    for (name, f), values in zip(SIMD.items(), out):
        np.testing.assert_allclose(values, f(v).astype(np.float64), rtol=1e-5, err_msg=name)


def test_simd_functions_of_half_round_once_an_operation():
    """A sum in half of 32 halves is a half, and so is each partial sum."""
    x = mx.full((64,), 1025, mx.float16)
    (out,) = evaluate(["simd_sum(x[i])"], {"x": x})
    total = np.float16(0)
    for value in np.array(x[:32]):
        total = np.float16(total + value)
    assert set(out) == {float(total)}


def test_a_collective_in_a_branch_that_whole_simd_groups_take():
    before = "float v = 0; if (i < 32) { v = simd_sum(x[i]); } else { v = simd_max(x[i]); }"
    (out,) = evaluate(["v"], {"x": mx.arange(64, dtype=mx.float32)}, before=before)
    assert out[[0, 63]].tolist() == [31 * 16, 63]


def test_a_reduction_after_lanes_have_left():
    """Of the lanes that are there, as Metal's rule for inactive threads has it."""
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = 0;
        if (i % 32 >= 20) { return; }
        out[i] = simd_sum(x[i]);
    """
    kernel = metalsim.Kernel("left", ["x"], ["out"], source=source)
    (out,) = kernel(
        inputs=[mx.ones((64,))],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
    )
    assert out.tolist() == ([20] * 20 + [0] * 12) * 2


# ---- simdgroup_matrix ----


def matrices(source, inputs, n=64, dtype=mx.float32, template=(), header=""):
    kernel = metalsim.Kernel("m", list(inputs), ["out"], source=source, header=header)
    return kernel(
        inputs=list(inputs.values()),
        template=list(template),
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(n,)],
        output_dtypes=[dtype],
    )[0]


@pytest.mark.parametrize("operand", TYPES)
@pytest.mark.parametrize("through", ["device", "threadgroup"])
def test_matrix_product(operand, through):
    """d = a b + c with float accumulators, from memory and back."""
    mx.random.seed(4)
    a, b = (mx.random.normal((8, 8)).astype(operand) for _ in range(2))
    c = mx.random.normal((8, 8))
    copy = """
        threadgroup T sa[64];
        threadgroup T sb[64];
        threadgroup float sc[64];
        for (uint i = thread_position_in_grid.x; i < 64; i += 32) {
          sa[i] = a[i]; sb[i] = b[i]; sc[i] = c[i];
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    """
    s = "s" if through == "threadgroup" else ""
    source = f"""
        {copy if s else ""}
        simdgroup_matrix<T, 8, 8> A, B;
        simdgroup_float8x8 C, D;
        simdgroup_load(A, {s}a);
        simdgroup_load(B, {s}b, 8);
        simdgroup_load(C, {s}c, 8, ulong2(0, 0), false);
        simdgroup_multiply_accumulate(D, A, B, C);
        simdgroup_store(D, out, 8);
    """
    inputs = {"a": a, "b": b, "c": c}
    out = matrices(source, inputs, template=[("T", operand)]).reshape(8, 8)
    expected = to_float(a) @ to_float(b) + to_float(c)
    np.testing.assert_allclose(to_float(out), expected, rtol=1e-5, atol=1e-5)


def test_matrix_load_with_stride_origin_and_transpose():
    """The origin is (column, row) of the matrix in memory; transpose swaps what is read there."""
    x = mx.arange(20 * 24, dtype=mx.float32).reshape(20, 24)
    plain = "simdgroup_float8x8 m; simdgroup_load(m, x, 24, ulong2(5, 9)); simdgroup_store(m, out);"
    out = matrices(plain, {"x": x}).reshape(8, 8)
    assert mx.array_equal(out, x[9:17, 5:13])
    turned = plain.replace("ulong2(5, 9)", "ulong2(5, 9), true")
    out = matrices(turned, {"x": x}).reshape(8, 8)
    assert mx.array_equal(out, x[9:17, 5:13].T)
    stored = """
        simdgroup_float8x8 m;
        simdgroup_load(m, x, 24);
        simdgroup_store(m, out, 10, ulong2(1, 1), true);
    """
    out = matrices(stored, {"x": x}, n=100).reshape(10, 10)
    assert mx.array_equal(out[1:9, 1:9], x[:8, :8].T)
    assert mx.all(mx.isnan(out[0]))


def test_matrix_elements_of_a_lane():
    """The layout Apple's own kernels index by: row and columns from the lane's bits."""
    source = """
        uint lane = thread_position_in_grid.x;
        simdgroup_float8x8 m;
        simdgroup_load(m, x, 8);
        out[2 * lane] = m.thread_elements()[0];
        out[2 * lane + 1] = m.thread_elements()[1];
    """
    out = np.array(matrices(source, {"x": mx.arange(64, dtype=mx.float32)})).astype(int)
    for lane in range(32):
        quad = lane // 4
        row, column = (quad & 4) + lane // 2 % 4, (quad & 2) * 2 + lane % 2 * 2
        assert out[2 * lane : 2 * lane + 2].tolist() == [8 * row + column, 8 * row + column + 1]


def test_matrix_makers_and_products_in_place():
    source = """
        simdgroup_float8x8 i = make_diagonal_simdgroup_matrix<float, 8>(2.0f);
        simdgroup_float8x8 f = make_filled_simdgroup_matrix<float, 8>(3.0f);
        simdgroup_float8x8 d = simdgroup_float8x8(1);
        simdgroup_multiply(f, i, f);
        simdgroup_multiply_accumulate(f, d, f, i);
        simdgroup_store(f, out, 8);
    """
    out = to_float(matrices(source, {"x": mx.zeros((1,))})).reshape(8, 8)
    np.testing.assert_array_equal(out, 6 + 2 * np.eye(8))


def test_matrix_of_half_rounds_its_results():
    a = mx.full((8, 8), 1 / 3, mx.float16)
    source = """
        simdgroup_half8x8 m;
        simdgroup_load(m, x, 8);
        simdgroup_multiply(m, m, m);
        simdgroup_store(m, out, 8);
    """
    out = matrices(source, {"x": a}, dtype=mx.float16)
    expected = np.float16(8 * np.float64(np.float16(1 / 3)) ** 2)
    assert set(np.array(out)) == {expected}


# ---- atomics in threadgroup memory, and helpers in a header ----


def test_threadgroup_atomics():
    before = """
        threadgroup atomic_uint total[3];
        threadgroup atomic_int high[1];
        if (i < 3) { atomic_store_explicit(&total[i], 0u, memory_order_relaxed); }
        if (i == 0) { atomic_store_explicit(high, -1, memory_order_relaxed); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&total[i % 3], uint(i), memory_order_relaxed);
        atomic_fetch_max_explicit(high, int(i), memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    """
    read = "atomic_load_explicit(&total[i % 3], memory_order_relaxed)"
    high = "atomic_load_explicit(high, memory_order_relaxed)"
    out = evaluate([read, high], {"x": mx.zeros((1,))}, before=before)
    assert out[0, :3].tolist() == [sum(range(r, 64, 3)) for r in range(3)]
    assert set(out[1]) == {63}


def test_what_each_atomic_does_and_returns():
    """One thread, so that what comes back is known."""
    operations = {
        "atomic_fetch_sub_explicit": (5, 12),
        "atomic_fetch_and_explicit": (5, 1),
        "atomic_fetch_or_explicit": (6, 23),
        "atomic_fetch_min_explicit": (5, 5),
        "atomic_exchange_explicit": (3, 3),
    }
    lines = [
        f"""
        atomic_store_explicit(&a[i], 17, memory_order_relaxed);
        float old{n} = {name}(&a[i], {operand}, memory_order_relaxed);
        float new{n} = atomic_load_explicit(&a[i], memory_order_relaxed);
        """
        for n, (name, (operand, _)) in enumerate(operations.items())
    ]
    before = "threadgroup atomic_int a[64];" + "".join(lines)
    names = [f"{part}{n}" for n in range(len(operations)) for part in ("old", "new")]
    out = evaluate(names, {"x": mx.zeros((1,))}, before=before)
    expected = [value for _, result in operations.values() for value in (17, result)]
    assert out[:, 40].tolist() == expected


def test_atomics_of_float():
    before = """
        threadgroup atomic_float total[1];
        if (i == 0) { atomic_store_explicit(total, 0.0f, memory_order_relaxed); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(total, x[i], memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    """
    total = "atomic_load_explicit(total, memory_order_relaxed)"
    out = evaluate([total], {"x": mx.arange(64, dtype=mx.float32) / 4}, before=before)
    assert set(out[0]) == {504.0}
