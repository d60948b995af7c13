"""The backward pass of the gated delta rule in kernels: metal/gated_delta_vjp*.metal."""

from typing import Optional

import mlx.core as mx

from .. import kernels

CHUNK = 64
MOST_HEAD_DIM = 256
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

_HEADERS = ("tile.h", "gated_delta_vjp.h")
_PREPARE = kernels.Kernel(
    "gated_delta_vjp_prepare",
    ("q", "k", "g", "beta", "mask"),
    ("gates", "inverse", "scores", "wk", "wq"),
    _HEADERS,
    contiguous=True,
)
_STATE = kernels.Kernel(
    "gated_delta_vjp_state",
    ("k", "dy", "dstate", "gates", "wk", "wq"),
    ("dstates", "dstate0"),
    _HEADERS,
    contiguous=True,
)
_UPDATES = kernels.Kernel(
    "gated_delta_vjp_updates",
    ("k", "v", "dy", "checkpoints", "dstates", "gates", "inverse", "scores"),
    ("u", "x", "dv"),
    _HEADERS,
    contiguous=True,
)
_GRADIENTS = kernels.Kernel(
    "gated_delta_vjp",
    ("q", "k", "v", "dy", "checkpoints", "dstates", "gates", "scores", "u", "x"),
    ("dq", "dk", "dg", "dbeta"),
    _HEADERS,
    contiguous=True,
)


def supports(q: mx.array, v: mx.array) -> bool:
    """Whether the kernels take heads of these sizes and this dtype, one for q and v."""
    sizes = (q.shape[-1], v.shape[-1])
    return (
        q.dtype == v.dtype
        and q.dtype in DTYPES
        and all(size % 16 == 0 and 0 < size <= MOST_HEAD_DIM for size in sizes)
    )


def gated_delta_vjp(
    backend: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: Optional[mx.array],
    checkpoints: mx.array,
    dy: mx.array,
    dstate: mx.array,
) -> tuple[mx.array, ...]:
    """Gradients of :func:`mlx_hydra.ops.gated_delta` by its kernels (WY form, 2412.06464).

    While it runs it holds, a head and 64 tokens, a state, four matrices of 64 rows as long as a
    head, and two of 64 x 64, all float32.

    Args:
        backend: ``"metal"`` or ``"cuda"``.
        q, k, v, g, beta, state, mask: as in ``gated_delta``; q, k and v of one dtype that
            :func:`supports` takes, the others float32.
        checkpoints: float32 ``[B, H, N, Dv, Dk]``, the state before each segment of 64 tokens.
        dy, dstate: the gradients of what ``gated_delta`` returns, in the dtypes of v and state.

    Returns:
        The gradients of q, k, v, g, beta and state, in their dtypes. Those of masked tokens are
        zeros.
    """
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    N = -(-T // CHUNK)
    dtype = q.dtype
    # No kernel reads a mask that it is not told of.
    masked = mask is not None
    mask = mask if masked else g
    sizes = [("T", dtype), ("Dk", Dk), ("Dv", Dv)]

    gates, inverse, scores, wk, wq = _PREPARE(
        backend,
        [q, k, g, beta, mask],
        template=[("T", dtype), ("Dk", Dk), ("masked", masked)],
        groups=(N, H, B),
        threads=(128, 1, 1),
        output_shapes=[
            (B, H, N, 5, CHUNK),
            *[(B, H, N, CHUNK, CHUNK)] * 2,
            *[(B, H, N, CHUNK, Dk)] * 2,
        ],
        output_dtypes=[mx.float32] * 5,
    )
    dstates, dstate0 = _STATE(
        backend,
        [k, dy, dstate, gates, wk, wq],
        template=sizes,
        groups=(Dv // 16, H, B),
        threads=(128, 1, 1),
        output_shapes=[(B, H, N, Dv, Dk), (B, H, Dv, Dk)],
        output_dtypes=[mx.float32] * 2,
    )
    u, x, dv = _UPDATES(
        backend,
        [k, v, dy, checkpoints, dstates, gates, inverse, scores],
        template=sizes,
        groups=(N, H, B),
        threads=(128, 1, 1),
        output_shapes=[*[(B, H, N, CHUNK, Dv)] * 2, v.shape],
        output_dtypes=[mx.float32, mx.float32, dtype],
    )
    dq, dk, dg, dbeta = _GRADIENTS(
        backend,
        [q, k, v, dy, checkpoints, dstates, gates, scores, u, x],
        template=sizes,
        groups=(N, H, B),
        threads=(256, 1, 1),
        output_shapes=[q.shape, k.shape, g.shape, beta.shape],
        output_dtypes=[dtype, dtype, mx.float32, mx.float32],
    )
    return dq, dk, dv, dg, dbeta, dstate0
