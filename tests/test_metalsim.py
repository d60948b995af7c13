"""The simulator gives the results of Metal: Apple's own kernels, and each function by itself."""

import re
from pathlib import Path

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from metalsim.testing import TYPES, ULP, AppleGatedDelta, apple, to_float

pytestmark = pytest.mark.skipif(not metalsim.available(), reason="needs Linux and ziglang")


def distance(a, b):
    return float(np.max(np.abs(to_float(a) - to_float(b))))


# ---- Apple's kernels, from the headers in MLX's wheel, against MLX on the CPU ----


def delta_inputs(T, H, D, dtype):
    mx.random.seed(T)
    q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g = mx.random.uniform(0.8, 1, (1, T, H))
    beta = mx.random.uniform(0, 1, (1, T, H))
    state = 0.1 * mx.random.normal((1, H, D, D))
    return [*(x.astype(dtype) for x in (q, k, v, g, beta)), state]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["gated_delta_fused_chunk", "gated_delta_seq"])
def test_apple_gated_delta(name, dtype):
    """Both forms of the delta rule, T no multiple of the chunk."""
    T, H, D = 45, 2, 64
    q, k, v, g, beta, state = delta_inputs(T, H, D, dtype)
    kernel = AppleGatedDelta(name)
    y, state_out = kernel(q, k, v, g, beta, state)
    expected, state_expected = mx.fast.gated_delta_update(q, k, v, g, beta, state)
    assert y.dtype == dtype
    assert distance(y, expected) <= 4 * ULP[dtype] * float(mx.abs(expected).max())
    # Half and bfloat round g k v only on the way in, which both do alike.
    assert distance(state_out, state_expected) <= 1e-6
    assert (kernel.counters.matrix_products > 0) == (name == "gated_delta_fused_chunk")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_apple_sdpa_vector(dtype, causal):
    """32 SIMD-groups a threadgroup, grouped queries, masks of the causal kind."""
    D, Hq, Hk, N, L = 64, 4, 2, 75, 2
    mx.random.seed(1)
    q = mx.random.normal((1, Hq, L, D)).astype(dtype)
    k, v = (mx.random.normal((1, Hk, N, D)).astype(dtype) for _ in range(2))
    kernel = metalsim.Kernel(
        "sdpa",
        ["q", "k", "v", "ints", "longs", "scale"],
        ["o"],
        header=apple("sdpa_vector.h", do_causal=causal),
        source="""
            sdpa_vector<T, D>(q, k, v, o, ints[0], ints[1], longs[0], longs[1], longs[0],
                longs[1], scale, (const device bool*)nullptr, (const device T*)nullptr, ints[0],
                ints[0], ints[0], (const device T*)nullptr, ints[0],
                threadgroup_position_in_grid, threadgroups_per_grid,
                simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    )
    ints = mx.array([Hq // Hk, N], mx.int32)
    longs = mx.array([N * D, D], mx.uint64)
    (o,) = kernel(
        inputs=[q, k, v, ints, longs, D**-0.5],
        template=[("T", dtype), ("D", D)],
        grid=(1024 * Hq, L, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[dtype],
    )
    mask = "causal" if causal else None
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask=mask)
    assert distance(o, expected) <= 4 * ULP[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("name", "threads"), [("softmax_single_row", 96), ("softmax_looped", 1024), ("logsumexp", 96)]
)
def test_apple_rows(name, threads, dtype):
    """A row of 301 a threadgroup, the last loads partial."""
    mx.random.seed(2)
    x = (3 * mx.random.normal((5, 301))).astype(dtype)
    size = "threads_per_threadgroup.x," if name == "softmax_looped" else ""
    kernel = metalsim.Kernel(
        name,
        ["x", "n"],
        ["y"],
        header=apple("logsumexp.h" if name == "logsumexp" else "softmax.h"),
        source=f"""
            {name}<T, float>(x, y, n, threadgroup_position_in_grid.x,
                thread_position_in_threadgroup.x, {size} thread_index_in_simdgroup,
                simdgroup_index_in_threadgroup);
        """,
    )
    expected = (
        mx.logsumexp(x, axis=-1) if name == "logsumexp" else mx.softmax(x, axis=-1, precise=True)
    )
    (y,) = kernel(
        inputs=[x, 301],
        template=[("T", dtype)],
        grid=(5 * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[expected.shape],
        output_dtypes=[dtype],
    )
    assert distance(y, expected) <= 4 * ULP[dtype] * max(1, float(mx.abs(expected).max()))


def run_gemv(dtype, groups, a, x):
    """Apple's gemv with `groups` = (BM, BN) SIMD-groups a threadgroup."""
    rows, columns = a.shape
    kernel = metalsim.Kernel(
        "gemv_96",
        ["a", "x", "ints", "longs", "one"],
        ["y"],
        header=apple("gemv.h"),
        source="""
            gemv<T, BM, BN, 8, 4, 4, 4, false, false>(a, x, x, y, ints[1], ints[0], ints[1], one,
                one, ints[2], ints, longs, longs, longs, ints[2],
                threadgroup_position_in_grid, thread_position_in_threadgroup,
                simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
        """,
    )
    blocks = -(-rows // (32 * groups[0]))
    return kernel(
        inputs=[a, x, mx.array([rows, columns, 1]), mx.array([0], mx.int64), 1.0],
        template=[("T", dtype), ("BM", groups[0]), ("BN", groups[1])],
        grid=(32 * blocks, groups[1], groups[0]),
        threadgroup=(32, groups[1], groups[0]),
        output_shapes=[(rows,)],
        output_dtypes=[dtype],
    )[0]


@pytest.mark.parametrize("dtype", TYPES)
def test_apple_gemv(dtype):
    """Matrix times vector: SIMD-groups that leave early, a last block of columns."""
    mx.random.seed(3)
    a = mx.random.normal((96, 203)).astype(dtype)
    x = mx.random.normal((203,)).astype(dtype)
    y = run_gemv(dtype, (4, 1), a, x)
    expected = to_float(a) @ to_float(x)
    assert np.max(np.abs(to_float(y) - expected)) <= 2 * ULP[dtype] * np.max(np.abs(expected))


def test_apple_gemv_with_a_barrier_in_a_branch():
    """With two SIMD-groups a row, Apple's kernel has its barrier where one lane in four comes."""
    with pytest.raises(metalsim.Fault, match="divergent-barrier"):
        run_gemv(mx.float32, (1, 2), mx.zeros((32, 64)), mx.zeros((64,)))


# ---- how a grid runs ----


def run(source, inputs, shape, grid, threadgroup, dtype=mx.float32, header="", **how):
    """The one output of a kernel."""
    template = how.pop("template", [])
    made = {k: how.pop(k) for k in ("atomic_outputs", "ensure_row_contiguous") if k in how}
    kernel = metalsim.Kernel("k", list(inputs), ["out"], source=source, header=header, **made)
    return kernel(
        inputs=list(inputs.values()),
        template=template,
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape],
        output_dtypes=[dtype],
        **how,
    )[0]


ATTRIBUTES = [
    "thread_position_in_grid",
    "threadgroup_position_in_grid",
    "thread_position_in_threadgroup",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "dispatch_threads_per_threadgroup",
]
INDICES = [
    "thread_index_in_threadgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "dispatch_simdgroups_per_threadgroup",
]


def test_positions_in_a_grid_with_edges():
    """A grid of threads, not of threadgroups: those at the edges are smaller."""
    grid, group = (5, 7, 3), (4, 3, 2)
    columns = 3 * len(ATTRIBUTES) + len(INDICES)
    values = [f"{a}.{c}" for a in ATTRIBUTES for c in "xyz"] + INDICES
    source = "uint3 p = thread_position_in_grid; device uint* o = out;\n"
    source += "o += (p.x + 5 * (p.y + 7 * p.z)) * COLUMNS;\n"
    source += "\n".join(f"o[{i}] = {v};" for i, v in enumerate(values))
    out = np.array(
        run(
            source,
            {"x": mx.zeros((1,))},
            (3, 7, 5, columns),
            grid,
            group,
            mx.uint32,
            template=[("COLUMNS", columns)],
        )
    )
    for z, y, x in np.ndindex(3, 7, 5):
        p = np.array([x, y, z])
        size = np.array(group)
        at = p // size
        here = np.minimum(size, np.array(grid) - at * size)
        local = p - at * size
        index = local[0] + here[0] * (local[1] + here[1] * local[2])
        expected = [p, at, local, here, [2, 3, 2], grid, group]
        expected = [*np.concatenate(expected), index, 0, index, 1, 32, 1]
        assert out[z, y, x].tolist() == [int(e) for e in expected]


def test_threadgroup_is_cut_to_the_grid():
    """MLX launches no more threads in a threadgroup than the grid has."""
    source = "out[thread_position_in_grid.x] = threads_per_threadgroup.x;"
    out = run(source, {"x": mx.zeros((1,))}, (6,), (6, 1, 1), (64, 1, 1), mx.uint32)
    assert out.tolist() == [6] * 6


def test_inputs_of_every_kind():
    """Scalars and short arrays come as constant, shapes and strides beside them."""
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = flag ? scalar + few[i % 3] + many[i] + float(count) + many_shape[0] * 1000
            + many_ndim * 10000 + few_strides[0] * 100000 : -1;
    """
    many = mx.arange(40, dtype=mx.float32)
    few = mx.array([0.25, 0.5, 0.75])
    inputs = {"scalar": 0.125, "few": few, "many": many, "count": 7, "flag": True}
    out = run(source, inputs, (40,), (40, 1, 1), (16, 1, 1))
    expected = many + few[mx.arange(40) % 3] + 7.125 + 150000
    assert mx.array_equal(out, expected)


@pytest.mark.parametrize("dtype", [*TYPES, mx.int8, mx.uint16, mx.int64, mx.bool_])
def test_types_of_inputs_and_outputs(dtype):
    x = mx.array([0, 1, 0, 1, 1, 0, 0, 1, 1]).astype(dtype)
    source = "uint i = thread_position_in_grid.x; out[i] = T(x[i]);"
    out = run(source, {"x": x}, (9,), (9, 1, 1), (4, 1, 1), dtype, template=[("T", dtype)])
    assert out.dtype == dtype
    assert mx.array_equal(out, x)


def test_strided_inputs_have_gaps():
    """Without ensure_row_contiguous an input is laid out so that its strides matter."""
    x = mx.arange(24, dtype=mx.float32).reshape(2, 3, 4)
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = x[i / 12 * x_strides[0] + i / 4 % 3 * x_strides[1] + i % 4 * x_strides[2]];
    """
    where = {"shape": (24,), "grid": (24, 1, 1), "threadgroup": (8, 1, 1)}
    out = run(source, {"x": x}, ensure_row_contiguous=False, **where)
    assert mx.array_equal(out, x.reshape(-1))
    careless = "uint i = thread_position_in_grid.x; out[i] = x[i] + 0 * x_strides[0];"
    assert mx.array_equal(run(careless, {"x": x}, **where), x.reshape(-1))
    with pytest.raises(metalsim.Fault, match="between the rows"):
        run(careless, {"x": x}, ensure_row_contiguous=False, **where)
    with metalsim.metal(checked=False):
        out = run(careless, {"x": x}, ensure_row_contiguous=False, **where)
        assert mx.any(mx.isnan(out))


def test_a_short_strided_input_is_constant_and_has_gaps():
    where = {"shape": (2,), "grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    x = mx.arange(6, dtype=mx.float32).reshape(3, 2)
    source = "out[0] = x_strides[0]; out[1] = x[2 * x_strides[0] + 1];"
    assert run(source, {"x": x}, ensure_row_contiguous=False, **where).tolist() == [10, 5]


def test_what_is_not_written_is_nan_or_init_value():
    source = "if (thread_position_in_grid.x == 1) { out[1] = 5; }"
    where = {"shape": (3,), "grid": (3, 1, 1), "threadgroup": (3, 1, 1)}
    out = run(source, {"x": mx.zeros((1,))}, **where)
    assert np.isnan(np.array(out)).tolist() == [True, False, True]
    out = run(source, {"x": mx.zeros((1,))}, init_value=2, **where)
    assert out.tolist() == [2, 5, 2]


@pytest.mark.parametrize("checked", [True, False])
def test_atomics(checked):
    """Threads of all threadgroups add to one element, in the processes that share it too."""
    source = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&out[i % 2], x[0], memory_order_relaxed);
    """
    with metalsim.metal(checked=checked):
        out = run(
            source,
            {"x": mx.array([2])},
            (2,),
            (4096, 1, 1),
            (64, 1, 1),
            mx.int32,
            atomic_outputs=True,
            init_value=0,
        )
    assert out.tolist() == [4096, 4096]


def test_counters():
    source = """
        threadgroup half s[64];
        uint i = thread_position_in_grid.x, l = thread_position_in_threadgroup.x;
        simdgroup_half8x8 m;
        simdgroup_load(m, x, 8);
        simdgroup_multiply(m, m, m);
        s[l] = m.thread_elements()[0];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        ((device float4*)out)[i] = float4(*(const device half4*)(x + 4 * (l % 2)));
    """
    x = mx.zeros((64,), mx.float16)
    for checked in (True, False):
        with metalsim.metal(checked=checked) as sim:
            for _ in range(2):
                run(source, {"x": x}, (128, 4), (128, 1, 1), (64, 1, 1))
        assert sim.counters == metalsim.Counters(
            device_bytes_read=2 * 128 * (4 + 8),
            device_bytes_written=2 * 128 * 16,
            matrix_products=2 * 4,
            barriers=2 * 2,
            simdgroup_barriers=0,
            collectives=2 * 4 * (2 if checked else 1),
            dispatches=2,
        )


def test_metal_stands_in_for_mx_fast_metal_kernel():
    """Kernels made inside run in the simulator, inside a transformation too."""
    real = mx.fast.metal_kernel

    @mx.custom_function
    def square(x):
        kernel = mx.fast.metal_kernel(
            name="square",
            input_names=["x"],
            output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = T(float(x[i]) * float(x[i]));",
        )
        return kernel(
            inputs=[x],
            template=[("T", x.dtype)],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    @square.vjp
    def square_vjp(x, cotangent, output):
        return 2 * x * cotangent

    x = mx.array([1.0, 2.0, 3.0], mx.bfloat16)
    with metalsim.metal() as sim:
        gradient = mx.grad(lambda x: square(3 * x).sum())(x)
    assert gradient.tolist() == [18, 36, 54]
    assert sim.counters.dispatches == 1
    assert mx.fast.metal_kernel is real


def test_seed_changes_the_order_and_nothing_else():
    """What the last thread writes depends on the order; what is ordered does not."""
    race = "out[0] = thread_position_in_grid.x;"
    ordered = """
        threadgroup float s[128];
        uint i = thread_position_in_grid.x;
        s[i] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = s[127 - i];
    """
    x = mx.arange(128, dtype=mx.float32)
    places, results = set(), set()
    for seed in range(4):
        with metalsim.metal(seed=seed):
            with pytest.raises(metalsim.Fault) as fault:
                run(race, {"x": x}, (1,), (128, 1, 1), (128, 1, 1))
            places.add(fault.value.text)
            results.add(tuple(run(ordered, {"x": x}, (128,), (128, 1, 1), (128, 1, 1)).tolist()))
    assert len(places) > 1
    assert results == {tuple(x[::-1].tolist())}


def test_available_says_no_elsewhere(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not metalsim.available()


def test_every_function_of_the_shim_has_a_test():
    here = Path(metalsim.__file__).parent
    shim = "".join((here / name).read_text() for name in ("shim.h", "simdgroup.h"))
    tests = "".join(p.read_text() for p in here.parent.glob("test_metalsim*.py"))
    made = r"METALSIM_(?:UNARY|BINARY|TEST|REDUCTION|SHUFFLE|FILL|ATOMIC)\((\w+), "
    names = set(re.findall(made, shim)) | set(re.findall(r"METALSIM_VOTE\(\w+, (\w+)", shim))
    names |= set(re.findall(r"METALSIM_FN [^(\n]*?(\w+)\(", shim))
    names |= {
        f"simd_prefix_{kind}_{f}" for kind in ("inclusive", "exclusive") for f in ("sum", "product")
    }
    names = {n for n in names if not re.match("metalsim|name|packed|operator|__", n)}
    missing = {n for n in names if not re.search(rf"\b{n}\b", tests)}
    assert len(names) > 100
    assert not missing
