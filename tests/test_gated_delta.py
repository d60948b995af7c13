import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
from delta_reference import (
    DECAYS,
    NAMES,
    arrays,
    gradients,
    inputs,
    output_slopes,
    recurrence,
    values_and_gradients,
    weighted_sum,
)
from hypothesis import given
from hypothesis import strategies as st

from mlx_hydra.ops import gated_delta
from mlx_hydra.ops.gated_delta import CHUNK, chunked, naive


def relative_errors(case, form=chunked):
    """How far float32 values and gradients are from float64's, each relative to its own scale."""
    exact = [*recurrence(**case), *gradients(case, *output_slopes(case))]
    names = ("y", "new state", *(f"gradient of {name}" for name in NAMES))
    return {
        name: tiny.distance(a, b) / (np.abs(b).max() + 1e-30)
        for name, a, b in zip(names, values_and_gradients(form, case), exact)
    }


@pytest.mark.parametrize("T", [1, 2, 65])
def test_naive_in_float64_is_the_recurrence_in_values_and_gradients(T):
    case = inputs(T, B=2)
    with mx.stream(mx.cpu):
        found = values_and_gradients(naive, case, mx.float64)
    for x, expected in zip(found, [*recurrence(**case), *gradients(case, *output_slopes(case))]):
        np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T", [3, 70])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_slopes_that_float64_differences_measure(name, T):
    case = inputs(T)
    rng = np.random.default_rng(5)
    direction = rng.standard_normal(case[name].shape)
    direction /= np.linalg.norm(direction)

    def loss(step):
        outputs = recurrence(**{**case, name: case[name] + step * direction})
        return sum((x * w).sum() for x, w in zip(outputs, output_slopes(case)))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    values = list(arrays(case).values())
    gradient = mx.grad(weighted_sum(gated_delta, case), argnums=NAMES.index(name))(*values)
    assert (np.array(gradient) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("T", range(1, 201))
def test_chunked_is_the_recurrence_in_values_and_gradients_for_every_length(T):
    for name, error in relative_errors(inputs(T, Dk=4, Dv=3, seed=T)).items():
        assert error < 5e-6, name


@pytest.mark.parametrize("T", [1, 5, 64, 100])
def test_transformers_gives_the_same(T):
    golden = mx.load(str(tiny.GOLDEN / "gated_delta.safetensors"))
    case = {name: golden[f"{T}.{name}"] for name in (*NAMES, "y", "state_out")}
    y, state = case.pop("y"), case.pop("state_out")
    found = gated_delta(**case)
    assert tiny.distance(found[0], y) < 2e-5
    assert tiny.distance(found[1], state) < 2e-5


@given(st.lists(st.integers(1, 90), min_size=2, max_size=5), st.integers(0, 99))
def test_any_split_gives_what_the_whole_gives(lengths, seed):
    case = arrays(inputs(sum(lengths), seed=seed))
    y, last = gated_delta(**case)
    parts, state, start = [], case.pop("state"), 0
    for length in lengths:
        part = {name: x[:, start : start + length] for name, x in case.items()}
        out, state = gated_delta(**part, state=state)
        parts.append(out)
        start += length
    assert tiny.distance(mx.concatenate(parts, axis=1), y) < 1e-5
    assert tiny.distance(state, last) < 1e-5


def test_no_state_is_a_state_of_zeros():
    case = arrays(inputs(9))
    zeros = mx.zeros_like(case.pop("state"))
    for found, expected in zip(gated_delta(**case), gated_delta(**case, state=zeros)):
        assert mx.array_equal(found, expected)


@st.composite
def masks(draw):
    """Padding in front, behind, between, all of these, and rows that are nothing but padding."""
    T = draw(st.integers(1, 140))
    rows = []
    for _ in range(2):
        front, behind = draw(st.integers(0, T)), draw(st.integers(0, T))
        row = np.ones(T, bool)
        row[:front] = row[T - behind :] = False
        if draw(st.booleans()):
            row &= np.random.default_rng(draw(st.integers(0, 99))).random(T) < 0.7
        rows.append(row)
    return np.array(rows)


@given(masks(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_masked_tokens_might_as_well_not_be_there(mask, poison):
    case = inputs(mask.shape[1], B=2)
    for name in NAMES[:-1]:
        case[name][~mask] = poison
    y, state = (np.array(x) for x in gated_delta(**arrays(case), mask=mx.array(mask)))
    assert not y[~mask].any()
    for b, kept in enumerate(mask):
        if not kept.any():
            np.testing.assert_array_equal(state[b], case["state"][b].astype(np.float32))
            continue
        row = {name: case[name][b : b + 1, kept] for name in NAMES[:-1]}
        expected = recurrence(**row, state=case["state"][b : b + 1])
        assert tiny.distance(y[b : b + 1, kept], expected[0]) < 1e-5
        assert tiny.distance(state[b : b + 1], expected[1]) < 1e-5


@pytest.mark.parametrize("T", [1, 70])
def test_no_gradient_flows_from_what_is_masked(T):
    mask = np.arange(T)[None] < T // 2
    case = inputs(T)
    for name in NAMES[:-1]:
        case[name][~mask] = np.nan

    def form(*values):
        return gated_delta(*values, mx.array(mask))

    gradients = mx.grad(weighted_sum(form, case), argnums=tuple(range(6)))(*arrays(case).values())
    for name, gradient in zip(NAMES, map(np.array, gradients)):
        assert np.isfinite(gradient).all(), name
        if name != "state":
            assert not gradient[~mask].any(), name


@pytest.mark.parametrize("T", [1, 63, 150])
@pytest.mark.parametrize("decay", DECAYS)
def test_no_digits_are_lost_whatever_the_decays(decay, T):
    for name, error in relative_errors(inputs(T, g=DECAYS[decay]), gated_delta).items():
        assert error < 2e-5, name


@pytest.mark.parametrize("T", [1, 64, 130])
@pytest.mark.parametrize("zeros", [0.3, 1.0])
def test_a_decay_that_underflowed_to_zero_forgets_and_gives_no_nan(T, zeros):
    case = inputs(T, g=lambda rng, shape: np.where(rng.random(shape) < zeros, 0, 0.9))
    errors = relative_errors(case, gated_delta)
    # Its own gradient has no value to be: exp never underflows to zero by a finite step.
    assert np.isfinite(errors.pop("gradient of g"))
    for name, error in errors.items():
        assert error < 2e-5, name


@pytest.mark.parametrize("T", [5, 64, 200])
@pytest.mark.parametrize("sign", ["equal", "alternating"])
def test_a_chunk_of_equal_keys_written_in_full_holds_the_last_value(T, sign):
    case = inputs(T, g=DECAYS["1"])
    signs = np.ones(T) if sign == "equal" else (-1.0) ** np.arange(T)
    case["k"] = np.broadcast_to(case["k"][:, :1], case["k"].shape) * signs[:, None, None]
    case["q"] = case["k"]
    case["beta"][:] = 1
    assert tiny.distance(gated_delta(**arrays(case))[0], case["v"]) < 1e-5
    for name, error in relative_errors(case).items():
        assert error < 1e-4, name


def test_at_beta_zero_the_state_only_decays():
    case = inputs(80)
    case["beta"][:] = 0
    decayed = np.cumprod(case["g"], axis=1)
    y, state = gated_delta(**arrays(case))
    read = np.einsum("bth,bhvk,bthk->bthv", decayed, case["state"], case["q"])
    assert tiny.distance(y, read) < 1e-6
    assert tiny.distance(state, decayed[:, -1, :, None, None] * case["state"]) < 1e-6


@given(
    *(st.integers(1, most) for most in (3, 140, 4, 20, 20)),
    st.sampled_from([1, 2, 8, 64, 128]),
)
def test_every_shape_and_chunk_gives_the_recurrence(B, T, H, Dk, Dv, chunk):
    case = inputs(T, B=B, H=H, Dk=Dk, Dv=Dv)
    found = chunked(*arrays(case).values(), chunk=chunk)
    for x, expected in zip(found, recurrence(**case)):
        assert x.dtype == mx.float32
        assert tiny.distance(x, expected) < 3e-5


@pytest.mark.parametrize("T", [1, CHUNK + 1])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_goes_in_and_out_and_the_state_stays_float32(dtype, T):
    case = {name: x.astype(dtype) for name, x in arrays(inputs(T)).items()}
    case["state"] = case["state"].astype(mx.float32)
    y, state = gated_delta(**case)
    y32, state32 = gated_delta(**{name: x.astype(mx.float32) for name, x in case.items()})
    assert (y.dtype, state.dtype) == (dtype, mx.float32)
    assert mx.array_equal(y, y32.astype(dtype))
    assert mx.array_equal(state, state32)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("k", (1, 4, 2, 7), r"k has shape \(1, 4, 2, 7\), expected \(1, 4, 2, 6\)"),
        ("v", (1, 3, 2, 5), r"v has shape \(1, 3, 2, 5\), expected \(1, 4, 2, 5\)"),
        ("g", (1, 4), r"g has shape \(1, 4\), expected \(1, 4, 2\)"),
        ("beta", (1, 4, 2, 1), r"beta has shape"),
        ("state", (1, 2, 6, 5), r"state has shape \(1, 2, 6, 5\), expected \(1, 2, 5, 6\)"),
        ("mask", (1, 5), r"mask has shape \(1, 5\), expected \(1, 4\)"),
        ("q", (4, 2, 6), r"q has shape \(4, 2, 6\)"),
        ("q", (1, 0, 2, 6), r"T >= 1"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(name, shape, expected):
    case = {**arrays(inputs(4)), name: mx.zeros(shape)}
    with pytest.raises(ValueError, match=expected):
        gated_delta(**case)


def test_only_a_single_token_goes_through_the_loop(monkeypatch):
    lengths = []

    def counted(q, *rest):
        lengths.append(q.shape[1])
        return naive(q, *rest)

    monkeypatch.setattr(sys.modules["mlx_hydra.ops.gated_delta"], "naive", counted)
    for T in (1, 2, 100):
        gated_delta(**arrays(inputs(T)))
    assert lengths == [1]


def test_gated_delta_heeds_its_backend():
    with pytest.raises(ValueError, match="opencl"):
        gated_delta(**arrays(inputs(2)), backend="opencl")
