import itertools

import mlx.core as mx
import numpy as np
import pytest
from delta_reference import from_projections, normed, plain, sigmoid

from mlx_hydra import kernels
from mlx_hydra.ops import gated_delta_step as module
from mlx_hydra.ops.gated_delta_step import Rotation, Weights, gated_delta_step, step_backend
from mlx_hydra.ops.head_attention import Parts

BASE = {
    "dtype": "float32",
    "B": 1,
    "T": 1,
    "H": 2,
    "F": 1,
    "D": 32,
    "taps": 4,
    "rope": 1.0,
    "gated": True,
    "full_gated": True,
    "eps": 1e-6,
    "full_eps": 1e-3,
    "offset": 17,
    "mask": False,
    "fresh": False,
    "biases": (),
    "decay": "usual",
    "others": 0,
}

# Each names what differs from BASE; all run everywhere.
CASES = [
    {},
    {"T": 8, "D": 64, "F": 0, "B": 3, "offset": "a sequence"},
    {"T": 3, "D": 128, "taps": 2, "dtype": "bfloat16", "others": 3},
    {"T": 2, "D": 256, "dtype": "float16", "H": 1, "full_gated": False},
    {"T": 8, "D": 256, "F": 2, "taps": 8, "gated": False, "H": 1, "others": 7},
    {"T": 5, "taps": 0, "rope": None, "eps": None, "full_eps": None, "F": 3},
    {"T": 7, "B": 2, "mask": True, "decay": "none", "dtype": "bfloat16"},
    {"T": 6, "D": 64, "B": 3, "mask": True, "taps": 0, "decay": "near zero"},
    {"T": 4, "D": 128, "fresh": True, "rope": 1.25, "H": 3, "decay": "none"},
    {"T": 2, "offset": 100_000, "decay": "mixed", "dtype": "float16", "taps": 8},
    {"T": 3, "D": 128, "B": 2, "mask": True, "offset": "a sequence", "F": 0, "decay": "mixed"},
    {"D": 64, "F": 3, "B": 2, "biases": ("gate_bias", "full_gate_bias")},
    {"T": 2, "D": 128, "H": 3, "dtype": "bfloat16", "biases": ("gate_bias",)},
    {"T": 5, "F": 2, "dtype": "float16", "biases": ("full_gate_bias",)},
]

# The rest of the grid, where a GPU runs it.
GRID = [
    {"dtype": dtype, "D": D, "T": T, "B": B, "taps": taps, "mask": mask, "H": 3, "F": F}
    | {"biases": ("gate_bias", "full_gate_bias") if F == 2 else ()}
    for dtype, D, (T, B, taps, mask, F) in itertools.product(
        ("float32", "float16", "bfloat16"),
        (32, 64, 128, 256),
        [(1, 1, 4, False, 2), (2, 3, 3, False, 0), (8, 2, 8, True, 1), (7, 3, 0, True, 4)],
    )
]


def label(case):
    return " ".join(f"{k}={v}" for k, v in case.items()) or "base"


def inputs(case, seed=0):
    """Random arguments, in the types that the kernel takes."""
    B, T, H, F, D, taps = (case[k] for k in ("B", "T", "H", "F", "D", "taps"))
    rng = np.random.default_rng(seed)
    dtype = getattr(mx, case["dtype"])

    def random(*shape, scale=1.0, mean=0.0):
        return mx.array(mean + scale * rng.standard_normal(shape), dtype)

    C = H * D
    first = 5 + (F * D if case["full_gated"] else 0)
    width = first + (3 + case["gated"]) * C + 2 * H + case["others"]
    A_log = {
        "usual": rng.uniform(-2, 1, H),
        "none": np.full(H, -200.0),
        "near zero": np.full(H, 3.0),
        "mixed": np.linspace(-60, 3, H),
    }[case["decay"]]
    offset = case["offset"]
    return {
        "projected": random(B, T, width),
        "weights": Weights(
            random(D, scale=0.2, mean=1),
            random(D, scale=0.2, mean=1),
            mx.array(A_log, mx.float32),
            mx.array(rng.uniform(-2, 1, H), mx.float32),
            1e-5,
            tuple(random(C, taps, 1, scale=0.5) for _ in range(3)) if taps else None,
        ),
        "gamma": mx.array(rng.uniform(0.5, 2, F + H), mx.float32),
        "state": None if case["fresh"] else mx.array(rng.standard_normal((B, H, D, D)), mx.float32),
        "past": random(B, taps - 1, 3 * C) if taps and not case["fresh"] else None,
        "offset": mx.array([3, 0, 250][:B], mx.int32) if offset == "a sequence" else offset,
        "mask": mx.array(rng.random((B, T)) < 0.6) if case["mask"] else None,
        "rotation": None
        if case["rope"] is None
        else Rotation(mx.array(1e4 ** -(np.arange(0, D, 2) / D), mx.float32), case["rope"]),
        "eps": case["eps"],
        "first": first,
        "full": random(B, F, T, D, scale=3) if F else None,
        "full_gate": 5 if F and case["full_gated"] else None,
        **{name: random(C if name == "gate_bias" else F * D, mean=1) for name in case["biases"]},
        "full_eps": case["full_eps"],
    }


