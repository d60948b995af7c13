"""The kernels of the gated delta rule against float64, on the GPU or in the simulator."""

import itertools
import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest
from delta_reference import (
    DECAYS,
    NAMES,
    arrays,
    gradients,
    inputs,
    output_slopes,
    recurrence,
    states,
    values_and_gradients,
    without_masked,
)
from delta_reference import checkpoints as true_checkpoints
from metalsim.testing import AppleGatedDelta

from mlx_hydra import kernels
from mlx_hydra.ops import backend, gated_delta
from mlx_hydra.ops.gated_delta import CHUNK, gated_delta_kernels

SIMULATED = kernels.gpu_backend() is None

# Half the distance between 1 and the next number: what rounding a result once may change.
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
# Of the largest value. Tensor cores see state and corrections as sums of two bfloat, 2^-17 off.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 2e-5, mx.bfloat16: 4e-5}
TYPES = list(ROUNDING)
LENGTHS = [1, 7, 63, 64, 65, 300]
HEAD_DIMS = [32, 64, 128, 256]


def in_type(case, dtype):
    """MLX's arrays, q, k and v in ``dtype``, and the float64 values of the same numbers."""
    given = {n: mx.array(x, dtype if n in "qkv" else mx.float32) for n, x in case.items()}
    exact = {n: np.array(x.astype(mx.float32)).astype(np.float64) for n, x in given.items()}
    return given, exact


def assert_close(found, expected, dtype=mx.float32):
    """What q, k and v of ``dtype`` gave is rounded once, and before that within tolerance."""
    rounding = ROUNDING[found.dtype] * np.abs(expected)
    allowed = rounding + TOLERANCE[dtype] * np.abs(expected).max() + 1e-30
    found = np.array(found.astype(mx.float32)).astype(np.float64)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) / allowed).max() <= 1


def check(backend, case, dtype=mx.float32):
    given, exact = in_type(case, dtype)
    y, state = gated_delta(**given, backend=backend)
    assert (y.dtype, state.dtype) == (dtype, mx.float32)
    expected_y, expected_state = recurrence(**exact)
    assert_close(y, expected_y, dtype)
    assert_close(state, expected_state, dtype)


def grid():
    """All lengths, widths and types; in the simulator each of a kind, and few that are large."""
    for i, (dtype, D) in enumerate(itertools.product(TYPES, HEAD_DIMS)):
        lengths = LENGTHS
        if SIMULATED and D > 32:
            lengths = [LENGTHS[i % 5], LENGTHS[-1]] if D == 64 else [LENGTHS[1 + i % 4]]
        for T in lengths:
            yield pytest.param(T, D, dtype, id=f"T={T}-D={D}-{str(dtype).split('.')[-1]}")


@pytest.mark.parametrize("T, D, dtype", grid())
def test_kernels_give_the_recurrence(kernel_backend, T, D, dtype):
    B, H = (3, 2) if D == 32 or not SIMULATED else (1, 1)
    check(kernel_backend, inputs(T, B=B, H=H, Dk=D, Dv=D, seed=T), dtype)


