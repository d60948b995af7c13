import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mlx_hydra.ops import fuse_heads


def inputs(B=2, T=3, H=4, D=8, seed=0):
    rng = np.random.default_rng(seed)
    o = rng.standard_normal((B, T, H, D)) * 10 ** rng.uniform(-2, 2, (H, 1))
    return o, rng.uniform(-2, 2, H), rng.standard_normal((B, T, H * D))


def bias_of(size):
    return np.random.default_rng(2).standard_normal(size)


def fused(o, gamma, gate, eps):
    if eps is not None:
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + eps)
    o = (gamma[:, None] * o).reshape(*o.shape[:2], -1)
    return o if gate is None else o * gate


@given(
    *(st.integers(1, most) for most in (3, 5, 5, 20)),
    st.sampled_from(["no gate", "gate", "gate and bias"]),
    st.sampled_from([None, 0.0, 1e-6, 0.5]),
)
def test_it_is_gamma_times_gate_times_the_normed_head(B, T, H, D, gated, eps):
    o, gamma, gate = inputs(B, T, H, D)
    gate = None if gated == "no gate" else gate
    bias = bias_of(H * D) if gated == "gate and bias" else None
    expected = fused(o, gamma, gate if bias is None else gate + bias, eps)
    *arguments, bias = [
        None if x is None else mx.array(x, mx.float32) for x in (o, gamma, gate, bias)
    ]
    found = fuse_heads(*arguments, eps=eps, gate_bias=bias)
    assert found.shape == (B, T, H * D)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-6)


def test_a_head_of_zeros_stays_zero():
    found = fuse_heads(mx.zeros((1, 2, 3, 8)), mx.ones(3), eps=1e-6)
    assert tiny.distance(found, np.zeros((1, 2, 24))) == 0


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
def test_half_precision_goes_in_and_out_beside_a_float32_gamma(dtype, tolerance, eps):
    o, gamma, gate = inputs()
    for bias in (np.zeros(gate.shape[-1]), bias_of(gate.shape[-1])):
        found = fuse_heads(
            mx.array(o, dtype),
            mx.array(gamma, mx.float32),
            mx.array(gate, dtype),
            eps=eps,
            gate_bias=mx.array(bias, dtype) if bias.any() else None,
        )
        assert found.dtype == dtype
        error = np.abs(np.array(found.astype(mx.float32)) - fused(o, gamma, gate + bias, eps))
        # Of what is added, which may be more than the sum.
        bound = np.abs(fused(o, gamma, np.abs(gate) + np.abs(bias), eps))
        assert (error <= tolerance * (1e-3 + bound) * 2).all()


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_gradients_are_the_slopes_that_float64_differences_measure(argument, eps):
    o, gamma, gate = inputs()
    case = [o / np.abs(o).max((0, 1, 3), keepdims=True), gamma, gate, bias_of(gate.shape[-1])]
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(gate.shape)
    direction = rng.standard_normal(case[argument].shape)

    def loss(*values):
        *values, bias = values
        found = fuse_heads(*values, eps=eps, gate_bias=bias)
        return (found * mx.array(weights, mx.float32)).sum()

    def slope(step):
        moved = [x + (step * direction if i == argument else 0) for i, x in enumerate(case)]
        o, gamma, gate, bias = moved
        return (fused(o, gamma, gate + bias, eps) * weights).sum()

    gradient = mx.grad(loss, argnums=argument)(*(mx.array(x, mx.float32) for x in case))
    expected = (slope(1e-6) - slope(-1e-6)) / 2e-6
    assert (np.array(gradient) * direction).sum() == pytest.approx(expected, rel=1e-4)


def test_a_bias_is_added_in_the_wider_of_its_type_and_the_gates():
    o, gate = mx.ones((1, 2, 3, 8)), mx.full((1, 2, 24), 256, mx.bfloat16)
    found = fuse_heads(o, mx.ones(3), gate, eps=None, gate_bias=mx.full(24, 0.25))
    assert tiny.distance(found, np.full((1, 2, 24), 256.25)) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gamma": mx.ones(3)}, "gamma has shape (3,), expected (4,)"),
        ({"gamma": mx.ones((4, 1))}, "gamma has shape (4, 1), expected (4,)"),
        ({"gate": mx.ones((2, 3, 4, 8))}, "gate has shape (2, 3, 4, 8), expected (2, 3, 32)"),
        ({"gate_bias": mx.ones(32)}, "gate_bias without a gate"),
        (
            {"gate": mx.ones((2, 3, 32)), "gate_bias": mx.ones((4, 8))},
            "gate_bias has shape (4, 8), expected (32,)",
        ),
        ({"backend": "opencl"}, "backend='opencl'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {"o": mx.ones((2, 3, 4, 8)), "gamma": mx.ones(4), "eps": 1e-6}
    with pytest.raises(ValueError) as error:
        fuse_heads(**{**arguments, **changes})
    assert message in str(error.value)
