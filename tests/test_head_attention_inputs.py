import itertools

import mlx.core as mx
import numpy as np
import pytest
import tiny
from delta_reference import normed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache
from test_gated_delta_inputs import BASE as DELTA_BASE
from test_gated_delta_inputs import FAR, rope_of
from test_gated_delta_inputs import inputs as delta_inputs
from test_gated_delta_step import ROUNDING, label

from mlx_hydra import kernels
from mlx_hydra.ops import head_attention_inputs as module
from mlx_hydra.ops.gated_delta_inputs import gated_delta_inputs
from mlx_hydra.ops.gated_delta_step import Rotation
from mlx_hydra.ops.head_attention_inputs import head_attention_inputs, log_scales

BASE = {
    "dtype": "float32",
    "B": 1,
    "T": 7,
    "heads": (2, 1),
    "D": 64,
    "rope": None,
    "base": None,
    "offset": 17,
    "weights": None,
    "layout": "apart",
    "scale": 1.0,
}

# Each names what differs from BASE; all run everywhere.
CASES = [
    {},
    {"D": 32, "T": 65, "B": 3, "heads": (3, 1), "rope": 1.0, "base": 16, "offset": "a sequence"},
    {"D": 128, "T": 64, "dtype": "bfloat16", "rope": 1.0, "base": 512, "layout": "product"},
    {"D": 128, "T": 63, "dtype": "bfloat16", "base": 512, "layout": "odd", "offset": "one"},
    {"D": 256, "dtype": "float16", "heads": (2, 2), "rope": 1.25, "B": 2, "layout": "odd"},
    {"D": 256, "T": 3, "rope": 1.0, "base": 16, "B": 3, "offset": "one"},
    {"D": 128, "T": 65, "rope": 1.25, "base": 16, "offset": FAR},
    {"T": 1, "dtype": "float16", "rope": 1.0, "base": 2.5, "offset": "one"},
    {"T": 1, "heads": (3, 1), "B": 3, "rope": 1.0, "base": 16, "offset": "a sequence"}
    | {"layout": "token"},
    {"T": 1, "D": 128, "dtype": "bfloat16", "base": 512, "offset": "one", "layout": "token"},
    {"T": 1, "D": 256, "heads": (2, 2), "B": 2, "base": 16, "layout": "token", "offset": "one"},
    {"D": 32, "T": 300, "heads": (1, 1), "dtype": "bfloat16", "rope": 1.0, "offset": 0},
    {"D": 32, "T": 5, "heads": (2, 2), "dtype": "float16", "base": 16, "layout": "product"},
    # More than a threadgroup takes: 7 and 7 of queries, keys and values; 5 and 4, from a key on.
    {"T": 9, "heads": (8, 3), "B": 2, "rope": 1.0, "base": 16, "layout": "turned"},
    {"T": 9, "heads": (3, 3), "rope": 1.0, "dtype": "bfloat16", "layout": "rows", "B": 2},
    # Of which eps takes a part.
    {"rope": 1.25, "scale": 1e-3, "offset": -5, "base": 16},
    {"weights": "float32", "dtype": "bfloat16", "B": 3, "offset": "a sequence", "base": 16},
    {"D": 128, "T": 9, "base": 512, "offset": FAR, "layout": "rows", "B": 3},
]

# The rest of the grid, where a GPU runs it.
GRID = [
    {"dtype": dtype, "D": D, "T": T, "B": B, "heads": heads, "rope": rope, "base": base}
    | {"offset": offset, "layout": layout}
    for dtype, D, (T, B, heads, rope, base, offset, layout) in itertools.product(
        ("float32", "float16", "bfloat16"),
        (32, 64, 128, 256),
        [
            (1, 3, (3, 1), 1.0, 16, "a sequence", "product"),
            (1, 3, (3, 1), 1.0, 16, "a sequence", "token"),
            (1, 1, (2, 1), None, 512, "one", "token"),
            (7, 2, (2, 2), None, 512, "one", "odd"),
            (63, 1, (16, 8), 1.25, None, 0, "product"),
            (64, 3, (2, 1), None, None, 100, "turned"),
            (65, 1, (1, 1), 1.0, 512, FAR, "odd"),
            (300, 3, (5, 2), 1.0, 16, "a sequence", "rows"),
            (2048, 1, (2, 1), None, 512, 4096, "product"),
        ],
    )
]


