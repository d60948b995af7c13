"""What softmax attention of the full heads reads, from the projections of x: norms, RoPE and scale.

A full head of HydraHead takes its queries and keys through RMSNorm and, where there is one, RoPE;
queries are multiplied with HypeNet's log scale (arXiv 2601.22156).
"""

import functools
import math
from collections.abc import Callable
from typing import Optional, Union

import mlx.core as mx
import numpy as np

from .. import kernels
from .backend import resolve_backend
from .fuse_heads import DTYPES
from .gated_delta_step import HEAD_DIMS, Rotation, turned

# What a lane reads at once, the tokens of a SIMD-group at most, and the SIMD-groups of a
# threadgroup; see metal/head_attention_inputs.metal. Small, as heads are few.
_BYTES, _MOST_TOKENS, _SIMD_GROUPS = 32, 8, 8

_KERNEL = kernels.Kernel(
    "head_attention_inputs",
    ("q_in", "k_in", "v_in", "q_norm", "k_norm", "frequencies", "offset", "constants"),
    ("q", "k", "v"),
    ("heads.h", "keys_values.h", "channels.h", "tokens.h"),
)


def head_attention_inputs(
    q: mx.array,
    k: Optional[mx.array],
    v: Optional[mx.array],
    q_norm: mx.array,
    k_norm: mx.array,
    *,
    eps: float,
    offset: Union[int, mx.array] = 0,
    log_scale_base: Optional[float] = None,
    rope: Optional[Callable] = None,
    rotation: Optional[Rotation] = None,
    heads: Optional[tuple[int, int]] = None,
    backend: str = "auto",
) -> tuple[mx.array, mx.array, mx.array]:
    """Make what :func:`head_attention` reads of the projections of x.

    Args:
        q: projection ``[B, T, Hf * D]``, or ``[B, Hf * D]`` of one token of each sequence.
        k, v: projections ``[B, T, Hk * D]``, or ``[B, Hk * D]``; None with ``heads``.
        q_norm, k_norm: weights of the RMSNorm of each head ``[D]``.
        eps: added to the mean square in these norms.
        offset: position of the first token, an int or int32 ``[B]`` or ``[1]``. RoPE turns by
            positions below 0 in the kernel, and in ``"ops"`` as MLX's does.
        log_scale_base: a over 1 in ``log(t + a) / log(a)``, by which queries at position t are
            multiplied; None for no such scale. Positions below 0, as left padding has, count as 0.
        rope: called with queries or keys ``[B, H, T, D]`` and ``offset``; None for no RoPE.
        rotation: what ``rope`` does; None where that is not known, or depends on the length.
        heads: Hf and Hk, where queries, keys and values stand side by side in q, and others may
            follow. Then the kernel has no gradient.
        backend: ``"auto"``, ``"ops"``, or ``"metal"`` or ``"cuda"``: one kernel, with all
            arithmetic in float32 and one rounding, for projections of one dtype and norms of one
            (float32, float16 or bfloat16), heads of 32, 64, 128 or 256 channels (not 80 and 96),
            offsets within int32, and a known rotation of all pairs in float32. Its gradient is
            that of ``"ops"``.

    Returns:
        q ``[B, Hf, T, D]``, k and v ``[B, Hk, T, D]`` in the dtype of the projections; side by side
        in memory where the kernel runs.

    Raises:
        ValueError: shapes that do not fit together, a base of 1 or below, or a backend that is not
            there.
    """
    joined = q
    if heads is not None:
        q, k, v = _parts(joined, heads, q_norm)
    _check_shapes(q, k, v, q_norm, k_norm, offset)
    if log_scale_base is not None and not log_scale_base > 1:
        raise ValueError(
            f"head_attention_inputs: log_scale_base={log_scale_base!r}, expected a number over 1."
        )
    known = rope is None or rotation is not None
    rotation = None if rope is None else rotation
    supported = _supported(q, k, v, q_norm, k_norm, offset, rotation) if known else ("ops",)
    backend = resolve_backend(backend, supported)
    primals = q, k, v, q_norm, k_norm

    def by_ops(*arrays):
        return _by_ops(*arrays, eps, offset, log_scale_base, rope)

    if backend == "ops":
        return by_ops(*primals)
    others = eps, offset, log_scale_base, rotation
    if heads is not None:
        return tuple(_by_kernel(backend, *(joined,) * 3, q_norm, k_norm, *others, heads))

    @mx.custom_function
    def by_kernel(*arrays):
        return _by_kernel(backend, *arrays, *others)

    @by_kernel.vjp
    def by_kernel_vjp(primals, cotangents, _):
        return mx.vjp(by_ops, list(primals), list(cotangents))[1]

    return tuple(by_kernel(*primals))


def log_scales(offset: Union[int, mx.array], count: int, base: float) -> mx.array:
    """HypeNet's ``log(t + base) / log(base)`` (2601.22156) of ``count`` positions from offset on.

    float32 ``[count, 1]``; of an offset ``[n]`` ``[n, 1, count, 1]``.
    """
    if isinstance(offset, int):
        return _log_scales(offset, count, base)
    # Left padding has positions below zero, which nothing reads.
    t = offset[:, None, None]
    t = mx.maximum(t if count == 1 else t + mx.arange(count), 0).astype(mx.float32)
    return (mx.log(t + base) / math.log(base))[..., None]


