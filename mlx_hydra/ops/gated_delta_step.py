"""Decode in one dispatch: all that a layer does between the projections of x and o_proj.

The plain form of it is what ``models.hydrahead.LinearAttention`` does part by part.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional, Union

import mlx.core as mx

from .. import kernels
from .backend import resolve_backend
from .fuse_heads import DTYPES
from .head_attention import Parts

MOST_TOKENS = 8
HEAD_DIMS = (32, 64, 128, 256)
TAPS = (0, *range(2, 9))

# Of a threadgroup, at most. Apple's GPUs before the M3 have registers for 1024 small threads or for
# some 400 large ones, and MLX raises where a kernel asks for more.
MOST_THREADS = {"metal": 256, "cuda": 512}

KERNEL = kernels.Kernel(
    "gated_delta_step",
    (
        *("projected", "q_conv", "k_conv", "v_conv", "past", "q_norm", "k_norm", "frequencies"),
        *("offset", "mask", "A_log", "dt_bias", "state", "full", "stats", "bias", "full_bias"),
        *("gamma", "constants"),
    ),
    ("out", "new_state", "new_past"),
    ("heads.h", "keys_values.h", "gated_delta_step.h"),
    contiguous=True,
)


class Weights(NamedTuple):
    """What the linear heads have learned, and the eps of their q_norm and k_norm.

    q_norm, k_norm ``[D]``; A_log, dt_bias float32 ``[H]``; convolution: the weights of q, k and
    v, ``[H * D, K, 1]`` each, or None.
    """

    q_norm: mx.array
    k_norm: mx.array
    A_log: mx.array
    dt_bias: mx.array
    norm_eps: float
    convolution: Optional[tuple[mx.array, mx.array, mx.array]] = None


class Rotation(NamedTuple):
    """RoPE: radians a position for each pair of channels, float32 ``[D / 2]``, and a factor."""

    frequencies: mx.array
    scale: float = 1.0


def turned(rope: Callable, x: mx.array, offset: Union[int, mx.array]) -> mx.array:
    """RoPE of ``x [B, H, T, D]`` at all sequences' position (an int or ``[1]``) or each its own."""
    if not isinstance(offset, int) and offset.size == 1 and len(x) > 1:
        # RoPE would take its axis for the batch.
        offset = offset.reshape(())
    return rope(x, offset=offset)


def step_backend(dtype: mx.Dtype, tokens: int, head_dim: int, taps: int) -> str:
    """Name what runs a decode step: ``"metal"``, ``"cuda"``, or ``"ops"`` for part by part.

    The kernel takes 1 to 8 tokens in float32, float16 or bfloat16, heads of 32, 64, 128 or 256
    channels, and convolutions of 2 to 8 taps or none (``taps`` 0).
    """
    gpu = kernels.gpu_backend()
    if (
        gpu is None
        or dtype not in DTYPES
        or not 1 <= tokens <= MOST_TOKENS
        or head_dim not in HEAD_DIMS
        or taps not in TAPS
    ):
        return "ops"
    return resolve_backend("auto", (gpu, "ops"))