def moved(arrays, layout):
    """The same projections ``[B, T, C]`` as they may lie in memory; ``[B, C]`` of a token."""
    if layout == "token":
        return [x[:, 0] for x in moved(arrays, "product")]
    if layout in ("product", "odd"):
        # Parts of one product, with others around them; from an odd channel on.
        B, T, _ = arrays[0].shape
        first = mx.ones((B, T, 8 if layout == "product" else 7), arrays[0].dtype)
        ends = np.cumsum([x.shape[-1] for x in (first, *arrays)]).tolist()
        product = mx.concatenate([first, *arrays, first], axis=-1)
        return mx.split(product, ends, axis=-1)[1:-1]
    axes = {"apart": None, "turned": (1, 2), "rows": (0, 1)}[layout]
    if axes is None:
        return arrays
    return [mx.contiguous(x.swapaxes(*axes)).swapaxes(*axes) for x in arrays]


def inputs(case, seed=0):
    """Random projections and norms, and the other arguments by name."""
    B, T, (Hf, Hk), D = (case[k] for k in ("B", "T", "heads", "D"))
    rng = np.random.default_rng(seed)
    dtype = getattr(mx, case["dtype"])
    learned = getattr(mx, case["weights"] or case["dtype"])
    projections = [
        mx.array(case["scale"] * rng.standard_normal((B, T, H * D)), dtype) for H in (Hf, Hk, Hk)
    ]
    norms = [mx.array(1 + 0.2 * rng.standard_normal(D), learned) for _ in range(2)]
    offset = {"a sequence": [3, -2, 250][:B], "one": [41]}.get(case["offset"], case["offset"])
    arguments = {
        "eps": 1e-5,
        "offset": mx.array(offset, mx.int32) if isinstance(offset, list) else offset,
        "log_scale_base": case["base"],
        "rotation": None
        if case["rope"] is None
        else Rotation(mx.array(1e4 ** -(np.arange(0, D, 2) / D), mx.float32), case["rope"]),
    }
    return [*moved(projections, case["layout"]), *norms], arguments


def run(arrays, arguments, backend):
    return head_attention_inputs(
        *arrays, **arguments, rope=rope_of(arguments["rotation"]), backend=backend
    )


def plain(x):
    return np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x, np.float64)


def reference(arrays, arguments):
    """The same in float64."""
    q, k, v, q_norm, k_norm = map(plain, arrays)
    q, k, v = (x[:, None] if x.ndim == 2 else x for x in (q, k, v))
    (B, T, _), (D,) = q.shape, q_norm.shape
    q, k, v = (x.reshape(B, T, -1, D).swapaxes(1, 2) for x in (q, k, v))
    eps, base, rotation = (arguments[name] for name in ("eps", "log_scale_base", "rotation"))
    q, k = q_norm * normed(q, eps), k_norm * normed(k, eps)
    offset = np.atleast_1d(np.array(arguments["offset"]))[:, None]
    positions = np.broadcast_to(offset + np.arange(T), (B, T))
    if rotation is not None:
        # The angle is a float32 product in every implementation.
        angle = positions.astype(np.float32)[..., None] * np.array(rotation.frequencies)
        angle = angle.astype(np.float64)[:, None]
        cosine, sine = (rotation.scale * f(angle) for f in (np.cos, np.sin))
        q, k = (
            np.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1)
            for a, b in (np.split(x, 2, axis=-1) for x in (q, k))
        )
    if base is not None:
        q = q * (np.log(np.maximum(positions, 0) + base) / np.log(base))[:, None, :, None]
    return q, k, v


