import itertools

import mlx.core as mx
import numpy as np
import pytest
import tiny
from delta_reference import from_projections, plain
from test_gated_delta_step import ROUNDING, label

from mlx_hydra import kernels
from mlx_hydra.ops import gated_delta_inputs as module
from mlx_hydra.ops.gated_delta_inputs import gated_delta_inputs
from mlx_hydra.ops.gated_delta_step import Rotation, Weights

BASE = {
    "dtype": "float32",
    "B": 1,
    "T": 7,
    "H": 3,
    "D": 32,
    "taps": 4,
    "rope": 1.0,
    "offset": 17,
    "mask": None,
    "lengths": None,
    "fresh": False,
    "weights": None,
    "scale": 1.0,
}
FAR = 524_288 - 65

# Each names what differs from BASE; all run everywhere.
CASES = [
    {},
    {"T": 65, "B": 3, "D": 64, "offset": "a sequence", "mask": "left"},
    {"T": 1, "D": 128, "dtype": "bfloat16", "fresh": True},
    {"T": 33, "D": 128, "dtype": "bfloat16", "mask": "right", "B": 2, "lengths": True},
    {"T": 20, "D": 256, "dtype": "float16", "H": 1, "taps": 8},
    {"T": 65, "D": 128, "taps": 2, "rope": 1.25, "offset": FAR},
    # Of which eps takes a part.
    {"H": 5, "rope": 1.25, "scale": 1e-5},
    {"T": 16, "B": 3, "taps": 3, "dtype": "float16", "lengths": True, "fresh": True},
    {"T": 17, "taps": 0, "rope": None, "dtype": "bfloat16", "B": 2, "mask": "right"},
    {"T": 5, "B": 3, "D": 256, "rope": None, "mask": "random", "lengths": True, "H": 2},
    {"T": 18, "D": 64, "taps": 3, "dtype": "float16", "weights": "float32", "B": 2},
    {"T": 7, "B": 3, "taps": 8, "offset": "a sequence", "lengths": True, "mask": "right"},
]

# The rest of the grid, where a GPU runs it.
GRID = [
    {"dtype": dtype, "D": D, "T": T, "B": B, "taps": taps, "mask": mask, "H": 14, "fresh": fresh}
    for dtype, D, (T, B, taps, mask, fresh) in itertools.product(
        ("float32", "float16", "bfloat16"),
        (32, 64, 128, 256),
        [
            (1, 3, 4, None, False),
            (7, 1, 2, "left", True),
            (65, 3, 3, "random", False),
            (300, 2, 4, "right", False),
            (513, 1, 8, None, True),
            (64, 2, 0, "left", True),
        ],
    )
]


def inputs(case, seed=0):
    """Random projections, and the other arguments by name."""
    B, T, H, D, taps = (case[k] for k in ("B", "T", "H", "D", "taps"))
    rng = np.random.default_rng(seed)
    dtype = getattr(mx, case["dtype"])
    learned = getattr(mx, case["weights"] or case["dtype"])

    def random(*shape, scale=1.0, mean=0.0, dtype=dtype):
        return mx.array(mean + scale * rng.standard_normal(shape), dtype)

    C = H * D
    mask = {
        None: None,
        "left": np.arange(T) >= 2 * np.arange(B)[:, None],
        "right": np.arange(T) < T - 3 * np.arange(B)[:, None],
        "random": rng.random((B, T)) < 0.6,
    }[case["mask"]]
    offset = case["offset"]
    arguments = {
        "weights": Weights(
            random(D, scale=0.2, mean=1, dtype=learned),
            random(D, scale=0.2, mean=1, dtype=learned),
            mx.array(rng.uniform(-2, 1, H), mx.float32),
            mx.array(rng.uniform(-2, 1, H), mx.float32),
            1e-5,
            tuple(random(C, taps, 1, scale=0.5, dtype=learned) for _ in range(3)) if taps else None,
        ),
        "past": random(B, taps - 1, 3 * C, scale=case["scale"])
        if taps and not case["fresh"]
        else None,
        "offset": mx.array([3, -2, 250][:B], mx.int32) if offset == "a sequence" else offset,
        "mask": None if mask is None else mx.array(mask),
        "lengths": mx.array([T - 1, 1, T + 5][:B], mx.int32) if case["lengths"] else None,
        "rotation": None
        if case["rope"] is None
        else Rotation(mx.array(1e4 ** -(np.arange(0, D, 2) / D), mx.float32), case["rope"]),
    }
    projections = [random(B, T, C, scale=case["scale"]) for _ in range(3)]
    return [*projections, random(B, T, H), random(B, T, H)], arguments