@pytest.mark.parametrize("Dk, Dv", [(16, 80), (48, 16), (16, 144)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_keys_and_values_may_differ_in_width(kernel_backend, Dk, Dv, dtype):
    check(kernel_backend, inputs(37, B=2, H=3, Dk=Dk, Dv=Dv), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_no_decay_costs_digits(kernel_backend, decay, dtype):
    check(kernel_backend, inputs(150, H=1, Dk=32, Dv=32, g=DECAYS[decay]), dtype)


@pytest.mark.parametrize("zeros", [0.3, 1.0])
def test_a_decay_of_zero_forgets(kernel_backend, zeros):
    case = inputs(70, Dk=32, Dv=32, g=lambda rng, shape: np.where(rng.random(shape) < zeros, 0, 1))
    check(kernel_backend, case)


@pytest.mark.parametrize("sign", ["equal", "alternating"])
def test_equal_keys_written_in_full_keep_all_digits(kernel_backend, sign):
    T = 100
    case = inputs(T, Dk=32, Dv=32, g=lambda rng, shape: np.ones(shape))
    case["k"][:] = case["k"][:, :1]
    if sign == "alternating":
        case["k"][:, ::2] *= -1
    case["k"] /= np.linalg.norm(case["k"], axis=-1, keepdims=True)
    case["q"] = case["k"].copy()
    case["beta"][:] = 1
    check(kernel_backend, case)


def test_a_state_of_large_numbers_is_not_rounded_to_the_keys_type(kernel_backend):
    case = inputs(40, Dk=32, Dv=32, g=lambda rng, shape: np.ones(shape))
    case["beta"][:] = 1e-3
    case["state"] *= 1e4
    check(kernel_backend, case, mx.bfloat16)


PADDING = {
    "left": [(9, 75), (0, 75), (75, 75)],
    "right": [(0, 64), (0, 1), (0, 75)],
    "both": [(17, 60), (64, 65), (0, 0)],
}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_masked_tokens_might_as_well_not_be_there(kernel_backend, dtype, side, poison):
    spans = np.array(PADDING[side])
    t = np.arange(75)
    mask = (t >= spans[:, :1]) & (t < spans[:, 1:])
    check_mask(kernel_backend, mask, dtype, poison)


def test_a_mask_may_have_holes(kernel_backend):
    mask = np.random.default_rng(3).random((2, 50)) < 0.6
    check_mask(kernel_backend, mask, mx.float32, np.nan)


def check_mask(backend, mask, dtype, poison):
    case = inputs(mask.shape[1], B=len(mask), Dk=32, Dv=48)
    given, exact = in_type(case, dtype)
    for name in NAMES[:-1]:
        rows = mx.array(mask).reshape(*mask.shape, *[1] * (given[name].ndim - 2))
        given[name] = mx.where(rows, given[name], mx.array(poison, given[name].dtype))
    y, state = gated_delta(**given, mask=mx.array(mask), backend=backend)
    assert not np.array(y.astype(mx.float32))[~mask].any()
    for b, kept in enumerate(mask):
        if not kept.any():
            assert mx.array_equal(state[b], given["state"][b])
            continue
        row = {name: exact[name][b : b + 1, kept] for name in NAMES[:-1]}
        expected = recurrence(**row, state=exact["state"][b : b + 1])
        assert_close(y[b : b + 1][:, mx.array(np.flatnonzero(kept))], expected[0], dtype)
        assert_close(state[b : b + 1], expected[1], dtype)


@pytest.mark.parametrize("cut", [1, 15, 16, 40])
def test_any_split_gives_what_the_whole_gives(kernel_backend, cut):
    case = inputs(50, Dk=32, Dv=32)
    given, exact = in_type(case, mx.float32)
    state = given.pop("state")
    parts = []
    for start, end in ((0, cut), (cut, 50)):
        part = {name: x[:, start:end] for name, x in given.items()}
        y, state = gated_delta(**part, state=state, backend=kernel_backend)
        parts.append(y)
    expected = recurrence(**exact)
    assert_close(mx.concatenate(parts, axis=1), expected[0])
    assert_close(state, expected[1])


@pytest.mark.parametrize("T", [1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_checkpoints_are_the_states_before_each_segment(kernel_backend, T):
    given, exact = in_type(inputs(T, B=2, Dk=32, Dv=48), mx.float32)
    _, _, checkpoints = gated_delta_kernels(kernel_backend, **given, mask=None, save=True)
    assert checkpoints.shape == (2, 2, -(-T // CHUNK), 48, 32)
    state = exact.pop("state")
    for n in range(checkpoints.shape[2]):
        assert_close(checkpoints[:, :, n], state)
        segment = {name: x[:, n * CHUNK : (n + 1) * CHUNK] for name, x in exact.items()}
        _, state = recurrence(**segment, state=state)


def check_segments(backend, case, dtype, segments, mask=None):
    """y, the new state and the state before each 64 tokens, of segments run side by side."""
    given, exact = in_type(case, dtype)
    y, state, checkpoints = gated_delta_kernels(
        backend,
        **given,
        mask=None if mask is None else mx.array(mask),
        save=True,
        segments=segments,
    )
    assert (y.dtype, state.dtype) == (dtype, mx.float32)
    exact = without_masked(exact, mask)
    every_state = states(**exact)
    expected = np.einsum("tbhvk,bthk->bthv", every_state[1:], exact["q"])
    assert_close(y, expected, dtype)
    assert_close(state, every_state[-1], dtype)
    assert_close(checkpoints, true_checkpoints(every_state), dtype)


SEGMENTED = [
    (300, 32, 32, mx.float32, 3),
    (129, 32, 32, mx.float32, 2),
    (200, 32, 32, mx.bfloat16, 9),
    (193, 32, 32, mx.float16, 3),
    (130, 48, 16, mx.float32, 3),
    (130, 144, 16, mx.float32, 3),
    (65, 16, 80, mx.bfloat16, 2),
    (129, 128, 128, mx.bfloat16, 3),
]
LONG = [(2048, 128, 8), (2047, 128, 31), (1025, 256, 4)]
if not SIMULATED:
    SEGMENTED += [(T, D, D, dtype, count) for T, D, count in LONG for dtype in TYPES]


@pytest.mark.parametrize("T, Dk, Dv, dtype, segments", SEGMENTED)
def test_segments_side_by_side_give_the_recurrence(kernel_backend, T, Dk, Dv, dtype, segments):
    B, H = (2, 3) if Dk < 128 else (1, 1)
    # What one segment knows is still known in the last.
    case = inputs(T, B=B, H=H, Dk=Dk, Dv=Dv, g=DECAYS["next to 1"], seed=T)
    check_segments(kernel_backend, case, dtype, segments)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_no_decay_costs_digits_where_segments_meet(kernel_backend, decay, dtype):
    case = inputs(150, H=1, Dk=32, Dv=32, g=DECAYS[decay])
    check_segments(kernel_backend, case, dtype, segments=3)


def test_a_large_state_may_decay_from_segment_to_segment(kernel_backend):
    case = inputs(128, Dk=32, Dv=32, g=lambda rng, shape: np.full(shape, 0.85))
    case["beta"][:] = 1e-2
    case["state"] *= 1e4
    check_segments(kernel_backend, case, mx.float16, segments=2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_segments_may_be_masked_in_part_or_whole(kernel_backend, dtype):
    t = np.arange(150)
    mask = np.stack([(t > 3) & (t < 140), (t < 30) | (t >= 128)])
    case = inputs(150, B=2, Dk=32, Dv=32, g=DECAYS["next to 1"])
    for name in NAMES[:-1]:
        case[name][~mask] = np.nan
    check_segments(kernel_backend, case, dtype, 3, mask)


@pytest.mark.skipif(not metalsim.available(), reason="what CUDA does, in the simulator")
@pytest.mark.parametrize(
    "Dk, Dv, dtype, masked", [(32, 32, mx.bfloat16, True), (48, 96, mx.float32, False)]
)
def test_the_next_chunk_may_be_copied_past_the_registers(monkeypatch, Dk, Dv, dtype, masked):
    read_text = kernels.read_text

    def copying(name):
        return read_text(name).replace("bool COPIES = false", "bool COPIES = true")

    monkeypatch.setattr(kernels, "read_text", copying)
    kernels.cache_clear()
    case, mask = inputs(150, B=2, Dk=Dk, Dv=Dv, g=DECAYS["next to 1"]), None
    if masked:
        mask = np.random.default_rng(3).random((2, 150)) < 0.8
        for name in NAMES[:-1]:
            case[name][~mask] = np.nan
    with metalsim.metal(checked=True):
        check_segments("metal", case, dtype, 2, mask)
    kernels.cache_clear()


def test_segments_where_heads_alone_leave_a_gpu_idle():
    segments = sys.modules["mlx_hydra.ops.gated_delta"]._segments
    assert segments("cuda", B=1, T=4096, H=14, Dv=128) > 2
    assert segments("cuda", B=1, T=256, H=14, Dv=128) == 1
    assert segments("cuda", B=16, T=4096, H=14, Dv=128) == 1
    assert segments("cuda", B=1, T=16384, H=1, Dv=16) <= 64
    assert segments("metal", B=1, T=4096, H=14, Dv=128) == 1


@pytest.mark.parametrize("rows", [16, 32, 48, 96])
def test_a_threadgroup_may_hold_any_part_of_the_state(kernel_backend, rows):
    given, exact = in_type(inputs(40, Dk=32, Dv=96), mx.bfloat16)
    y, state, _ = gated_delta_kernels(kernel_backend, **given, mask=None, rows=rows)
    expected = recurrence(**exact)
    assert_close(y, expected[0], mx.bfloat16)
    assert_close(state, expected[1], mx.bfloat16)


def test_inputs_need_not_be_contiguous(kernel_backend):
    case = inputs(21, B=2, Dk=32, Dv=32)
    given, exact = in_type(case, mx.float32)
    qkv = mx.concatenate([given[n] for n in "qkv"], axis=-1)
    given["q"], given["k"], given["v"] = mx.split(qkv, 3, axis=-1)
    for name in ("g", "beta"):
        given[name] = mx.contiguous(given[name].swapaxes(1, 2)).swapaxes(1, 2)
    given["state"] = mx.contiguous(given["state"].swapaxes(2, 3)).swapaxes(2, 3)
    y, state = gated_delta(**given, backend=kernel_backend)
    expected = recurrence(**exact)
    assert_close(y, expected[0])
    assert_close(state, expected[1])


def test_rates_come_in_any_dtype_and_the_state_may_be_left_out(kernel_backend):
    case = inputs(20, Dk=32, Dv=32)
    case["state"][:] = 0
    given, exact = in_type(case, mx.bfloat16)
    for name in ("g", "beta"):
        given[name] = given[name].astype(mx.bfloat16)
        exact[name] = np.array(given[name].astype(mx.float32)).astype(np.float64)
    del given["state"]
    y, state = gated_delta(**given, backend=kernel_backend)
    expected = recurrence(**exact)
    assert_close(y, expected[0], mx.bfloat16)
    assert_close(state, expected[1], mx.bfloat16)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_flow_through_the_kernels(kernel_backend, masked):
    case = inputs(70, B=2, Dk=32, Dv=32)
    mask = mx.broadcast_to(mx.arange(70) < 61, (2, 70)) if masked else None

    def found_on(backend):
        def form(*values):
            return gated_delta(*values, mask, backend=backend)

        return values_and_gradients(form, case)[2:]

    exact = found_on("ops") if masked else gradients(case, *output_slopes(case))
    for found, expected in zip(found_on(kernel_backend), exact):
        assert_close(mx.array(found), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"q": (1, 4, 2, 40), "k": (1, 4, 2, 40)},
        {"q": (1, 4, 2, 272), "k": (1, 4, 2, 272)},
        {"v": (1, 4, 2, 8)},
        {"v": (1, 4, 2, 288)},
        {"dtype": mx.float16},
    ],
)
def test_what_no_kernel_takes_runs_on_ops(kernel_backend, change):
    shapes = {"q": (1, 4, 2, 32), "k": (1, 4, 2, 32), "v": (1, 4, 2, 32), **change}
    q, k, v = (mx.full(shapes[n], 0.1) for n in "qkv")
    q = q.astype(change.get("dtype", mx.float32))
    g = beta = mx.full((1, 4, 2), 0.5)
    y, _ = gated_delta(q, k, v, g, beta)
    assert mx.array_equal(y, gated_delta(q, k, v, g, beta, backend="ops")[0])
    with pytest.raises(ValueError, match="this call runs on ops only"):
        gated_delta(q, k, v, g, beta, backend=kernel_backend)


def test_auto_takes_the_kernels_where_they_fit(kernel_backend, monkeypatch):
    monkeypatch.setenv("MLX_HYDRA_BACKEND", "auto")
    monkeypatch.setattr(backend, "PROVEN", (kernel_backend,))
    calls = []
    module = sys.modules["mlx_hydra.ops.gated_delta"]

    def counted(on, *rest, **options):
        calls.append(on)
        return gated_delta_kernels(on, *rest, **options)

    monkeypatch.setattr(module, "gated_delta_kernels", counted)
    gated_delta(**arrays(inputs(3, Dk=16, Dv=16)))
    gated_delta(**arrays(inputs(3, Dk=16, Dv=16)), backend="ops")
    monkeypatch.setattr(backend, "PROVEN", ())
    gated_delta(**arrays(inputs(3, Dk=16, Dv=16)))
    assert calls == [kernel_backend]


@pytest.mark.skipif(not metalsim.available(), reason="the simulator counts bytes")
def test_half_the_device_bytes_of_apples_chunk_kernel():
    case = inputs(256, H=1, Dk=128, Dv=128)
    q, k, v, g, beta, state = in_type(case, mx.bfloat16)[0].values()
    with metalsim.metal(checked=False) as ours:
        mx.eval(gated_delta(q, k, v, g, beta, state, backend="metal"))
    with metalsim.metal(checked=False) as apples:
        g, beta = g.astype(mx.bfloat16), beta.astype(mx.bfloat16)
        AppleGatedDelta("gated_delta_fused_chunk")(q, k, v, g, beta, state)
    assert 0 < moved(ours) <= 0.5 * moved(apples)


def moved(simulation):
    counters = simulation.counters
    return counters.device_bytes_read + counters.device_bytes_written
