"""The backward kernels of the gated delta rule against float64, its differences, and `ops`."""

import delta_reference as reference
import mlx.core as mx
import numpy as np
import pytest
from delta_reference import DECAYS, NAMES

from mlx_hydra import kernels
from mlx_hydra.ops.gated_delta import gated_delta
from mlx_hydra.ops.gated_delta_vjp import gated_delta_vjp, supports

SIMULATED = kernels.gpu_backend() is None

# Half a unit in the last place of a result rounded once, relative to the largest: nothing else is
# rounded to the inputs' dtype.
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
ACCURACY = 2e-5

LENGTHS = (1, 7, 63, 64, 65, 300)
HEAD_DIMS = (32, 64, 128, 256)
GRID = (
    [
        (1, 32, mx.float32),
        (7, 64, mx.float16),
        (63, 128, mx.bfloat16),
        (64, 32, mx.float16),
        (65, 32, mx.bfloat16),
        (65, 256, mx.float32),
        (300, 32, mx.float32),
    ]
    if SIMULATED
    else [(T, D, dtype) for T in LENGTHS for D in HEAD_DIMS for dtype in ROUNDING]
)


def inputs(T, Dk=32, Dv=32, **options):
    return reference.inputs(T, Dk=Dk, Dv=Dv, **options)


def rounded(x, dtype):
    """What is left of float64 values in a dtype, in float64."""
    return np.array(mx.array(x, dtype).astype(mx.float32)).astype(np.float64)


def run(backend, case, dy, dstate):
    """The kernels' gradients in float32, of float64 arguments."""
    checkpoints = reference.checkpoints(reference.states(**case))
    *values, dy, dstate, checkpoints = (
        mx.array(x, mx.float32) for x in (*case.values(), dy, dstate, checkpoints)
    )
    return gated_delta_vjp(backend, *values, None, checkpoints, dy, dstate)


def relative_errors(backend, case, dtype=mx.float32, mask=None, poison=None):
    """How far the kernels' gradients are from float64's, each relative to its own scale."""
    dtypes = {name: dtype if name in "qkv" else mx.float32 for name in NAMES}
    case = {name: rounded(x, dtypes[name]) for name, x in case.items()}
    dy, dstate = (rounded(x, d) for x, d in zip(reference.output_slopes(case), (dtype, mx.float32)))
    exact = reference.gradients(case, dy, dstate, mask)
    every_state = reference.states(**reference.without_masked(case, mask))
    if poison is not None:
        dy = np.where(mask[..., None, None], dy, poison)
        for name in NAMES[:-1]:
            case[name][~mask] = poison
    found = gated_delta_vjp(
        backend,
        *(mx.array(x, dtypes[name]) for name, x in case.items()),
        None if mask is None else mx.array(mask),
        mx.array(reference.checkpoints(every_state), mx.float32),
        mx.array(dy, dtype),
        mx.array(dstate, mx.float32),
    )
    errors = {}
    for name, x, expected in zip(NAMES, found, exact):
        assert (x.dtype, x.shape) == (dtypes[name], expected.shape), name
        x = np.array(x.astype(mx.float32))
        if mask is not None and name != "state":
            assert not x[~mask].any(), name
        errors[name] = np.abs(x - expected).max() / (np.abs(expected).max() + 1e-30)
    return errors


def check(errors, dtype=mx.float32, accuracy=ACCURACY):
    for name, error in errors.items():
        assert error < accuracy + (ROUNDING[dtype] if name in "qkv" else 0), name


@pytest.mark.parametrize("T, D, dtype", GRID)
def test_gradients_are_those_of_float64(kernel_backend, T, D, dtype):
    case = inputs(T, H=1 if D == 256 else 2, Dk=D, Dv=D, seed=T)
    check(relative_errors(kernel_backend, case, dtype), dtype)


@pytest.mark.parametrize("Dk, Dv", [(16, 80), (96, 16)])
def test_keys_and_values_differ_in_size(kernel_backend, Dk, Dv):
    check(relative_errors(kernel_backend, inputs(70, B=3, Dk=Dk, Dv=Dv)))


@pytest.mark.parametrize("decay", DECAYS)
def test_no_digits_are_lost_whatever_the_decays(kernel_backend, decay):
    check(relative_errors(kernel_backend, inputs(150, g=DECAYS[decay])))


def test_a_small_decay_among_others_gets_its_own_gradient_right(kernel_backend):
    """Relative to the gradient of that decay alone, which is small beside the others'."""
    case = inputs(100, H=1, g=DECAYS["one reset in a chunk of ones"])
    case["state"][:] = 0
    case["v"][:, :40] *= 1e-3
    case = {name: rounded(x, mx.float32) for name, x in case.items()}
    dy, dstate = (rounded(x, mx.float32) for x in reference.output_slopes(case))
    found = run(kernel_backend, case, dy, dstate)
    exact = reference.gradients(case, dy, dstate)[NAMES.index("g")][0, 40, 0]
    assert found[NAMES.index("g")][0, 40, 0].item() == pytest.approx(exact, rel=1e-4)