def rope_of(rotation):
    if rotation is None:
        return None

    def rope(x, offset):
        scale, freqs = rotation.scale, 1 / rotation.frequencies
        return mx.fast.rope(
            scale * x,
            x.shape[-1],
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )

    return rope


def run(projections, arguments, backend):
    return gated_delta_inputs(
        *projections, **arguments, rope=rope_of(arguments["rotation"]), backend=backend
    )


def check(found, expected, dtype):
    *found, past = found
    *expected, true_past = expected
    dtypes = [getattr(mx, dtype)] * 3 + [mx.float32] * 2
    assert [x.dtype for x in found] == dtypes
    for x, y, rounding in zip(found, expected, [ROUNDING[dtype]] * 3 + [0] * 2):
        assert x.shape == y.shape
        error = np.abs(plain(x) - y)
        assert (error <= rounding * np.abs(y) + 2e-5 * np.abs(y).max()).all(), error.max()
    if true_past is None:
        assert past is None
    else:
        assert past.dtype == dtypes[0]
        assert np.array_equal(plain(past), true_past)


# The simulator takes the cases that cover it, a GPU the whole grid too.
@pytest.mark.parametrize(
    "case", CASES if kernels.gpu_backend() is None else [*CASES, *GRID], ids=label
)
def test_the_kernel_is_right_to_float64(case, kernel_backend):
    case = BASE | case
    projections, arguments = inputs(case)
    found = run(projections, arguments, kernel_backend)
    check(found, from_projections(*projections, **arguments), case["dtype"])


# MLX's RoPE takes periods: their reciprocals differ by the rounding that an angle of FAR shows.
@pytest.mark.parametrize(
    "case", [c for c in CASES if "dtype" not in c and c.get("offset") != FAR], ids=label
)
def test_so_are_plain_ops(case):
    case = BASE | case
    projections, arguments = inputs(case)
    if isinstance(arguments["offset"], mx.array):
        # On a GPU MLX's RoPE takes them for unsigned. Only padding is before the first token.
        arguments["offset"] = mx.maximum(arguments["offset"], 0)
    found = run(projections, arguments, "ops")
    check(found, from_projections(*projections, **arguments), case["dtype"])


@pytest.mark.parametrize("backend", ["kernel", "ops"])
@pytest.mark.parametrize("mask", [None, "random"])
def test_splitting_a_sequence_changes_nothing(mask, backend, kernel_backend):
    backend = kernel_backend if backend == "kernel" else backend
    case = BASE | {"T": 40, "B": 2, "mask": mask}
    projections, arguments = inputs(case)
    whole = run(projections, arguments, backend)
    for at in (1, 2, 3, 15, 16, 17, 39):
        past, parts = arguments["past"], []
        for part in (slice(0, at), slice(at, 40)):
            changed = {"past": past, "offset": 17 + part.start}
            if mask is not None:
                changed["mask"] = arguments["mask"][:, part]
            *outputs, past = run([x[:, part] for x in projections], arguments | changed, backend)
            parts.append(outputs)
        joined = [mx.concatenate(x, axis=1) for x in zip(*parts)]
        for x, y in zip([*joined, past], whole):
            assert tiny.distance(x, y) < 1e-5


@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[9]], ids=label)
def test_gradients_are_those_of_ops(case, kernel_backend):
    case = BASE | case | {"dtype": "float32", "weights": None, "T": 9}
    projections, arguments = inputs(case)
    weights, past = arguments["weights"], arguments["past"]
    learned = [*weights[:4], *(weights.convolution or ())]
    primals = [*projections, *learned, *([] if past is None else [past])]

    def gradients(backend):
        def loss(*arrays):
            own = arrays[5 : 5 + len(learned)]
            changed = {
                "weights": Weights(*own[:4], weights.norm_eps, tuple(own[4:]) or None),
                "past": None if past is None else arrays[-1],
            }
            outputs = run(arrays[:5], arguments | changed, backend)
            slopes = mx.random.key(0)
            return sum(
                (x * mx.random.normal(x.shape, key=slopes)).sum() for x in outputs if x is not None
            )

        return mx.grad(loss, argnums=tuple(range(len(primals))))(*primals)

    for found, expected in zip(gradients(kernel_backend), gradients("ops")):
        assert mx.abs(expected).max().item() > 0
        assert tiny.distance(found, expected) <= 1e-5 * mx.abs(expected).max().item()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_may_hold_anything(poison, kernel_backend):
    case = BASE | {"T": 19, "B": 3, "mask": "random", "lengths": True}
    projections, arguments = inputs(case)
    expected = from_projections(*projections, **arguments)
    mask = arguments["mask"][..., None]
    projections[:3] = [mx.where(mask, x, poison) for x in projections[:3]]
    check(run(projections, arguments, kernel_backend), expected, "float32")


