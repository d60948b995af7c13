"""What the gated delta rule reads, from the projections of x: convolution, norms, RoPE and gates.

A linear head of HydraHead takes its channels of q, k and v through a short causal convolution with
SiLU, q and k through RMSNorm, RoPE and L2 norm (after Gated DeltaNet, 2412.06464).
"""

from collections.abc import Callable
from typing import Optional, Union

import mlx.core as mx
import mlx.nn as nn

from .. import kernels
from .backend import resolve_backend
from .fuse_heads import DTYPES
from .gated_delta_step import HEAD_DIMS, TAPS, Rotation, Weights, turned

L2_NORM_EPS = 1e-6

# Of a SIMD-group, and of a threadgroup; see metal/gated_delta_inputs.metal.
_TOKENS, _SIMD_GROUPS = 16, 8

_KERNEL = kernels.Kernel(
    "gated_delta_inputs",
    (
        *("q_in", "k_in", "v_in", "a", "b", "q_conv", "k_conv", "v_conv", "past", "mask"),
        *("lengths", "q_norm", "k_norm", "frequencies", "offset", "A_log", "dt_bias", "constants"),
    ),
    ("q", "k", "v", "g", "beta", "new_past"),
    ("heads.h", "keys_values.h", "channels.h", "gated_delta_step.h", "tokens.h"),
)


def gated_delta_inputs(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    weights: Weights,
    past: Optional[mx.array] = None,
    *,
    offset: Union[int, mx.array] = 0,
    mask: Optional[mx.array] = None,
    lengths: Optional[mx.array] = None,
    rope: Optional[Callable] = None,
    rotation: Optional[Rotation] = None,
    backend: str = "auto",
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array, Optional[mx.array]]:
    """Make what :func:`gated_delta` reads of the projections of x.

    Args:
        q, k, v: projections ``[B, T, H * D]``.
        a, b: projections ``[B, T, H]``, of decay and update rate.
        weights: of the heads.
        past: the convolution's last K - 1 inputs ``[B, K - 1, 3 * H * D]``, q, k and v side by
            side; zeros where it is None.
        offset: position of the first token, an int or int32 ``[B]`` or ``[1]``.
        mask: bool ``[B, T]``. A token whose entry is False counts as zeros in the convolution; the
            mask still has to go to the delta rule.
        lengths: int32 ``[B]``, after how many of these tokens the new past ends; after all of
            them where it is None.
        rope: called with queries or keys ``[B, H, T, D]`` and ``offset``; None for no RoPE.
        rotation: what ``rope`` does; None where that is not known, or depends on the length.
        backend: ``"auto"``, ``"ops"``, or ``"metal"`` or ``"cuda"``: one kernel, with all
            arithmetic in float32, for projections of one dtype (float32, float16 or bfloat16),
            heads of 32, 64, 128 or 256 channels, convolutions of 2 to 8 taps or none, and a known
            rotation. Its gradient is that of ``"ops"``.

    Returns:
        q, k and v ``[B, T, H, D]`` in the dtype of the projections, q scaled by ``D^-0.5``; decay
        and update rate, float32 ``[B, T, H]``; and the new past, None without a convolution.
        Splitting a sequence anywhere and handing the past on gives what one call gives.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not there.
    """
    convolution = weights.convolution or ()
    _check_shapes(q, k, v, a, b, convolution, weights, past, mask)
    known = rope is None or (
        rotation is not None and 2 * rotation.frequencies.size == weights.q_norm.size
    )
    backend = resolve_backend(backend, _supported(q, k, v, a, b, convolution, past, known))
    learned = weights.q_norm, weights.k_norm, weights.A_log, weights.dt_bias
    before = () if past is None or not convolution else (past,)
    primals = (q, k, v, a, b, *learned, *convolution, *before)

    def by_ops(*arrays):
        return _by_ops(*_regrouped(arrays, weights), offset, mask, lengths, rope)

    if backend == "ops":
        outputs = by_ops(*primals)
    else:
        rotation = None if rope is None else rotation

        @mx.custom_function
        def by_kernel(*arrays):
            arguments = _regrouped(arrays, weights)
            return _by_kernel(backend, *arguments, offset, mask, lengths, rotation)

        @by_kernel.vjp
        def by_kernel_vjp(primals, cotangents, _):
            return mx.vjp(by_ops, list(primals), list(cotangents))[1]

        outputs = by_kernel(*primals)
    return tuple(outputs) if convolution else (*outputs, None)


def _regrouped(arrays, weights):
    """The five projections, the weights and the past, of the arrays that have gradients."""
    projections, learned, rest = arrays[:5], arrays[5:9], arrays[9:]
    convolution = None
    if weights.convolution is not None:
        convolution, rest = rest[:3], rest[3:]
    return projections, Weights(*learned, weights.norm_eps, convolution), *(rest or (None,))


def _by_ops(projections, weights, past, offset, mask, lengths, rope):
    q, k, v, a, b = projections
    B, T, _ = q.shape
    (H,), dtype = weights.A_log.shape, q.dtype
    new_past = ()
    if weights.convolution is not None:
        qkv = mx.concatenate([q, k, v], axis=-1)
        qkv, *new_past = short_convolution(qkv, weights.convolution, past, mask, lengths)
        q, k, v = mx.split(nn.silu(qkv), 3, axis=-1)
    q, k, v = (x.reshape(B, T, H, -1) for x in (q, k, v))
    q = mx.fast.rms_norm(q, weights.q_norm, weights.norm_eps)
    k = mx.fast.rms_norm(k, weights.k_norm, weights.norm_eps)
    if rope is not None:
        q, k = (turned(rope, x.swapaxes(1, 2), offset).swapaxes(1, 2) for x in (q, k))
    q, k = q.shape[-1] ** -0.5 * _l2_norm(q), _l2_norm(k)

    pace = nn.softplus(a.astype(mx.float32) + weights.dt_bias)
    g = mx.exp(-mx.exp(weights.A_log) * pace)
    beta = mx.sigmoid(b.astype(mx.float32))
    return (*(x.astype(dtype) for x in (q, k, v)), g, beta, *(x.astype(dtype) for x in new_past))


