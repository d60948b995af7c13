"""normed_linear against float64, on what GPU there is or in the simulator."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gated_delta_step import ROUNDING, label

from mlx_hydra import kernels
from mlx_hydra.ops.normed_linear import linear_backend, normed_linear

BASE = {
    "dtype": "float32",
    "rows": 1,
    "K": 64,
    "N": 12,
    "tail": 0,
    "bits": None,
    "group_size": 32,
    "swiglu": False,
    "norm": None,
    "scale": 1.0,
}

# Each names what differs from BASE; all run everywhere.
CASES = [
    {},
    # More than all lanes read in two turns, and no multiple of that; rows of several threadgroups.
    {"K": 1028, "N": 70, "rows": 3},
    {"K": 2056, "dtype": "bfloat16", "N": 37, "rows": 2},
    {"K": 8, "dtype": "float16", "N": 1, "rows": 4},
    {"K": 520, "dtype": "bfloat16", "N": 66, "swiglu": True},
    {"K": 132, "N": 2, "swiglu": True, "rows": 4},
    {"dtype": "float16", "N": 14, "swiglu": True, "rows": 3, "norm": "float32"},
    {"dtype": "bfloat16", "N": 9, "tail": 6, "norm": "float16"},
    {"K": 1056, "bits": 4, "N": 11, "tail": 3, "rows": 2},
    {"K": 640, "bits": 8, "group_size": 64, "dtype": "bfloat16", "N": 36, "tail": 4},
    {"K": 256, "bits": 4, "group_size": 128, "dtype": "float16", "N": 10, "swiglu": True},
    {"K": 96, "bits": 8, "N": 6, "swiglu": True, "rows": 4, "dtype": "bfloat16"},
    {"K": 128, "bits": 8, "group_size": 64, "rows": 2, "N": 20, "tail": 8},
    # Packed, and more columns than are at hand at a time.
    {"rows": 4, "K": 1056, "bits": 4, "N": 17, "tail": 5, "dtype": "bfloat16"},
    # Of which eps takes a part.
    {"scale": 1e-3},
]

# The rest of the grid, where a GPU runs it.
GRID = [
    {"dtype": dtype, "rows": rows, "K": K, "N": N, "bits": bits, "tail": tail, "swiglu": swiglu}
    for dtype, rows, (K, N, bits, tail, swiglu) in itertools.product(
        ("float32", "float16", "bfloat16"),
        (1, 2, 3, 4),
        [
            (2048, 7968, None, 0, False),
            (2048, 12288, None, 0, True),
            (1000, 301, None, 7, False),
            (2048, 1024, 4, 32, False),
            (4096, 514, 4, 0, True),
            (1152, 131, 8, 5, False),
            (96, 22, 8, 0, True),
        ],
    )
]


def inputs(case, seed=0):
    """Random arguments by name, and options."""
    rng = np.random.default_rng(seed)
    dtype, K = getattr(mx, case["dtype"]), case["K"]

    def random(*shape, scale=1.0, mean=0.0):
        return mx.array(mean + scale * rng.standard_normal(shape), dtype)

    weight, options = random(case["N"], K), {}
    if case["bits"] is not None:
        options = {"group_size": case["group_size"], "bits": case["bits"]}
        weight = mx.quantize(weight, **options)
    if case["tail"]:
        options["tail"] = random(case["tail"], K)
    arguments = [random(case["rows"], K, scale=case["scale"]) for _ in range(2)]
    norm = random(K, scale=0.2, mean=1)
    if case["norm"] is not None:
        norm = norm.astype(getattr(mx, case["norm"]))
    return [*arguments, norm, weight], options | {"swiglu": case["swiglu"], "eps": 1e-5}


def plain(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def reference(arguments, options):
    """In float64, but for the sum, which is rounded; and how large what is summed up can get."""
    h, update, norm, weight = arguments
    total = plain(h + update)
    x = total / np.sqrt((total**2).mean(-1, keepdims=True) + options["eps"]) * plain(norm)
    if "bits" in options:
        words, scales, biases = weight
        packed = {name: options[name] for name in ("group_size", "bits")}
        scales, biases = (x.astype(mx.float32) for x in (scales, biases))
        weight = mx.dequantize(words, scales, biases, **packed)
    weight = plain(weight)
    if "tail" in options:
        weight = np.concatenate([weight, plain(options["tail"])])
    y, size = x @ weight.T, np.abs(x) @ np.abs(weight.T)
    if options["swiglu"]:
        (gate, up), sizes = np.split(y, 2, axis=-1), np.split(size, 2, axis=-1)
        y = gate / (1 + np.exp(-gate)) * up
        size = sizes[0] * (1 + np.abs(up)) + sizes[1] * np.abs(gate)
    return total, y, size


def check(case, arguments, options, backend):
    total, y = normed_linear(*arguments, **options, backend=backend)
    true_total, true_y, size = reference(arguments, options)
    assert total.dtype == y.dtype == getattr(mx, case["dtype"])
    assert np.array_equal(plain(total), true_total)
    assert y.shape == true_y.shape
    bound = ROUNDING[case["dtype"]] * np.abs(true_y) + 2e-5 * np.abs(true_y).max() + 1e-7 * size
    error = np.abs(plain(y) - true_y)
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize(
    "case", CASES if kernels.gpu_backend() is None else [*CASES, *GRID], ids=label
)
def test_the_kernel_is_right_to_float64(case, kernel_backend):
    case = BASE | case
    check(case, *inputs(case), kernel_backend)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.get("dtype", "float32") == "float32"], ids=label
)
def test_so_are_plain_ops(case):
    case = BASE | case
    check(case, *inputs(case), "ops")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_any_shape_is_right(kernel_backend, data):
    swiglu = data.draw(st.booleans())
    bits = data.draw(st.sampled_from([None, None, 4, 8]))
    case = BASE | {
        "rows": 2,
        "bits": bits,
        "K": data.draw(st.integers(2, 12)) * (32 if bits else 4),
        "N": 2 * data.draw(st.integers(4, 20)) + (0 if swiglu else data.draw(st.integers(0, 1))),
        "tail": 0 if swiglu else data.draw(st.sampled_from([0, 2, 9])),
        "swiglu": swiglu,
    }
    check(case, *inputs(case), kernel_backend)


def moved(x, apart):
    """The same array behind ``apart`` numbers of another."""
    if isinstance(x, (list, tuple)):
        return tuple(moved(part, apart) for part in x)
    buffer = mx.concatenate([mx.ones(apart, x.dtype), x.flatten(), mx.ones(8, x.dtype)])
    mx.eval(buffer)
    return buffer[apart : apart + x.size].reshape(x.shape)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("which", range(4))
def test_arrays_may_start_anywhere(which, bits, kernel_backend):
    case = BASE | {"dtype": "bfloat16", "K": 96, "bits": bits, "tail": 2, "rows": 2}
    arguments, options = inputs(case)
    arguments[which] = moved(arguments[which], 3)
    options["tail"] = moved(options["tail"], 1)
    check(case, arguments, options, kernel_backend)


def test_strided_arrays_are_taken_too(kernel_backend):
    case = BASE | {"rows": 3}
    arguments, options = inputs(case)
    for i in (0, 1, 3):
        arguments[i] = mx.contiguous(arguments[i].T).T
    check(case, arguments, options, kernel_backend)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_do_not_meet(poison, kernel_backend):
    case = BASE | {"rows": 3, "K": 40, "N": 9}
    arguments, options = inputs(case)
    expected = normed_linear(*arguments, **options, backend="ops")
    arguments[1][1, 7] = poison
    for found, wanted in zip(normed_linear(*arguments, **options), expected):
        for row in (0, 2):
            assert np.allclose(plain(found[row]), plain(wanted[row]), atol=1e-4)
    arguments[1][1, 7] = 0.0
    arguments[3][4, 3] = poison
    found = plain(normed_linear(*arguments, **options)[1])
    assert np.isfinite(np.delete(found, 4, axis=1)).all()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({}, True),
        ({"rows": 4, "dtype": "bfloat16", "K": 8}, True),
        ({"bits": 8, "tail": 2}, True),
        ({"rows": 5}, False),
        ({"K": 63}, False),
        ({"K": 4}, False),
        ({"K": 66}, False),
        ({"dtype": "float16", "K": 68}, False),
        ({"bits": 3}, False),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_runs_on_ops(changes, named, kernel_backend):
    arguments, options = inputs(BASE | changes)
    swiglu, eps = options.pop("swiglu"), options.pop("eps")
    assert linear_backend(*arguments, **options) == (kernel_backend if named else "ops")
    if not named and "dtype" not in changes:
        check(BASE | changes, arguments, options | {"swiglu": swiglu, "eps": eps}, "auto")


@pytest.mark.parametrize("which", range(4))
def test_so_do_mixed_types(which, kernel_backend):
    arguments, options = inputs(BASE)
    arguments[which] = arguments[which].astype(mx.bfloat16)
    del options["swiglu"], options["eps"]
    # All but the norm's.
    assert linear_backend(*arguments, **options) == (kernel_backend if which == 2 else "ops")


def test_ops_have_gradients():
    (h, *others), options = inputs(BASE)

    def loss(h):
        total, y = normed_linear(h, *others, **options, backend="ops")
        return (total * total).sum() + mx.cos(y).sum()

    slope, step = mx.grad(loss)(h), 1e-3 * mx.random.normal(h.shape, key=mx.random.key(0))
    found = (loss(h + step) - loss(h - step)).item() / 2
    assert abs(found - (slope * step).sum().item()) < 2e-3 * abs(found) + 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"h": (64,)}, r"h has shape \(64,\), expected \[B, K\]"),
        ({"update": (2, 64)}, r"update has shape \(2, 64\), expected \(1, 64\)"),
        ({"norm": (63,)}, r"norm has shape \(63,\), expected \(64,\)"),
        ({"weight": (12, 63)}, r"weight has shape \(12, 63\), expected \[N, 64\]"),
        ({"tail": (2, 63)}, r"tail has shape \(2, 63\), expected \[N, 64\]"),
        ({"tail": (2, 64), "swiglu": True}, "not 12 outputs and a tail"),
        ({"weight": (13, 64), "swiglu": True}, "two halves, not 13 outputs"),
        ({"bits": 4}, "bits=4 and group_size=None, expected both or neither"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    arguments, options = inputs(BASE)
    names = ("h", "update", "norm", "weight")
    arguments = dict(zip(names, arguments)) | options
    for name, change in changes.items():
        arguments[name] = mx.zeros(change) if isinstance(change, tuple) else change
    with pytest.raises(ValueError, match=message):
        normed_linear(**arguments)


def test_the_parts_of_packed_weights_have_to_fit():
    arguments, options = inputs(BASE | {"bits": 4})
    words, scales, biases = arguments[3]
    for at, expected in ((0, 8), (1, 2), (2, 2)):
        parts = [words, scales, biases]
        parts[at] = parts[at][:, :-1]
        with pytest.raises(ValueError, match=rf"expected \[N, {expected}\]"):
            normed_linear(*arguments[:3], tuple(parts), **options)