def check(found, expected, dtype):
    for x, y in zip(found, expected):
        assert x.dtype == getattr(mx, dtype)
        assert x.shape == y.shape
        error = np.abs(plain(x) - y)
        assert (error <= ROUNDING[dtype] * np.abs(y) + 2e-5 * np.abs(y).max()).all(), error.max()
    # Which are moved and not computed.
    assert np.array_equal(plain(found[2]), expected[2])


# The simulator takes the cases that cover it, a GPU the whole grid too.
@pytest.mark.parametrize(
    "case", CASES if kernels.gpu_backend() is None else [*CASES, *GRID], ids=label
)
def test_the_kernel_is_right_to_float64(case, kernel_backend):
    case = BASE | case
    arrays, arguments = inputs(case)
    check(run(arrays, arguments, kernel_backend), reference(arrays, arguments), case["dtype"])


# MLX's RoPE takes periods: their reciprocals differ by the rounding that an angle of FAR shows.
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if "dtype" not in c and not ("rope" in c and c.get("offset") == FAR)],
    ids=label,
)
def test_so_are_plain_ops(case):
    case = BASE | case
    arrays, arguments = inputs(case)
    if case["rope"] is not None:
        # On a GPU MLX's RoPE takes them for unsigned. Only padding is before the first token.
        offset = arguments["offset"]
        arguments["offset"] = max(offset, 0) if isinstance(offset, int) else mx.maximum(offset, 0)
    check(run(arrays, arguments, "ops"), reference(arrays, arguments), case["dtype"])