def short_convolution(
    inputs: mx.array,
    weights: tuple[mx.array, ...],
    past: Optional[mx.array] = None,
    mask: Optional[mx.array] = None,
    lengths: Optional[mx.array] = None,
) -> tuple[mx.array, mx.array]:
    """Causal depthwise convolution over time, in plain ops.

    Args:
        inputs: ``[B, T, C]``.
        weights: ``[n, K, 1]`` each, for C channels in all.
        past, mask, lengths: as :func:`gated_delta_inputs` takes them.

    Returns:
        ``[B, T, C]``, and the last K - 1 inputs, which the next call sees.
    """
    weight = mx.concatenate([w[..., 0] for w in weights])
    B, T, C = inputs.shape
    K = weight.shape[1]
    if mask is not None:
        inputs = mx.where(mask[..., None], inputs, 0)
    if past is None:
        past = mx.zeros((B, K - 1, C), inputs.dtype)
    inputs = mx.concatenate([past, inputs], axis=1)
    if lengths is None:
        past = mx.contiguous(inputs[:, T:])
    else:
        ends = mx.clip(lengths, 0, T)
        kept = (ends[:, None] + mx.arange(K - 1))[..., None]
        past = mx.take_along_axis(inputs, kept, axis=1)
    return sum(inputs[:, j : j + T] * weight[:, j] for j in range(K)), past


def _l2_norm(x):
    """``x / sqrt(sum(x^2) + L2_NORM_EPS)`` over the last axis, by MLX's RMSNorm."""
    D = x.shape[-1]
    return D**-0.5 * mx.fast.rms_norm(x, None, L2_NORM_EPS / D)


def _supported(q, k, v, a, b, convolution, past, known_rotation):
    gpu = kernels.gpu_backend()
    fits = (
        gpu is not None
        and q.size > 0
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and a.dtype in DTYPES
        and b.dtype in DTYPES
        and q.shape[-1] // a.shape[-1] in HEAD_DIMS
        and (convolution[0].shape[1] if convolution else 0) in TAPS
        and len({w.dtype for w in convolution}) < 2
        and all(x.dtype in DTYPES for x in (*convolution, *([] if past is None else [past])))
        and known_rotation
    )
    return (gpu, "ops") if fits else ("ops",)


def _by_kernel(backend, projections, weights, past, offset, mask, lengths, rotation):
    q = projections[0]
    B, T, C = q.shape
    (H,), (D,) = weights.A_log.shape, weights.q_norm.shape
    taps = 0 if weights.convolution is None else weights.convolution[0].shape[1]
    fresh = past is None
    if isinstance(offset, int):
        offset = kernels.positions(offset, B)
    # A kernel has all its inputs always; others stand for those that it does not read.
    convolution = map(mx.contiguous, weights.convolution) if taps else (q,) * 3
    past = q if fresh else mx.contiguous(past)
    frequencies, scale = (weights.A_log, 1.0) if rotation is None else rotation
    masked, ends = (taps > 0 and x is not None for x in (mask, lengths))
    *outputs, new_past = _KERNEL(
        backend,
        [
            *(*projections, *convolution, past, mx.contiguous(mask) if masked else offset),
            *(lengths if ends else offset, weights.q_norm, weights.k_norm, frequencies, offset),
            *(weights.A_log, weights.dt_bias),
            kernels.constant((weights.norm_eps, scale), mx.float32),
        ],
        template=[
            *(("X", q.dtype), ("P", past.dtype), ("W", (weights.convolution or (q,))[0].dtype)),
            *(("H", H), ("D", D), ("TAPS", taps), ("ROPE", rotation is not None)),
            *(("MASKED", masked), ("FRESH", fresh), ("ENDS", ends)),
        ],
        groups=(-(-T // _TOKENS), -(-3 * H // _SIMD_GROUPS), B),
        threads=(32 * _SIMD_GROUPS, 1, 1),
        output_shapes=[
            *[(B, T, H, D)] * 3,
            *[(B, T, H)] * 2,
            (B, taps - 1, 3 * C) if taps else (1,),
        ],
        output_dtypes=[*[q.dtype] * 3, mx.float32, mx.float32, q.dtype],
    )
    return (*outputs, new_past) if taps else outputs


def _check_shapes(q, k, v, a, b, convolution, weights, past, mask):
    def check(name, x, shape):
        if tuple(x.shape) != shape:
            raise ValueError(
                f"gated_delta_inputs: {name} has shape {tuple(x.shape)}, expected {shape}."
            )

    if q.ndim != 3 or a.ndim != 3:
        raise ValueError(
            f"gated_delta_inputs: q has shape {tuple(q.shape)} and a {tuple(a.shape)}, "
            "expected [B, T, H * D] and [B, T, H]."
        )
    B, T, H = a.shape
    (D,) = weights.q_norm.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(name, x, (B, T, H * D))
    check("b", b, (B, T, H))
    if convolution:
        K = convolution[0].shape[1]
        for name, w in zip("qkv", convolution):
            check(f"the convolution of {name}", w, (H * D, K, 1))
        if past is not None:
            check("past", past, (B, K - 1, 3 * H * D))
    if mask is not None:
        check("mask", mask, (B, T))
