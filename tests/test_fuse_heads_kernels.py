import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_hydra import kernels
from mlx_hydra.ops import fuse_heads
from mlx_hydra.ops.fuse_heads import HeadOutputs, fuse_kinds

ROUNDING = {mx.float32: 0, mx.float16: 2**-11, mx.bfloat16: 2**-8}

# dtype, (B, T, H, D), eps, activation or "no gate", layout of o
CASES = [
    (mx.float32, (2, 7, 3, 64), 1e-6, None, "heads first"),
    (mx.float32, (1, 65, 5, 32), 1e-3, "silu", "rows"),
    (mx.float32, (3, 1, 2, 256), None, "sigmoid", "heads first"),
    (mx.float32, (1, 3, 4, 48), 1e-6, "no gate", "heads first"),
    (mx.float32, (2, 2, 1, 512), None, "no gate", "rows"),
    (mx.float16, (1, 63, 14, 128), 1e-6, "silu", "heads first"),
    (mx.bfloat16, (3, 5, 2, 128), 1e-5, "sigmoid", "heads first"),
    (mx.bfloat16, (1, 1, 1, 9), 1e-6, None, "rows"),
]
if kernels.gpu_backend() is not None:
    CASES += list(
        itertools.product(
            ROUNDING,
            [(3, 300, 5, 128), (1, 64, 2, 256), (2, 65, 7, 32), (1, 63, 16, 64)],
            [None, 1e-6],
            ["sigmoid", "silu", None, "no gate"],
            ["rows", "heads first"],
        )
    )


def inputs(dtype, shape, activation, layout, seed=0):
    B, T, H, D = shape
    rng = np.random.default_rng(seed)
    o = rng.standard_normal(shape) * 10 ** rng.uniform(-1, 1, (H, 1))
    if layout == "heads first":
        o = mx.array(o.transpose(0, 2, 1, 3), dtype).transpose(0, 2, 1, 3)
    else:
        o = mx.array(o, dtype)
    if layout == "channels apart":
        o = mx.contiguous(o.swapaxes(2, 3)).swapaxes(2, 3)
    gate = None
    if activation != "no gate":
        gate = mx.array(2 * rng.standard_normal((B, T, H * D)), dtype)
        if layout == "heads first":
            # Among other projections, channel by channel.
            wide = mx.concatenate([mx.zeros((B, T, 5), dtype), gate], axis=-1)
            gate = mx.contiguous(wide.swapaxes(1, 2)).swapaxes(1, 2)[..., 5:]
    return o, mx.array(rng.uniform(-2, 2, H), mx.float32), gate


def bias_of(gate, layout, seed=0):
    """One of a wider array: with other numbers in between, or where no wide piece starts."""
    size = gate.shape[-1]
    wide = mx.array(np.random.default_rng(9 + seed).standard_normal(2 * size + 5), gate.dtype)
    return wide[5::2] if layout == "heads first" else wide[5 : 5 + size]


def plain(x):
    return np.array(x.astype(mx.float32), np.float64)


def activated(gate, activation):
    s = 1 / (1 + np.exp(-gate))
    return {"sigmoid": s, "silu": gate * s}.get(activation, gate)


def slope(gate, activation):
    s = 1 / (1 + np.exp(-gate))
    return {"sigmoid": s * (1 - s), "silu": s + gate * s * (1 - s)}.get(activation, 1)


def reference(o, gamma, gate, eps, activation, dy):
    """The result and the gradients of o, gamma and gate, in float64."""
    shape, (o, gamma, dy) = o.shape, (plain(x) for x in (o, gamma, dy))
    factor = gate_slope = np.ones(shape)
    if gate is not None:
        gate = plain(gate).reshape(shape)
        factor, gate_slope = activated(gate, activation), slope(gate, activation)
    dy = dy.reshape(shape)
    r = 1.0 if eps is None else 1 / np.sqrt((o**2).mean(-1, keepdims=True) + eps)
    n, weight = r * o, gamma[:, None]
    dn = dy * weight * factor
    d_o = dn if eps is None else r * (dn - n * (dn * n).mean(-1, keepdims=True))
    flat = (*shape[:2], -1)
    return (
        (weight * n * factor).reshape(flat),
        d_o,
        (dy * factor * n).sum((0, 1, 3)),
        (dy * weight * n * gate_slope).reshape(flat),
    )


def close(found, expected, dtype, rounded=0):
    """Float32 inside and rounded once; or a sum of what was, of these magnitudes together."""
    found, rounded = plain(found), rounded + np.abs(expected)
    assert found.shape == expected.shape
    error, scale = np.abs(found - expected), rounded.max()
    assert (error <= ROUNDING[dtype] * rounded + 2e-5 * scale).all(), error.max() / scale