def reference(case, arguments):
    """The layer in float64: out, state and past."""
    B, T, H, F, D = (case[k] for k in ("B", "T", "H", "F", "D"))
    x, first, C = plain(arguments["projected"]), arguments["first"], H * D
    valid = np.ones((B, T), bool) if arguments["mask"] is None else np.array(arguments["mask"])
    at = first + (3 + case["gated"]) * C
    ends = [first, first + C, first + 2 * C, first + 3 * C, at, at + H, at + 2 * H]
    _, q, k, v, _, a, b, _ = mx.split(arguments["projected"], ends, axis=-1)
    names = ("weights", "past", "offset", "mask", "rotation")
    q, k, v, decay, rate, past = from_projections(
        q, k, v, a, b, **{name: arguments[name] for name in names}
    )
    state = plain(arguments["state"])
    state = np.zeros((B, H, D, D)) if state is None else state
    heads = np.zeros((B, T, H, D))
    for n, t in zip(*np.nonzero(valid)):
        s = decay[n, t, :, None, None] * state[n]
        change = rate[n, t][:, None] * (v[n, t] - np.einsum("hvk,hk->hv", s, k[n, t]))
        state[n] = s + change[..., None] * k[n, t][:, None]
        heads[n, t] = np.einsum("hvk,hk->hv", state[n], q[n, t])
    if case["eps"] is not None:
        heads = normed(heads, case["eps"])
    heads = (heads * plain(arguments["gamma"])[F:, None]).reshape(B, T, C)
    if case["gated"]:
        gate = x[..., first + 3 * C : first + 4 * C]
        if "gate_bias" in arguments:
            gate = gate + plain(arguments["gate_bias"])
        heads = heads * gate * sigmoid(gate)
    if F:
        full = plain(arguments["full"]).swapaxes(1, 2)
        if case["full_eps"] is not None:
            full = normed(full, case["full_eps"])
        full = (full * plain(arguments["gamma"])[:F, None]).reshape(B, T, F * D)
        if case["full_gated"]:
            gate = x[..., 5 : 5 + F * D]
            if "full_gate_bias" in arguments:
                gate = gate + plain(arguments["full_gate_bias"])
            full = full * sigmoid(gate)
        heads = np.concatenate([full, heads], axis=-1)
    return heads, state, past


# The result is rounded once; all before is float32.
ROUNDING = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}


def check(case, arguments, found, expected):
    (out, state, past), (true_out, true_state, true_past) = found, expected
    assert out.dtype == getattr(mx, case["dtype"])
    assert state.dtype == mx.float32
    for x, y, rounding in ((out, true_out, ROUNDING[case["dtype"]]), (state, true_state, 0)):
        error = np.abs(plain(x) - y)
        assert (error <= rounding * np.abs(y) + 2e-5 * np.abs(y).max()).all(), error.max()
    if case["taps"]:
        assert past.dtype == out.dtype
        assert np.array_equal(plain(past), true_past)
    else:
        assert past is None


# The simulator takes the cases that cover it, a GPU the whole grid too.
@pytest.mark.parametrize(
    "case", CASES if kernels.gpu_backend() is None else [*CASES, *GRID], ids=label
)
def test_a_step_is_the_layer_in_float64(case, kernel_backend):
    case = BASE | case
    arguments = inputs(case)
    found = gated_delta_step(**arguments, backend=kernel_backend)
    check(case, arguments, found, reference(case, arguments))


@pytest.mark.parametrize("B", [1, 3])
def test_a_token_of_each_sequence_may_come_without_an_axis_of_its_own(B, kernel_backend):
    case = BASE | {"B": B, "F": 2, "biases": ("gate_bias",)}
    arguments = inputs(case)
    expected = reference(case, arguments)
    arguments["projected"] = arguments["projected"][:, 0]
    out, *left = gated_delta_step(**arguments, backend=kernel_backend)
    assert out.shape == (B, 4 * case["D"])
    check(case, arguments, (out[:, None], *left), expected)


def in_parts(full, splits, seed=0):
    """Parts that come together to these outputs, with scores of any size."""
    rng = np.random.default_rng(seed)
    shape = (*full.shape[:3], splits)
    # Parts with no keys, as the last ones may be.
    weights = rng.uniform(0.5, 3, shape) * (np.arange(splits) < max(1, splits - 2))
    largest = np.where(weights > 0, rng.choice([-90.0, -3.5, 0.0, 2.25, 80.0], shape), -1e29)
    shares = weights * np.exp2(largest - largest.max(-1, keepdims=True))
    noise = rng.standard_normal((*shape, full.shape[-1])) * (weights > 0)[..., None]
    shares = shares[..., None] / shares.sum(-1)[..., None, None]
    values = noise - (noise * shares).sum(-2, keepdims=True) + full[..., None, :]
    sums = mx.array(weights[..., None] * values, mx.float32)
    return Parts(sums, mx.array(np.stack([largest, weights], -1), mx.float32))