@settings(max_examples=24, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_is_right(kernel_backend, data):
    def draw(**choices):
        return {name: data.draw(strategy, name) for name, strategy in choices.items()}

    numbers, pick = st.integers, st.sampled_from
    case = BASE | draw(
        dtype=pick(list(ROUNDING)),
        B=numbers(1, 3),
        T=numbers(1, 20),
        heads=st.tuples(numbers(1, 9), numbers(1, 4)),
        D=pick([32, 64]),
        rope=pick([None, 1.0]),
        base=pick([None, 16]),
        offset=pick([0, 17, -3, "one", "a sequence"]),
        layout=pick(["apart", "product", "odd", "turned", "rows", "token"]),
    )
    if case["layout"] == "token":
        case["T"] = 1
    arrays, arguments = inputs(case)
    check(run(arrays, arguments, kernel_backend), reference(arrays, arguments), case["dtype"])


@pytest.mark.parametrize("others", [0, 5, 24])
@pytest.mark.parametrize(
    "changes",
    [
        {"T": 1, "B": 3, "layout": "token", "heads": (3, 2), "base": 16},
        {"T": 1, "layout": "token", "D": 128, "dtype": "bfloat16", "base": 512, "offset": "one"},
        {"T": 6, "B": 2, "heads": (5, 3), "rope": 1.0, "base": 16, "offset": "a sequence"},
        {"T": 9, "heads": (1, 1), "rope": 1.25, "dtype": "float16", "D": 32},
    ],
    ids=label,
)
def test_all_may_stand_side_by_side(changes, others, kernel_backend):
    case = BASE | changes
    arrays, arguments = inputs(case)
    expected = reference(arrays, arguments)
    after = mx.full((*arrays[0].shape[:-1], others), float("nan"), arrays[0].dtype)
    joined = mx.concatenate([*arrays[:3], after], axis=-1)
    arguments["heads"] = case["heads"]
    found = run([joined, None, None, *arrays[3:]], arguments, kernel_backend)
    check(found, expected, case["dtype"])
    found = run([joined, None, None, *arrays[3:]], arguments, "ops")
    for x, y in zip(found, run(arrays, arguments | {"heads": None}, "ops")):
        assert mx.array_equal(x, y)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_arrays_may_lie_anywhere(dtype, kernel_backend):
    case = BASE | {"B": 3, "T": 6, "D": 128, "dtype": dtype, "rope": 1.0, "base": 16}
    arrays, arguments = inputs(case | {"offset": "a sequence"})
    expected = reference(arrays, arguments)

    def behind(x, by=1):
        """The same array, an element past the start of its buffer."""
        return mx.concatenate([mx.zeros(by, x.dtype), x.reshape(-1)])[by:].reshape(x.shape)

    def between(x):
        """The same numbers, with others between them."""
        return mx.repeat(x, 2)[::2]

    check(run([*map(behind, arrays)], arguments, kernel_backend), expected, dtype)
    arrays[3:] = map(between, arrays[3:])
    arguments["offset"] = between(arguments["offset"])
    check(run(arrays, arguments, kernel_backend), expected, dtype)
    # A sequence's position for all, as a view.
    arguments["offset"] = mx.broadcast_to(mx.array([9], mx.int32), (3,))
    check(run(arrays, arguments, kernel_backend), reference(arrays, arguments), dtype)


@pytest.mark.parametrize("backend", ["kernel", "ops"])
@pytest.mark.parametrize("base", [None, 16])
def test_splitting_a_sequence_changes_nothing(base, backend, kernel_backend):
    backend = kernel_backend if backend == "kernel" else backend
    arrays, arguments = inputs(BASE | {"T": 20, "B": 2, "rope": 1.25, "base": base})
    whole = run(arrays, arguments, backend)
    for at in (1, 3, 4, 19):
        parts = [
            run(
                [*(x[:, part] for x in arrays[:3]), *arrays[3:]],
                arguments | {"offset": 17 + part.start},
                backend,
            )
            for part in (slice(0, at), slice(at, 20))
        ]
        for x, y in zip(zip(*parts), whole):
            assert tiny.distance(mx.concatenate(x, axis=2), y) < 1e-5


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_tokens_and_heads_do_not_meet(poison, kernel_backend):
    case = BASE | {"T": 9, "B": 2, "heads": (3, 2), "rope": 1.0, "base": 16}
    arrays, arguments = inputs(case)
    expected = reference(arrays, arguments)
    # One token's keys of the second head, and another's first queries.
    for x, (token, head) in zip(arrays, ((4, 0), (6, 1))):
        x[1, token, head * 64 : (head + 1) * 64] = poison
    q, k, v = (np.array(x) for x in run(arrays, arguments, kernel_backend))
    assert np.isnan(q[1, 0, 4]).all() and np.isnan(k[1, 1, 6]).all()
    q[1, 0, 4], k[1, 1, 6] = expected[0][1, 0, 4], expected[1][1, 1, 6]
    check([mx.array(x) for x in (q, k, v)], expected, "float32")


def loss_and_gradients(arrays, arguments, slopes, backend):
    def loss(*arrays):
        outputs = run(arrays, arguments, backend)
        return sum((x * mx.array(slope, x.dtype)).sum() for x, slope in zip(outputs, slopes))

    return mx.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)


@pytest.mark.parametrize("case", [{}, CASES[1], CASES[4], CASES[5]], ids=label)
def test_gradients_are_those_of_ops_and_of_float64(case, kernel_backend):
    case = BASE | case | {"dtype": "float32", "T": 5}
    arrays, arguments = inputs(case)
    if case["offset"] == "a sequence":
        arguments["offset"] = mx.maximum(arguments["offset"], 0)
    rng = np.random.default_rng(1)
    slopes = [rng.standard_normal(x.shape) for x in reference(arrays, arguments)]
    found = loss_and_gradients(arrays, arguments, slopes, kernel_backend)
    for x, y in zip(found, loss_and_gradients(arrays, arguments, slopes, "ops")):
        assert mx.abs(y).max().item() > 0
        assert tiny.distance(x, y) <= 1e-5 * mx.abs(y).max().item()

    def loss(*arrays):
        outputs = reference(arrays, arguments)
        return sum((x * slope).sum() for x, slope in zip(outputs, slopes))

    own, step = [plain(x) for x in arrays], 1e-5
    for i, gradient in enumerate(found):
        direction = rng.standard_normal(own[i].shape)
        ahead, back = (
            loss(*own[:i], own[i] + side * step * direction, *own[i + 1 :]) for side in (1, -1)
        )
        slope = (plain(gradient) * direction).sum()
        scale = np.linalg.norm(plain(gradient)) * np.linalg.norm(direction)
        assert abs((ahead - back) / (2 * step) - slope) <= 1e-5 * scale


