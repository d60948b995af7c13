"""Decode: linear layers of a residual sum's RMSNorm, one kernel for what is four operations."""

from typing import Optional, Union

import mlx.core as mx
from mlx_lm.models.activations import swiglu as swiglu_of

from .. import kernels
from .backend import resolve_backend
from .fuse_heads import DTYPES

MOST_ROWS = 4
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)

# Rows of weights that a SIMD-group has, SIMD-groups of a threadgroup, and numbers that a lane reads
# at once where they are packed; see metal/normed_linear.metal.
_EACH, _SIMD_GROUPS, _PACKED = 2, 8, 16

_KERNEL = kernels.Kernel(
    "normed_linear",
    ("h", "update", "norm", "weight", "scales", "biases", "tail", "eps"),
    ("total", "y"),
    ("heads.h", "keys_values.h", "channels.h", "normed_linear.h"),
    contiguous=True,
)

Weight = Union[mx.array, tuple[mx.array, mx.array, mx.array]]


def normed_linear(
    h: mx.array,
    update: mx.array,
    norm: mx.array,
    weight: Weight,
    *,
    eps: float,
    tail: Optional[mx.array] = None,
    swiglu: bool = False,
    group_size: Optional[int] = None,
    bits: Optional[int] = None,
    backend: str = "auto",
) -> tuple[mx.array, mx.array]:
    """Add to the residual stream, and run linear layers without biases on its RMSNorm.

    Args:
        h, update: the residual stream of a few tokens, and what is added to it, ``[B, K]``.
        norm: weight of the RMSNorm ``[K]``.
        weight: of the layers, one below the other, ``[N, K]``. With ``bits``, the triple that
            ``mx.quantize`` gives.
        eps: added to the mean square.
        tail: of further layers that are not quantised, ``[M, K]``; their outputs follow.
        swiglu: return SiLU of the first half of the outputs times the second half; without tail.
        group_size, bits: how ``weight`` is quantised; None where it is plain.
        backend: ``"auto"``, ``"ops"``, or ``"metal"`` or ``"cuda"``: one kernel, for up to 4 rows
            of one dtype in all (float32, float16 or bfloat16; that of ``norm`` may be another), K
            a multiple of 8 (float32: 4; quantised: 16), 4 or 8 bits in groups of 32, 64 or 128. It
            rounds the sum, and the result once. It has no gradient; ``"ops"`` has.

    Returns:
        The sum ``[B, K]``, and ``[B, N + M]``, or ``[B, N / 2]`` with swiglu, in its dtype.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not there.
    """
    _check_shapes(h, update, norm, weight, tail, swiglu, group_size, bits)
    supported = _supported(h, update, norm, weight, tail, group_size, bits)
    backend = resolve_backend(backend, supported)
    if backend == "ops":
        return _by_ops(h, update, norm, weight, eps, tail, swiglu, group_size, bits)
    return _by_kernel(backend, h, update, norm, weight, eps, tail, swiglu, group_size, bits)


def linear_backend(
    h: mx.array,
    update: mx.array,
    norm: mx.array,
    weight: Weight,
    *,
    tail: Optional[mx.array] = None,
    group_size: Optional[int] = None,
    bits: Optional[int] = None,
) -> str:
    """Name what ``"auto"`` has :func:`normed_linear` run on: ``"ops"`` where no kernel takes it."""
    return resolve_backend("auto", _supported(h, update, norm, weight, tail, group_size, bits))


def _by_ops(h, update, norm, weight, eps, tail, swiglu, group_size, bits):
    total = h + update
    x = mx.fast.rms_norm(total, norm, eps)
    if bits is None:
        y = x @ weight.T
    else:
        y = mx.quantized_matmul(x, *weight, transpose=True, group_size=group_size, bits=bits)
    if tail is not None:
        y = mx.concatenate([y, x @ tail.T], axis=-1)
    if swiglu:
        y = swiglu_of(*mx.split(y, 2, axis=-1))
    return total, y


def _supported(h, update, norm, weight, tail, group_size, bits):
    gpu = kernels.gpu_backend()
    plain = [weight] if bits is None else list(weight[1:])
    plain += [] if tail is None else [tail]
    at_once = _PACKED if bits is not None else 16 // max(h.dtype.size, 2)
    fits = (
        gpu is not None
        and 1 <= len(h) <= MOST_ROWS
        and h.dtype in DTYPES
        and all(x.dtype == h.dtype for x in (update, *plain))
        and norm.dtype in DTYPES
        and h.shape[1] % at_once == 0
        and (bits is None or (bits in BITS and group_size in GROUP_SIZES))
        # Metal passes fewer in another address space.
        and all(x.size >= 8 for x in (norm, *plain))
    )
    return (gpu, "ops") if fits else ("ops",)


def _by_kernel(backend, h, update, norm, weight, eps, tail, swiglu, group_size, bits):
    weight, scales, biases = (weight, h, h) if bits is None else weight
    (rows, K), N, M = h.shape, len(weight), 0 if tail is None else len(tail)
    outputs = N // 2 if swiglu else N
    groups = sum(-(-count // (_EACH * _SIMD_GROUPS)) for count in (N, M))
    total, y = _KERNEL(
        backend,
        [
            *(h, update, norm, weight, scales, biases, h if tail is None else tail),
            kernels.constant((eps,), mx.float32),
        ],
        template=[
            *(("X", h.dtype), ("W", norm.dtype), ("ROWS", rows)),
            *(("BITS", bits or 0), ("GROUP", group_size or 1)),
            *(("TAIL", tail is not None), ("SWIGLU", swiglu)),
        ],
        groups=(groups, 1, 1),
        threads=(32 * _SIMD_GROUPS, 1, 1),
        output_shapes=[(rows, K), (rows, outputs + M)],
        output_dtypes=[h.dtype, h.dtype],
    )
    return total, y


def _check_shapes(h, update, norm, weight, tail, swiglu, group_size, bits):
    def fail(name, x, expected):
        raise ValueError(f"normed_linear: {name} has shape {tuple(x.shape)}, expected {expected}.")

    if h.ndim != 2 or 0 in h.shape:
        fail("h", h, "[B, K]")
    K = h.shape[1]
    if update.shape != h.shape:
        fail("update", update, tuple(h.shape))
    if norm.shape != (K,):
        fail("norm", norm, (K,))
    if (bits is None) != (group_size is None):
        raise ValueError(
            f"normed_linear: bits={bits} and group_size={group_size}, expected both or neither."
        )
    if bits is None:
        parts = [("weight", weight, K)]
    else:
        groups = K // group_size
        parts = list(zip(("weight", "scales", "biases"), weight, (K * bits // 32, groups, groups)))
    if tail is not None:
        parts.append(("tail", tail, K))
    for name, x, width in parts:
        if x.ndim != 2 or len(x) == 0 or x.shape[1] != width:
            fail(name, x, f"[N, {width}]")
    N = len(parts[0][1])
    if swiglu and (tail is not None or N % 2):
        raise ValueError(
            f"normed_linear: swiglu takes two halves, not {N} outputs"
            f"{'' if tail is None else ' and a tail'}."
        )