@pytest.mark.parametrize("dtype, shape, eps, activation, layout", CASES)
def test_result_and_gradients_are_those_of_float64(
    dtype, shape, eps, activation, layout, kernel_backend
):
    o, gamma, gate = inputs(dtype, shape, activation, layout)
    activation = None if activation == "no gate" else activation
    B, T, H, D = shape
    # A slice, as the halves of a concatenation hand it back.
    wide = np.random.default_rng(1).standard_normal((B, T, H * D + 9))
    dy = mx.array(wide, dtype)[..., 4 : 4 + H * D]

    def fuse(*arrays):
        arrays = arrays if gate is not None else (*arrays, None)
        return fuse_heads(*arrays, eps=eps, activation=activation, backend=kernel_backend)

    primals = [x for x in (o, gamma, gate) if x is not None]
    (out,), gradients = mx.vjp(fuse, primals, [dy])
    expected = reference(o, gamma, gate, eps, activation, dy)
    assert [x.dtype for x in (out, *gradients)] == [x.dtype for x in (o, *primals)]
    close(out, expected[0], dtype)
    close(gradients[0], expected[1], dtype)
    close(gradients[1], expected[2], mx.float32)
    if gate is not None:
        close(gradients[2], expected[3], dtype)


# dtype, (B, T, H, D), heads of the second kind, and of each kind eps, activation, layout and
# whether its gate has a bias
KINDS = [
    (mx.float32, (2, 7, 2, 64), 3, (1e-6, "sigmoid", "heads first"), (1e-3, "silu", "rows")),
    (mx.float32, (1, 5, 3, 33), 1, (None, "no gate", "rows"), (1e-6, "silu", "heads first")),
    (mx.float16, (3, 1, 1, 128), 15, (1e-5, "silu", "heads first"), (None, "no gate", "rows")),
    (mx.bfloat16, (1, 65, 2, 128), 14, (1e-6, "sigmoid", "rows"), (1e-6, "silu", "heads first")),
    (
        mx.float32,
        (2, 3, 2, 256),
        1,
        (1e-3, "no gate", "channels apart"),
        (None, "no gate", "heads first"),
    ),
    (
        mx.float32,
        (2, 7, 2, 64),
        3,
        (1e-6, "sigmoid", "heads first", "bias"),
        (1e-3, "silu", "rows", "bias"),
    ),
    (mx.float32, (2, 5, 3, 33), 1, (None, None, "rows", "bias"), (1e-6, "silu", "heads first")),
    (mx.float32, (1, 3, 1, 512), 2, (1e-6, "silu", "rows"), (None, "sigmoid", "rows", "bias")),
    (
        mx.float16,
        (3, 1, 1, 128),
        15,
        (1e-5, "no gate", "rows"),
        (None, "silu", "heads first", "bias"),
    ),
    (mx.float16, (2, 5, 2, 96), 1, (None, "silu", "rows", "bias"), (None, "no gate", "rows")),
    (
        mx.bfloat16,
        (1, 65, 2, 128),
        14,
        (1e-6, "sigmoid", "rows", "bias"),
        (1e-6, "silu", "heads first", "bias"),
    ),
    (mx.bfloat16, (3, 3, 2, 9), 3, (None, None, "rows", "bias"), (1e-6, "silu", "rows", "bias")),
    (mx.bfloat16, (2, 3, 1, 256), 2, (1e-6, "silu", "heads first"), (1e-6, None, "rows", "bias")),
]