@pytest.mark.parametrize("dtype", ROUNDING)
def test_arrays_may_lie_anywhere(dtype, kernel_backend):
    case = BASE | {"T": 9, "D": 128, "H": 2, "dtype": dtype}
    projections, arguments = inputs(case)
    expected = from_projections(*projections, **arguments)

    def moved(x):
        """The same array, an element past the start of its buffer."""
        return mx.concatenate([mx.zeros(1, x.dtype), x.reshape(-1)])[1:].reshape(x.shape)

    weights = arguments["weights"]
    arguments["weights"] = weights._replace(convolution=tuple(map(moved, weights.convolution)))
    arguments["past"] = moved(arguments["past"])
    check(run(map(moved, projections), arguments, kernel_backend), expected, dtype)
    # As the parts of one product.
    ends = np.cumsum([x.shape[-1] for x in projections])[:-1].tolist()
    parts = mx.split(mx.concatenate(projections, axis=-1), ends, axis=-1)
    check(run(parts, arguments, kernel_backend), expected, dtype)
    # Token by token, and channel by channel.
    turned = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in projections]
    check(run(turned, arguments, kernel_backend), expected, dtype)
    turned = [mx.contiguous(x.swapaxes(0, 1)).swapaxes(0, 1) for x in projections]
    check(run(turned, arguments, kernel_backend), expected, dtype)


def test_what_the_kernel_does_not_take_runs_on_ops(kernel_backend):
    def backends(arguments=None, **changes):
        projections, others = inputs(BASE | changes)
        others |= arguments or {}
        with pytest.raises(ValueError, match="this call runs on ops only"):
            run(projections, others, kernel_backend)
        return run(projections, others, "auto")

    q, *_ = backends(D=48)
    assert q.shape == (1, 7, 3, 48)
    backends(taps=9)
    backends(taps=1)
    projections, others = inputs(BASE)
    rotation = others.pop("rotation")
    rope = rope_of(rotation)
    for known in (None, Rotation(rotation.frequencies[:4])):
        with pytest.raises(ValueError, match="ops only"):
            gated_delta_inputs(
                *projections, **others, rope=rope, rotation=known, backend=kernel_backend
            )
    projections[1] = projections[1].astype(mx.float16)
    with pytest.raises(ValueError, match="ops only"):
        gated_delta_inputs(*projections, **others, backend=kernel_backend)


def test_shapes_that_do_not_fit_are_named():
    projections, arguments = inputs(BASE)
    q, k, v, a, b = projections
    for changed, message in (
        ([q, k[:, 1:], v, a, b], r"k has shape \(1, 6, 96\), expected \(1, 7, 96\)"),
        ([q, k, v, a, b[..., 1:]], r"b has shape \(1, 7, 2\), expected \(1, 7, 3\)"),
        ([q[0], k, v, a, b], r"expected \[B, T, H \* D\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(changed, arguments, "ops")
    for name, wrong in (("past", mx.zeros((1, 4, 288))), ("mask", mx.ones((1, 6), mx.bool_))):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            run(projections, arguments | {name: wrong}, "ops")


def test_the_model_prefills_and_trains_through_the_kernel(kernel_backend, monkeypatch):
    calls = []
    by_kernel = module._by_kernel

    def watched(*arguments):
        calls.append(arguments[1][0].shape[1])
        return by_kernel(*arguments)

    monkeypatch.setattr(module, "_by_kernel", watched)
    model = tiny.model(head_dim=32)
    cache = model.make_cache()
    mx.eval(model(tiny.tokens(12), cache=cache))
    mx.eval(model(tiny.tokens(3), cache=cache))
    assert calls == [12, 12]
    mx.eval(model(tiny.tokens(5)))
    assert calls == [12, 12, 5, 5]
