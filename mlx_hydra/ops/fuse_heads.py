"""Fusion of head outputs: a norm, a gate and one learned weight a head (HydraHead, Eq 13-14)."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

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

FORWARD = kernels.Kernel(
    "fuse_heads",
    ("o", "gate", "bias", "o_2", "gate_2", "bias_2", "gamma", "eps"),
    ("out",),
    ("heads.h", "keys_values.h", "channels.h", "fuse_heads.h"),
)
VJP = kernels.Kernel(
    "fuse_heads_vjp",
    ("o", "gamma", "gate", "eps", "dy"),
    ("d_o", "d_gate", "d_gamma"),
    ("heads.h",),
)


class HeadOutputs(NamedTuple):
    """What heads of one kind give, and how it is fused: arguments of :func:`fuse_heads`."""

    o: mx.array
    gate: Optional[mx.array]
    eps: Optional[float]
    activation: Optional[str]
    gate_bias: Optional[mx.array] = None


def fuse_heads(
    o: mx.array,
    gamma: mx.array,
    gate: Optional[mx.array] = None,
    *,
    eps: Optional[float],
    activation: Optional[str] = None,
    gate_bias: Optional[mx.array] = None,
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
        gate_bias: ``[H * D]``, added to the gate before its activation; None for no bias. In the
            kernel the sum is float32, else of the dtype of ``gate + gate_bias``.
        backend: ``"auto"``, ``"ops"``, or ``"metal"`` or ``"cuda"``: one kernel forward and one
            back, for o and gate in float32, float16 or bfloat16, a bias of the gate's dtype, a
            float32 gamma, D up to 512 and 8 elements of o and of a bias or more.

    Returns:
        ``gamma_h * gate_h * RMSNorm(o_h)`` as ``[B, T, H * D]`` in o's dtype.

    Raises:
        ValueError: shapes that do not fit together, a bias without a gate, an unknown activation,
            or a backend that is not there.
    """
    kind = HeadOutputs(o, gate, eps, activation, gate_bias)
    return fuse_kinds([kind], gamma, backend=backend)


def fuse_kinds(kinds: Sequence[HeadOutputs], gamma: mx.array, *, backend: str = "auto") -> mx.array:
    """Fuse the heads of one kind or two, which differ in norm and gate; see :func:`fuse_heads`.

    Args:
        kinds: one or two, of one dtype and head size; their gates and biases of one dtype.
        gamma: float32, of all heads in their order.
        backend: as in :func:`fuse_heads`; the kernel writes both kinds where o_proj reads.

    Returns:
        ``[B, T, (H_1 + H_2) * D]``.
    """
    sizes = [kind.o.shape[2] for kind in kinds]
    if len(kinds) not in (1, 2) or len({kind.o.shape[:2] for kind in kinds}) != 1:
        shapes = ", ".join(str(kind.o.shape) for kind in kinds)
        raise ValueError(
            f"fuse_heads: heads of one kind or two on the same tokens, not [{shapes}]."
        )
    if gamma.shape != (sum(sizes),):
        raise ValueError(f"fuse_heads: gamma has shape {gamma.shape}, expected {(sum(sizes),)}.")
    for o, gate, _, activation, bias in kinds:
        B, T, H, D = o.shape
        if gate is not None and gate.shape != (B, T, H * D):
            raise ValueError(f"fuse_heads: gate has shape {gate.shape}, expected {(B, T, H * D)}.")
        if bias is not None and gate is None:
            raise ValueError("fuse_heads: gate_bias without a gate.")
        if bias is not None and bias.shape != (H * D,):
            raise ValueError(f"fuse_heads: gate_bias has shape {bias.shape}, expected {(H * D,)}.")
        if activation not in GATE_KINDS:
            raise ValueError(
                f"fuse_heads: activation={activation!r}, expected one of {', '.join(ACTIVATIONS)}."
            )
    backend = resolve_backend(backend, _supported(kinds, gamma))
    if backend != "ops":
        return _by_kernel(kinds, gamma, backend)
    if len(kinds) == 1:
        return _by_ops(kinds[0], gamma)
    # Slices: mx.compile fails on mx.split of a weight inside mx.checkpoint.
    weights = gamma[: sizes[0]], gamma[sizes[0] :]
    return mx.concatenate([_by_ops(*pair) for pair in zip(kinds, weights)], axis=-1)


def _by_ops(kind, gamma):
    o, gate, eps, activation, bias = kind
    dtype = o.dtype
    if eps is not None:
        o = mx.fast.rms_norm(o, None, eps)
    o = (gamma[:, None] * o).flatten(2)
    if bias is not None:
        gate = gate + bias
    if gate is not None:
        o = o * (gate if activation is None else ACTIVATIONS[activation](gate))
    return o.astype(dtype)


