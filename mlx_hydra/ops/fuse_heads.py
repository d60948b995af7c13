"""Fusion of head outputs: a norm, a gate and one learned weight a head (HydraHead, Eq 13-14)."""

from typing import Optional

import mlx.core as mx
import mlx.nn as nn

from .. import kernels
from .backend import resolve_backend

ACTIVATIONS = {"sigmoid": mx.sigmoid, "silu": nn.silu}

# The kinds of gate of metal/heads.h.
NO_GATE, GATE = 0, 1
GATE_KINDS = {None: GATE, "sigmoid": 2, "silu": 3}

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MOST_HEAD_DIM = 512
HEADS_PER_GROUP = 8

FORWARD = kernels.Kernel("fuse_heads", ("o", "gamma", "gate", "eps"), ("out",), ("heads.h",))
VJP = kernels.Kernel(
    "fuse_heads_vjp",
    ("o", "gamma", "gate", "eps", "dy"),
    ("d_o", "d_gate", "d_gamma"),
    ("heads.h",),
)


def fuse_heads(
    o: mx.array,
    gamma: mx.array,
    gate: Optional[mx.array] = None,
    *,
    eps: Optional[float],
    activation: Optional[str] = None,
    backend: str = "auto",
) -> mx.array:
    """Bring head outputs to one scale and lay them side by side for o_proj.

    Args:
        o: head outputs ``[B, T, H, D]``.
        gamma: float32 ``[H]``, the static weight of each head.
        gate: ``[B, T, H * D]``; None for no gate.
        eps: added to the mean square in the RMSNorm of each head; None for no norm.
        activation: what the gate still has to go through, ``"sigmoid"`` or ``"silu"``; None where
            it has been through it.
        backend: ``"auto"``, ``"ops"``, or ``"metal"`` or ``"cuda"``: one kernel forward and one
            back, for o and gate in float32, float16 or bfloat16, a float32 gamma and D up to 512.

    Returns:
        ``gamma_h * gate_h * RMSNorm(o_h)`` as ``[B, T, H * D]`` in o's dtype.

    Raises:
        ValueError: shapes that do not fit together, an unknown activation, or a backend that is
            not there.
    """
    B, T, H, D = o.shape
    if gamma.shape != (H,):
        raise ValueError(f"fuse_heads: gamma has shape {gamma.shape}, expected {(H,)}.")
    if gate is not None and gate.shape != (B, T, H * D):
        raise ValueError(f"fuse_heads: gate has shape {gate.shape}, expected {(B, T, H * D)}.")
    if activation not in GATE_KINDS:
        raise ValueError(
            f"fuse_heads: activation={activation!r}, expected one of {', '.join(ACTIVATIONS)}."
        )
    backend = resolve_backend(backend, _supported(o, gamma, gate))
    if backend != "ops":
        return _by_kernel(o, gamma, gate, eps, activation, backend)
    dtype = o.dtype
    if eps is not None:
        o = mx.fast.rms_norm(o, None, eps)
    o = (gamma[:, None] * o).reshape(B, T, H * D)
    if gate is not None:
        o = o * (gate if activation is None else ACTIVATIONS[activation](gate))
    return o.astype(dtype)


def _supported(o, gamma, gate):
    gpu = kernels.gpu_backend()
    fits = (
        gpu is not None
        and o.size > 0
        and o.shape[-1] <= MOST_HEAD_DIM
        and o.dtype in DTYPES
        and gamma.dtype == mx.float32
        and (gate is None or gate.dtype in DTYPES)
    )
    return (gpu, "ops") if fits else ("ops",)


def _by_kernel(o, gamma, gate, eps, activation, backend):
    B, T, H, D = o.shape
    kind = NO_GATE if gate is None else GATE_KINDS[activation]
    # A kernel has all its inputs always; what stands for the gate is not read.
    gate = gamma if gate is None else gate
    epsilon = kernels.constant((eps or 0.0,), mx.float32)
    launch = {
        "template": [
            ("X", o.dtype),
            ("G", gate.dtype),
            ("H", H),
            ("D", D),
            ("NORM", eps is not None),
            ("KIND", kind),
        ],
        "groups": (-(-B * T * H // HEADS_PER_GROUP), 1, 1),
        "threads": (32 * HEADS_PER_GROUP, 1, 1),
    }

    @mx.custom_function
    def fuse(o, gamma, gate):
        (out,) = FORWARD(
            backend,
            [o, gamma, gate, epsilon],
            output_shapes=[(B, T, H * D)],
            output_dtypes=[o.dtype],
            **launch,
        )
        return out

    @fuse.vjp
    def fuse_vjp(primals, cotangent, _):
        o, gamma, gate = primals
        d_o, d_gate, d_gamma = VJP(
            backend,
            [o, gamma, gate, epsilon, cotangent],
            output_shapes=[o.shape, (1,) if kind == NO_GATE else gate.shape, (B, T, H)],
            output_dtypes=[o.dtype, gate.dtype, mx.float32],
            **launch,
        )
        if kind == NO_GATE:
            d_gate = mx.zeros_like(gate)
        return d_o, d_gamma.sum((0, 1)), d_gate

    return fuse(o, mx.contiguous(gamma), gate)