def test_ops_are_compiled_for_any_position():
    arrays, arguments = inputs(BASE | {"B": 2, "rope": 1.0, "base": 16})

    def at(offset):
        return run(arrays, arguments | {"offset": offset}, "ops")

    compiled = mx.compile(at)
    for offset in (0, 40, 1000):
        for x, y in zip(compiled(mx.array([offset])), at(offset)):
            assert tiny.distance(x, y) <= 1e-5


@pytest.mark.parametrize("offset", [[41], [3, 9, 4]], ids=str)
def test_rope_gets_one_position_as_a_number(offset):
    # Of an array with an axis MLX's kernels on GPUs take an entry a sequence, however many it has.
    seen, offset = [], mx.array(offset)

    def rope(x, offset):
        seen.append(offset.shape)
        return x

    arrays, arguments = inputs(BASE | {"B": 3})
    head_attention_inputs(*arrays, **(arguments | {"offset": offset}), rope=rope, backend="ops")
    projections, arguments = delta_inputs(DELTA_BASE | {"B": 3})
    gated_delta_inputs(*projections, **(arguments | {"offset": offset}), rope=rope, backend="ops")
    assert seen == [() if offset.size == 1 else (3,)] * 4


def test_log_scales_of_numbers_and_arrays():
    expected = np.log(np.maximum(np.arange(-2, 5), 0) + 16) / np.log(16)
    assert tiny.distance(log_scales(-2, 7, 16), expected[:, None].astype(np.float32)) == 0
    found = log_scales(mx.array([-2, 0]), 5, 16)
    assert found.shape == (2, 1, 5, 1) and found.dtype == mx.float32
    assert np.abs(plain(found)[:, 0, :, 0] - np.stack([expected[:5], expected[2:]])).max() < 1e-6


@pytest.mark.parametrize("changes", [{"D": 80}, {"D": 96}, {"D": 48}], ids=label)
def test_sizes_that_the_kernel_does_not_take_run_on_ops(changes, kernel_backend):
    arrays, arguments = inputs(BASE | changes | {"rope": 1.0, "base": 16})
    with pytest.raises(ValueError, match="this call runs on ops only"):
        run(arrays, arguments, kernel_backend)
    check(run(arrays, arguments, "auto"), reference(arrays, arguments), "float32")


def test_so_do_mixed_types_and_unknown_rotations(kernel_backend):
    arrays, arguments = inputs(BASE | {"rope": 1.0})
    q, k, v, q_norm, k_norm = arrays
    half = mx.float16
    for changed in (
        (q.astype(half), k, v, q_norm, k_norm),
        (q, k, v.astype(half), q_norm, k_norm),
        (q, k, v, q_norm.astype(half), k_norm),
    ):
        with pytest.raises(ValueError, match="ops only"):
            run(changed, arguments, kernel_backend)
        assert [x.dtype for x in run(changed, arguments, "auto")] == [changed[0].dtype] * 3
    part = Rotation(arguments["rotation"].frequencies[:8])
    for changes in (
        {"offset": mx.array([17], mx.int64)},
        {"offset": 2**31 - 20},
        {"offset": -(2**31) - 1},
        {"rotation": None},
        {"rotation": part},
    ):
        with pytest.raises(ValueError, match="ops only"):
            head_attention_inputs(
                *arrays,
                **(arguments | changes),
                rope=rope_of(arguments["rotation"]),
                backend=kernel_backend,
            )