@functools.lru_cache(maxsize=1)
def _log_scales(start, count, base):
    """One array for all layers of a step."""
    positions = np.maximum(np.arange(start, start + count), 0)
    scales = np.log(positions + base) / math.log(base)
    return mx.array(scales[:, None].astype(np.float32))


def _by_ops(q, k, v, q_norm, k_norm, eps, offset, log_scale_base, rope):
    B, T, (D,), dtype = len(q), _tokens(q), q_norm.shape, q.dtype

    def by_heads(x):
        heads = x.shape[-1] // D
        # One token's heads lie as all heads are to lie.
        return x.reshape(B, heads, 1, D) if T == 1 else x.reshape(B, T, heads, D)

    q, k, v = map(by_heads, (q, k, v))
    q, k = mx.fast.rms_norm(q, q_norm, eps), mx.fast.rms_norm(k, k_norm, eps)
    if T != 1:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if rope is not None:
        q, k = turned(rope, q, offset), turned(rope, k, offset)
    if log_scale_base is not None:
        q = q * log_scales(offset, T, log_scale_base)
    return tuple(x.astype(dtype) for x in (q, k, v))


def _supported(q, k, v, q_norm, k_norm, offset, rotation):
    gpu = kernels.gpu_backend()
    fits = (
        gpu is not None
        and q.size > 0
        and k.size > 0
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q_norm.dtype in DTYPES
        and q_norm.dtype == k_norm.dtype
        # So that no array of channels is one of those that Metal passes in another address space.
        and q_norm.size in HEAD_DIMS
        and (
            _is_within(offset, _tokens(q)) if isinstance(offset, int) else offset.dtype == mx.int32
        )
        and (rotation is None or _turns_pairs(rotation, q_norm.size))
    )
    return (gpu, "ops") if fits else ("ops",)


def _tokens(q):
    return 1 if q.ndim == 2 else q.shape[1]


def _is_within(offset, T):
    return offset >= -(2**31) and offset + T < 2**31 - 32


def _turns_pairs(rotation, D):
    frequencies = rotation.frequencies
    return frequencies.dtype == mx.float32 and 2 * frequencies.size == D


def _by_kernel(backend, q, k, v, q_norm, k_norm, eps, offset, log_scale_base, rotation, heads=None):
    B, T, (D,) = len(q), _tokens(q), q_norm.shape
    Hf, Hk = heads or (q.shape[-1] // D, k.shape[-1] // D)
    if isinstance(offset, int):
        offset = kernels.positions(offset, B)
    # A kernel has all its inputs always; others stand for those that it does not read.
    frequencies, scale = (q_norm, 1.0) if rotation is None else rotation
    base = math.e if log_scale_base is None else log_scale_base
    constants = eps, scale, base, 1 / math.log(base), *(heads or (0, 0))
    tokens = max(1, min(_MOST_TOKENS, 32 * _BYTES // (D * q.dtype.size)))
    # As many SIMD-groups in each threadgroup as are needed, and no threadgroup idle.
    items = Hf + 2 * Hk
    blocks = -(-items // _SIMD_GROUPS)
    return _KERNEL(
        backend,
        [
            *(q, k, v, q_norm, k_norm, frequencies, offset),
            kernels.constant(constants, mx.float32),
        ],
        # Metal tells kernels apart by these alone: the types are among them.
        template=[
            *(("X", q.dtype), ("W", q_norm.dtype), ("D", D), ("TOKENS", tokens)),
            *(("ROPE", rotation is not None), ("LOG_SCALE", log_scale_base is not None)),
        ],
        groups=(-(-T // tokens), blocks, B),
        threads=(32 * -(-items // blocks), 1, 1),
        output_shapes=[(B, Hf, T, D), (B, Hk, T, D), (B, Hk, T, D)],
        output_dtypes=[q.dtype] * 3,
    )


def _parts(joined, heads, q_norm):
    """Queries, keys and values as they stand side by side: views."""
    (Hf, Hk), D = heads, q_norm.size
    ends = [Hf * D, (Hf + Hk) * D, (Hf + 2 * Hk) * D]
    if min(heads) < 1 or joined.ndim < 2 or joined.shape[-1] < ends[-1]:
        raise ValueError(
            f"head_attention_inputs: heads={heads} of {D} channels in q, which has shape "
            f"{tuple(joined.shape)}."
        )
    return mx.split(joined, ends, axis=-1)[:3]


def _check_shapes(q, k, v, q_norm, k_norm, offset):
    def fail(name, x, expected):
        raise ValueError(
            f"head_attention_inputs: {name} has shape {tuple(x.shape)}, expected {expected}."
        )

    if q_norm.ndim != 1 or q_norm.size == 0:
        fail("q_norm", q_norm, "[D]")
    D = q_norm.size
    if k_norm.shape != (D,):
        fail("k_norm", k_norm, (D,))
    for name, x in (("q", q), ("k", k)):
        if x.ndim not in (2, 3) or x.shape[-1] % D:
            fail(name, x, f"[B, T, H * {D}] or [B, H * {D}]")
    *tokens, _ = q.shape
    if list(k.shape[:-1]) != tokens:
        fail("k", k, (*tokens, k.shape[-1]))
    if v.shape != k.shape:
        fail("v", v, tuple(k.shape))
    if not isinstance(offset, int) and offset.shape not in ((1,), (len(q),)):
        fail("offset", offset, f"[1] or [{len(q)}]")