@pytest.mark.parametrize(
    "splits, changes",
    [
        (1, {}),
        (1, {"F": 3, "T": 8, "B": 2}),
        (7, {"D": 64, "F": 2, "dtype": "bfloat16", "full_gated": False}),
        (40, {"D": 128, "T": 3, "dtype": "float16", "biases": ("full_gate_bias",)}),
        (600, {"F": 2, "full_eps": None, "T": 2}),
        (300, {"D": 256, "H": 1, "T": 8}),
    ],
    ids=str,
)
def test_attention_may_come_in_parts(splits, changes, kernel_backend):
    case = BASE | changes
    arguments = inputs(case)
    expected = reference(case, arguments)
    arguments["full"] = in_parts(plain(arguments["full"]), splits)
    found = gated_delta_step(**arguments, backend=kernel_backend)
    check(case, arguments, found, expected)


def test_a_head_that_sees_nothing_gives_nothing(kernel_backend):
    case = BASE | {"T": 2, "F": 2}
    arguments = inputs(case)
    sums, stats = in_parts(plain(arguments["full"]), 3)
    arguments["full"] = Parts(0 * sums, mx.zeros_like(stats) + mx.array([-1e29, 0.0]))
    out, *_ = gated_delta_step(**arguments, backend=kernel_backend)
    assert not plain(out)[..., : 2 * case["D"]].any()


@pytest.mark.parametrize("splits", [None, 40])
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_threadgroups_of_the_other_backends_size(D, splits, kernel_backend, monkeypatch):
    other = {"metal": "cuda", "cuda": "metal"}[kernel_backend]
    monkeypatch.setitem(module.MOST_THREADS, kernel_backend, module.MOST_THREADS[other])
    case = BASE | {"T": 2 if splits is None else 8, "D": D}
    arguments = inputs(case)
    expected = reference(case, arguments)
    if splits is not None:
        arguments["full"] = in_parts(plain(arguments["full"]), splits)
    found = gated_delta_step(**arguments, backend=kernel_backend)
    check(case, arguments, found, expected)


def test_steps_of_any_size_hand_state_and_past_on(kernel_backend):
    case = BASE | {"T": 6, "D": 64}
    arguments = inputs(case)
    whole = reference(case, arguments)
    projected, full = arguments["projected"], arguments["full"]
    outputs, start = [], 0
    for step in (1, 2, 3):
        part = slice(start, start + step)
        arguments |= {
            "projected": projected[:, part],
            "full": full[:, :, part],
            "offset": 17 + start,
        }
        arguments["projected"] = mx.contiguous(arguments["projected"])
        out, arguments["state"], arguments["past"] = gated_delta_step(
            **arguments, backend=kernel_backend
        )
        outputs.append(out)
        start += step
    found = mx.concatenate(outputs, axis=1), arguments["state"], arguments["past"]
    check(case, arguments, found, whole)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("taps", [0, 4])
def test_padding_may_hold_anything(taps, poison, kernel_backend):
    case = BASE | {"T": 5, "B": 2, "mask": True, "taps": taps}
    arguments = inputs(case)
    expected = reference(case, arguments)
    mask = np.array([[0, 0, 1, 1, 0], [1, 0, 1, 1, 1]], bool)
    arguments["mask"] = mx.array(mask)
    expected = reference(case, arguments)
    first = arguments["first"]
    # The full heads' own gates come before.
    arguments["projected"][..., first:] = mx.where(
        arguments["mask"][..., None], arguments["projected"][..., first:], poison
    )
    found = gated_delta_step(**arguments, backend=kernel_backend)
    check(case, arguments, found, expected)
    linear = plain(found[0])[..., case["F"] * case["D"] :]
    assert not linear[~mask].any()


@pytest.mark.parametrize(
    "call, named",
    [
        ((mx.float32, 1, 128, 4), True),
        ((mx.bfloat16, 8, 32, 0), True),
        ((mx.float16, 9, 128, 4), False),
        ((mx.float16, 0, 128, 4), False),
        ((mx.float16, 1, 96, 4), False),
        ((mx.float16, 1, 128, 9), False),
        ((mx.float16, 1, 128, 1), False),
        ((mx.float64, 1, 128, 4), False),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_the_parts(call, named, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_backend", lambda: "metal")
    monkeypatch.setenv("MLX_HYDRA_BACKEND", "metal")
    assert step_backend(*call) == ("metal" if named else "ops")
    monkeypatch.setenv("MLX_HYDRA_BACKEND", "ops")
    assert step_backend(*call) == "ops"


def test_without_a_gpu_the_parts_run(monkeypatch):
    monkeypatch.setattr(kernels, "gpu_backend", lambda: None)
    assert step_backend(mx.float32, 1, 128, 4) == "ops"
