"""Fusion of head outputs: a norm, a gate and one learned weight a head (HydraHead, Eq 13-14)."""

from typing import Optional

import mlx.core as mx

from .backend import resolve_backend


def fuse_heads(
    o: mx.array,
    gamma: mx.array,
    gate: Optional[mx.array] = None,
    *,
    eps: Optional[float],
    backend: str = "auto",
) -> mx.array:
    """Bring head outputs to one scale and lay them side by side for o_proj.

    Args:
        o: head outputs ``[B, T, H, D]``.
        gamma: float32 ``[H]``, the static weight of each head.
        gate: ``[B, T, H * D]``, already through its sigmoid or SiLU; None for no gate.
        eps: added to the mean square in the RMSNorm of each head; None for no norm.
        backend: ``"auto"`` or ``"ops"``.

    Returns:
        ``gamma_h * gate_h * RMSNorm(o_h)`` as ``[B, T, H * D]`` in o's dtype.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not there.
    """
    B, T, H, D = o.shape
    if gamma.shape != (H,):
        raise ValueError(f"fuse_heads: gamma has shape {gamma.shape}, expected {(H,)}.")
    if gate is not None and gate.shape != (B, T, H * D):
        raise ValueError(f"fuse_heads: gate has shape {gate.shape}, expected {(B, T, H * D)}.")
    resolve_backend(backend, ("ops",))
    dtype = o.dtype
    if eps is not None:
        o = mx.fast.rms_norm(o, None, eps)
    o = (gamma[:, None] * o).reshape(B, T, H * D)
    if gate is not None:
        o = o * gate
    return o.astype(dtype)