def test_a_decay_that_underflowed_to_zero_gives_no_nan(kernel_backend):
    case = inputs(130, g=lambda rng, shape: np.where(rng.random(shape) < 0.3, 0, 0.9))
    errors = relative_errors(kernel_backend, case)
    # Its own gradient has no value to be: exp never underflows to zero by a finite step.
    assert np.isfinite(errors.pop("g"))
    check(errors)


def test_a_chunk_of_equal_keys_written_in_full(kernel_backend):
    case = inputs(100, g=DECAYS["1"])
    case["k"] = np.broadcast_to(case["k"][:, :1], case["k"].shape)
    case["q"] = case["k"]
    case["beta"][:] = 1
    check(relative_errors(kernel_backend, case))


def test_at_beta_zero_beta_still_has_a_gradient(kernel_backend):
    case = inputs(70)
    case["beta"][:] = 0
    check(relative_errors(kernel_backend, case))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_masked_tokens_get_no_gradient_whatever_they_hold(kernel_backend, dtype):
    mask = np.random.default_rng(0).random((3, 130)) < 0.7
    mask[1, :70] = False
    mask[2] = False
    errors = relative_errors(kernel_backend, inputs(130, B=3), dtype, mask=mask, poison=np.nan)
    check(errors, dtype)


def test_float64_differences_measure_the_same_slopes(kernel_backend):
    """The reference by another road: along a random direction of each argument."""
    case = inputs(70, H=1, Dk=16, Dv=16)
    dy, dstate = reference.output_slopes(case)
    found = run(kernel_backend, case, dy, dstate)
    rng = np.random.default_rng(5)
    for name, gradient in zip(NAMES, found):
        direction = rng.standard_normal(case[name].shape)
        direction /= np.linalg.norm(direction)
        above, below = (
            reference.loss({**case, name: case[name] + step * direction}, dy, dstate)
            for step in (1e-5, -1e-5)
        )
        slope = (np.array(gradient) * direction).sum()
        assert slope == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("masked", [False, True])
def test_differentiating_the_ops_form_gives_the_same(kernel_backend, masked):
    case = inputs(100, B=2)
    mask = np.random.default_rng(0).random((2, 100)) < 0.8 if masked else None
    values = [mx.array(x, mx.float32) for x in case.values()]
    slopes = [mx.array(x, mx.float32) for x in reference.output_slopes(case)]
    every_state = reference.states(**reference.without_masked(case, mask))
    mask = mx.array(mask) if masked else None

    def form(*values):
        return gated_delta(*values, mask, backend="ops")

    expected = mx.vjp(form, values, slopes)[1]
    checkpoints = mx.array(reference.checkpoints(every_state), mx.float32)
    found = gated_delta_vjp(kernel_backend, *values, mask, checkpoints, *slopes)
    for name, x, y in zip(NAMES, found, expected):
        assert mx.abs(x - y).max() < ACCURACY * mx.abs(y).max(), name


def test_arguments_may_be_views(kernel_backend):
    case = inputs(70, B=2, H=2, Dk=16, Dv=16)
    dy, dstate = (mx.array(x, mx.float32) for x in reference.output_slopes(case))
    checkpoints = mx.array(reference.checkpoints(reference.states(**case)), mx.float32)
    values = [mx.array(x, mx.float32) for x in case.values()]

    def view(x):
        return mx.concatenate([x, x], axis=2)[:, :, : x.shape[2]]

    found = gated_delta_vjp(
        kernel_backend, *map(view, values), None, view(checkpoints), view(dy), view(dstate)
    )
    whole = gated_delta_vjp(kernel_backend, *values, None, checkpoints, dy, dstate)
    for x, y in zip(found, whole):
        assert mx.array_equal(x, y)


@pytest.mark.parametrize(
    "Dk, Dv, dtypes, expected",
    [
        (128, 128, (mx.bfloat16, mx.bfloat16), True),
        (16, 256, (mx.float16, mx.float16), True),
        (256, 32, (mx.float32, mx.float32), True),
        (24, 32, (mx.float32, mx.float32), False),
        (32, 40, (mx.float32, mx.float32), False),
        (272, 32, (mx.float32, mx.float32), False),
        (32, 272, (mx.float32, mx.float32), False),
        (32, 32, (mx.float32, mx.float16), False),
        (32, 32, (mx.float64, mx.float64), False),
    ],
)
def test_what_the_kernels_take(Dk, Dv, dtypes, expected):
    with mx.stream(mx.cpu):
        q, v = (mx.zeros((1, 2, 1, D), dtype) for D, dtype in zip((Dk, Dv), dtypes))
        assert supports(q, v) is expected