def test_shapes_that_do_not_fit_are_named():
    arrays, arguments = inputs(BASE | {"B": 2})
    q, k, v, q_norm, k_norm = arrays
    for changed, message in (
        ([q[0, 0], k, v, q_norm, k_norm], r"q has shape \(128,\), expected \[B, T, H \* 64\] or"),
        ([q[:, 0], k, v, q_norm, k_norm], r"k has shape \(2, 7, 64\), expected \(2, 64\)"),
        ([q[..., 1:], k, v, q_norm, k_norm], r"q has shape \(2, 7, 127\), expected \[B, T, H"),
        ([q, k[:, 1:], v, q_norm, k_norm], r"k has shape \(2, 6, 64\), expected \(2, 7, 64\)"),
        ([q, k[..., 1:], v, q_norm, k_norm], r"k has shape \(2, 7, 63\), expected \[B, T, H"),
        ([q, k, q, q_norm, k_norm], r"v has shape \(2, 7, 128\), expected \(2, 7, 64\)"),
        ([q, k, v, q_norm, k_norm[1:]], r"k_norm has shape \(63,\), expected \(64,\)"),
        ([q, k, v, q_norm[None], k_norm], r"q_norm has shape \(1, 64\), expected \[D\]"),
    ):
        with pytest.raises(ValueError, match=f"^head_attention_inputs: {message}"):
            run(changed, arguments, "ops")
    for offset in (mx.array(3), mx.array([1, 2, 3])):
        with pytest.raises(ValueError, match=r"head_attention_inputs: offset has shape .* \[2\]"):
            run(arrays, arguments | {"offset": offset}, "ops")
    for base in (1, 0, -2.0):
        with pytest.raises(ValueError, match=f"log_scale_base={base}, expected a number over 1"):
            run(arrays, arguments | {"log_scale_base": base}, "ops")
    joined = [mx.concatenate([q, k, v], axis=-1), None, None, q_norm, k_norm]
    for heads in ((3, 1), (2, 2), (0, 1), (2, 0)):
        with pytest.raises(ValueError, match=r"heads=.* of 64 channels in q, .* \(2, 7, 256\)"):
            run(joined, arguments | {"heads": heads}, "ops")


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries that the kernel takes, as they would lie by themselves."""
    found, by_kernel = [], module._by_kernel

    def watched(*arguments):
        made = by_kernel(*arguments)
        B, H, T, D = made[0].shape
        found.append((B, T, H * D))
        return made

    monkeypatch.setattr(module, "_by_kernel", watched)
    return found


@pytest.mark.parametrize("rope", [False, True])
def test_the_model_reads_answers_and_trains_through_the_kernel(rope, kernel_backend, calls):
    model = tiny.model(
        head_dim=32, full_attention={"rope": rope, "log_scale_base": 16, "gate": True}
    )
    cache = model.make_cache()
    mx.eval(model(tiny.tokens(12), cache=cache))
    mx.eval(model(tiny.tokens(3), cache=cache))
    mx.eval(model(tiny.tokens(1), cache=cache))
    assert calls == [(1, T, heads * 32) for T in (12, 3, 1) for heads in (3, 4)]
    mx.eval(model(tiny.tokens(5)))
    assert calls[6:] == [(1, 5, 96), (1, 5, 128)]


def test_a_batch_has_a_position_for_each_sequence(kernel_backend, calls):
    model = tiny.model(
        head_dim=32,
        full_attention_heads=[[0, 1, 2, 3]] * 2,
        num_hidden_layers=2,
        full_attention={"rope": True, "log_scale_base": 16, "gate": True},
    )
    lengths, tokens = [9, 6], tiny.tokens(9)
    cache = [BatchKVCache([0, 3]) for _ in model.layers]
    padded = mx.concatenate([tokens, mx.pad(tokens[:, :6], [(0, 0), (3, 0)])])
    found = model(padded, cache=cache)
    assert calls == [(2, 9, 128)] * 2
    for row, length in zip(found, lengths):
        alone = model(tokens[:, :length])[0]
        assert tiny.distance(row[9 - length :], alone) < 1e-4