def _supported(kinds, gamma):
    gpu = kernels.gpu_backend()
    biases = _given(kinds, "gate_bias")
    # The kernel knows one type of gates and biases.
    dtypes = {x.dtype for x in (*_given(kinds, "gate"), *biases)}
    fits = (
        gpu is not None
        # Metal passes smaller arrays in another address space.
        and all(x.size >= 8 for x in (*(kind.o for kind in kinds), *biases))
        and len({(kind.o.dtype, kind.o.shape[-1]) for kind in kinds}) == 1
        and kinds[0].o.shape[-1] <= MOST_HEAD_DIM
        and kinds[0].o.dtype in DTYPES
        and gamma.dtype == mx.float32
        and len(dtypes) < 2
        and dtypes <= {*DTYPES}
    )
    return (gpu, "ops") if fits else ("ops",)


def _given(kinds, name):
    return [x for kind in kinds if (x := getattr(kind, name)) is not None]


def _gate_kind(kind):
    return NO_GATE if kind.gate is None else GATE_KINDS[kind.activation]


def _launch(B, T, H, template):
    return {
        "template": template,
        "groups": (-(-B * T * H // HEADS_PER_GROUP), 1, 1),
        "threads": (32 * HEADS_PER_GROUP, 1, 1),
    }


def _by_kernel(kinds, gamma, backend):
    @mx.custom_function
    def fuse(gamma, *arrays):
        return _forward(_with_arrays(kinds, arrays), gamma, backend)

    @fuse.vjp
    def fuse_vjp(primals, cotangent, _):
        gamma, *arrays = primals
        d_gamma, gradients, start = [], [], 0
        for kind in _with_arrays(kinds, arrays):
            H, D = kind.o.shape[2:]
            stop = start + H
            given = cotangent[..., start * D : stop * D]
            of_kind, part = _backward(kind, gamma[start:stop], given, backend)
            gradients += of_kind
            d_gamma.append(part)
            start = stop
        return mx.concatenate(d_gamma), *gradients

    arrays = (getattr(kind, name) for kind in kinds for name in _arrays_of(kind))
    return fuse(gamma, *arrays)


def _arrays_of(kind):
    """The names of its arrays, of which there may be gradients, in order and without None."""
    return [name for name in ("o", "gate", "gate_bias") if getattr(kind, name) is not None]


def _with_arrays(kinds, arrays):
    """The same kinds of heads with other arrays, those of :func:`_arrays_of` each."""
    arrays = iter(arrays)
    return [kind._replace(**{name: next(arrays) for name in _arrays_of(kind)}) for kind in kinds]


def _forward(kinds, gamma, backend):
    first, second = kinds[0], kinds[1] if len(kinds) == 2 else None
    B, T, H, D = first.o.shape
    more = 0 if second is None else second.o.shape[2]
    # A kernel has all its inputs always; what stands for others is not read.
    other = HeadOutputs(first.o, None, None, None) if second is None else second
    gates = _given(kinds, "gate") or [first.o]
    biases = _given(kinds, "gate_bias") or gates
    (out,) = FORWARD(
        backend,
        [
            *(first.o, gates[0], biases[0], other.o, gates[-1], biases[-1], gamma),
            kernels.constant((first.eps or 0.0, other.eps or 0.0), mx.float32),
        ],
        output_shapes=[(B, T, (H + more) * D)],
        output_dtypes=[first.o.dtype],
        **_launch(
            *(B, T, H + more),
            [
                # Metal tells kernels apart by these alone: the types are among them.
                *(("X", first.o.dtype), ("G", gates[0].dtype), ("H", H), ("H_2", more), ("D", D)),
                *(("NORM", first.eps is not None), ("NORM_2", other.eps is not None)),
                *(("KIND", _gate_kind(first)), ("KIND_2", _gate_kind(other))),
                ("BIAS", first.gate_bias is not None),
                ("BIAS_2", other.gate_bias is not None),
            ],
        ),
    )
    return out


def _backward(kind, gamma, cotangent, backend):
    """The gradients of :func:`_arrays_of` a kind, and that of its part of gamma."""
    o, gate, eps, _, bias = kind
    B, T, H, D = o.shape
    if bias is not None:
        gate = gate + bias
    of_gate = gamma if gate is None else gate
    d_o, d_gate, d_gamma = VJP(
        backend,
        [
            *(o, mx.contiguous(gamma), of_gate),
            kernels.constant((eps or 0.0,), mx.float32),
            cotangent,
        ],
        output_shapes=[o.shape, (1,) if gate is None else gate.shape, (B, T, H)],
        output_dtypes=[o.dtype, of_gate.dtype, mx.float32],
        **_launch(
            *(B, T, H),
            [
                *(("X", o.dtype), ("G", of_gate.dtype), ("H", H), ("D", D)),
                *(("NORM", eps is not None), ("KIND", _gate_kind(kind))),
            ],
        ),
    )
    gradients = [d_o] if gate is None else [d_o, d_gate]
    if bias is not None:
        gradients.append(d_gate.astype(mx.float32).sum((0, 1)).astype(bias.dtype))
    return gradients, d_gamma.sum((0, 1))