# Plain ops round in between: to float32 alone the bounds apply.
@pytest.mark.parametrize(
    "backend, dtype, shape, heads, first, second",
    [("kernel", *case) for case in KINDS]
    + [("ops", *case) for case in KINDS if case[0] == mx.float32],
)
def test_kinds_of_heads_are_fused_each_its_way(
    backend, dtype, shape, heads, first, second, kernel_backend
):
    backend = kernel_backend if backend == "kernel" else backend
    B, T, H, D = shape
    sizes, kinds, gammas = (H, heads), [], []
    for seed, (size, (eps, activation, layout, *bias)) in enumerate(zip(sizes, (first, second))):
        o, gamma, gate = inputs(dtype, (B, T, size, D), activation, layout, seed)
        activation = None if activation == "no gate" else activation
        bias = bias_of(gate, layout, seed) if bias else None
        kinds.append(HeadOutputs(o, gate, eps, activation, bias))
        gammas.append(gamma)
    dy = mx.array(np.random.default_rng(2).standard_normal((B, T, sum(sizes) * D)), dtype)

    def fuse(gamma, *arrays):
        arrays = iter(arrays)
        given = [
            HeadOutputs(*(next(arrays) if isinstance(x, mx.array) else x for x in kind))
            for kind in kinds
        ]
        return fuse_kinds(given, gamma, backend=backend)

    arrays = [x for kind in kinds for x in kind if isinstance(x, mx.array)]
    # Gamma lies apart.
    gamma = mx.repeat(mx.concatenate(gammas), 2)[::2]
    (out,), (d_gamma, *gradients) = mx.vjp(fuse, [gamma, *arrays], [dy])
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    found, start = iter(gradients), 0
    for kind, gamma in zip(kinds, gammas):
        stop = start + len(gamma)
        part = slice(start * D, stop * D)
        o, gate, eps, activation, bias = kind
        whole = gate
        if bias is not None:
            # A float32 on the way forward, of the gate's type on the way back.
            whole, gate = gate.astype(mx.float32) + bias.astype(mx.float32), gate + bias
        expected = reference(o, gamma, whole, eps, activation, dy[..., part])
        close(out[..., part], expected[0], dtype)
        expected = reference(o, gamma, gate, eps, activation, dy[..., part])
        close(next(found), expected[1], dtype)
        close(d_gamma[start:stop], expected[2], mx.float32)
        if gate is not None:
            close(next(found), expected[3], dtype)
        if bias is not None:
            close(next(found), expected[3].sum((0, 1)), dtype, np.abs(expected[3]).sum((0, 1)))
        start = stop


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_gradients_are_those_of_the_ops_backend(activation, kernel_backend):
    case = inputs(mx.float32, (2, 3, 4, 32), activation, "heads first")
    case += (bias_of(case[-1], "heads first"),)

    def loss(backend):
        def of(*arrays):
            *arrays, bias = arrays
            y = fuse_heads(
                *arrays, eps=1e-6, activation=activation, gate_bias=bias, backend=backend
            )
            return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()

        return mx.grad(of, argnums=(0, 1, 2, 3))(*case)

    for found, expected in zip(loss(kernel_backend), loss("ops")):
        close(found, plain(expected), mx.float32)


def test_what_no_kernel_takes_runs_on_ops(kernel_backend):
    o, gamma, gate = inputs(mx.float32, (1, 2, 3, 520), None, "rows")
    with pytest.raises(ValueError, match="this call runs on ops only"):
        fuse_heads(o, gamma, gate, eps=1e-6, backend=kernel_backend)
    assert fuse_heads(o, gamma, gate, eps=1e-6).shape == gate.shape
    with pytest.raises(ValueError, match="ops only"):
        fuse_heads(o[..., :173], gamma.astype(mx.float16), eps=1e-6, backend=kernel_backend)


@pytest.mark.parametrize("D, dtype", [(8, mx.float32), (7, mx.bfloat16)])
def test_a_bias_that_the_kernel_does_not_take_is_added_by_ops(D, dtype, kernel_backend):
    o, gamma, gate = inputs(mx.bfloat16, (1, 4, 1, D), "silu", "rows")
    options = {"eps": 1e-6, "activation": "silu"}
    fuse_heads(o, gamma, gate, **options, backend=kernel_backend)
    options["gate_bias"] = mx.ones(D, dtype)
    with pytest.raises(ValueError, match="ops only"):
        fuse_heads(o, gamma, gate, **options, backend=kernel_backend)
    assert fuse_heads(o, gamma, gate, **options).dtype == o.dtype


def test_the_gradient_of_a_bias_is_summed_in_float32(kernel_backend):
    o = mx.ones((2, 150, 1, 64), mx.bfloat16)
    dy = mx.array(np.random.default_rng(0).standard_normal((2, 150, 64)), o.dtype)

    def fuse(bias):
        gate = o.flatten(2)
        return fuse_heads(o, mx.ones(1), gate, eps=None, gate_bias=bias, backend=kernel_backend)

    # That of the gate is dy itself, whose sums are a good deal less than what is added.
    _, (found,) = mx.vjp(fuse, [mx.zeros(64, o.dtype)], [dy])
    close(found, plain(dy).sum((0, 1)), o.dtype)


def test_kinds_that_do_not_fit_are_named():
    kind = HeadOutputs(mx.zeros((1, 4, 1, 8)), None, 1e-6, None)
    other = kind._replace(o=mx.zeros((1, 2, 1, 8)))
    for kinds in ([], [kind, other], [kind] * 3):
        with pytest.raises(ValueError, match="heads of one kind or two on the same tokens"):
            fuse_kinds(kinds, mx.ones(len(kinds)))


def test_an_unknown_activation_is_named():
    o, gamma, gate = inputs(mx.float32, (1, 2, 3, 8), None, "rows")
    with pytest.raises(ValueError, match="activation='gelu', expected one of sigmoid, silu"):
        fuse_heads(o, gamma, gate, eps=1e-6, activation="gelu")


def test_ops_activate_the_gate_too():
    for activation in ("sigmoid", "silu"):
        o, gamma, gate = inputs(mx.float32, (1, 2, 3, 8), activation, "rows")
        found = fuse_heads(o, gamma, gate, eps=1e-6, activation=activation, backend="ops")
        close(found, reference(o, gamma, gate, 1e-6, activation, gate)[0], mx.float32)