def gated_delta_step(
    projected: mx.array,
    weights: Weights,
    gamma: mx.array,
    state: Optional[mx.array],
    past: Optional[mx.array],
    *,
    offset: Union[int, mx.array] = 0,
    mask: Optional[mx.array] = None,
    rotation: Optional[Rotation] = None,
    eps: Optional[float],
    first: int = 0,
    gate_bias: Optional[mx.array] = None,
    full: Union[mx.array, Parts, None] = None,
    full_gate: Optional[int] = None,
    full_gate_bias: Optional[mx.array] = None,
    full_eps: Optional[float] = None,
    backend: str,
) -> tuple[mx.array, mx.array, Optional[mx.array]]:
    """Take 1 to 8 tokens through a layer's heads, up to what o_proj reads.

    The linear heads' short convolution with SiLU, norms, RoPE, gates, gated delta rule
    (2412.06464) and fusion (HydraHead, Eq 13-14), and the fusion of the full heads; arithmetic in
    float32 throughout. It has no gradient.

    Args:
        projected: projections of x side by side ``[B, T, N]``, or ``[B, N]`` of one token of each
            sequence. From channel ``first`` on the linear heads' q, k, v, gate before its SiLU if
            they have one (``H * D`` each), a and b (``H`` each), and less than ``H * D`` others.
        weights: of the linear heads.
        gamma: float32 ``[F + H]``, full heads first.
        state: float32 ``[B, H, D, D]``; zeros where it is None.
        past: the convolution's last K - 1 inputs ``[B, K - 1, 3 * H * D]``, q, k and v side by
            side; zeros where it is None.
        offset: position of the first token, an int or int32 ``[B]`` or ``[1]``.
        mask: bool ``[B, T]``; a token whose entry is False counts as zeros in the convolution,
            leaves the state as it was, and yields zeros.
        rotation: None for no RoPE.
        eps, full_eps: of the norm of the linear and of the full heads' outputs; None for no norm.
        gate_bias, full_gate_bias: what has yet to be added to the gates, ``[H * D]`` and
            ``[F * D]``; None for nothing.
        full: outputs of the layer's full heads ``[B, F, T, D]``, where it has any, or what
            :func:`head_attention_parts` gives.
        full_gate: the channel of ``projected`` where their gates start, before the sigmoid.
        backend: ``"metal"`` or ``"cuda"``, as :func:`step_backend` says.

    Returns:
        ``[B, T, (F + H) * D]``, or ``[B, (F + H) * D]``, in the dtype of ``projected``, the new
        state, and the new past (None without a convolution).
    """
    B, *_, N = projected.shape
    (H,), (D,) = weights.A_log.shape, weights.q_norm.shape
    full, stats = full if isinstance(full, Parts) else (full, None)
    F = 0 if full is None else full.shape[1]
    taps = 0 if weights.convolution is None else weights.convolution[0].shape[1]

    if state is None:
        state = mx.zeros((B, H, D, D), mx.float32)
    if taps and past is None:
        past = mx.zeros((B, taps - 1, 3 * H * D), projected.dtype)
    if isinstance(offset, int):
        offset = kernels.positions(offset, B)

    # A kernel has all its inputs always; others stand for those that it does not read.
    convolution = weights.convolution or (projected,) * 3
    past = past if taps else projected
    frequencies, scale = (weights.A_log, 1.0) if rotation is None else rotation
    biases = gate_bias, full_gate_bias
    threads = min(MOST_THREADS[backend], 8 * D)
    out, state, past = KERNEL(
        backend,
        [
            *(projected, *convolution, past, weights.q_norm, weights.k_norm, frequencies),
            *(offset, offset if mask is None else mask, weights.A_log, weights.dt_bias),
            *(state, state if full is None else full, state if stats is None else stats),
            *(projected if b is None else b.astype(projected.dtype) for b in biases),
            gamma,
            kernels.constant((weights.norm_eps, scale, eps or 0.0, full_eps or 0.0), mx.float32),
        ],
        template=[
            *(("X", projected.dtype), ("P", past.dtype), ("W", convolution[0].dtype)),
            *(("H", H), ("F", F), ("D", D), ("TAPS", taps), ("N", N), ("FIRST", first)),
            *(("O", mx.float32 if full is None else full.dtype), ("PARTS", stats is not None)),
            *(("GATED", N - first >= (4 * D + 2) * H),),
            *(("FULL_GATE_AT", N if full_gate is None else full_gate),),
            *(("ROPE", rotation is not None), ("MASKED", mask is not None)),
            *(("NORM", eps is not None), ("FULL_NORM", full_eps is not None)),
            *(("BIAS", gate_bias is not None), ("FULL_BIAS", full_gate_bias is not None)),
            ("THREADS", threads),
        ],
        groups=(F + H, B, 1),
        threads=(threads, 1, 1),
        output_shapes=[
            (*projected.shape[:-1], (F + H) * D),
            (B, H, D, D),
            (B, taps - 1, 3 * H * D) if taps else (1,),
        ],
        output_dtypes=[projected.dtype, mx.float32, projected.dtype],
    )
    return out, state, past if taps else None
