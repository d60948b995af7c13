"""The gated delta rule: a naive loop, the chunked form, and the dispatcher over them.

One head keeps a state ``S [Dv, Dk]`` and, for each token, decays it, moves what it holds under
``k`` towards ``v``, and reads it with ``q`` (Gated DeltaNet, arXiv 2412.06464):

    S = g S;    S = S + beta (v - S k) k^T;    y = S q
"""

from typing import Optional

import mlx.core as mx

from .. import kernels
from .backend import resolve_backend
from .gated_delta_vjp import CHUNK, gated_delta_vjp, supports

# exp(log(g)) of a decay that underflowed to zero: the smallest float32 that is not denormal.
_SMALLEST_DECAY = 1.2e-38

# The side of the kernels' tiles, and their tokens at a time; see metal/gated_delta_chunk.metal.
_TILE = 16

# The floats that gated_delta_prepare finds for so many tokens: two matrices, two decays a token.
_PREPARED = 2 * _TILE * _TILE + 2 * _TILE

# SIMD-groups that run at once on an H100, two to each of its 4 x 132 schedulers; and the fewest
# tokens worth a segment.
_SIMDGROUPS = 1056
_SEGMENT = 256

_HEADERS = ("tile.h", "gated_delta.h")
_PREPARE = kernels.Kernel(
    "gated_delta_prepare", ("q", "k", "g", "beta", "mask"), ("prepared",), _HEADERS, contiguous=True
)
_CHUNK = kernels.Kernel(
    "gated_delta_chunk",
    ("q", "k", "v", "mask", "state", "prepared"),
    ("y", "new_state", "checkpoints"),
    _HEADERS,
    contiguous=True,
)
_STARTS = kernels.Kernel(
    "gated_delta_starts", ("state", "ends"), ("starts",), _HEADERS, contiguous=True
)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: Optional[mx.array] = None,
    mask: Optional[mx.array] = None,
    *,
    backend: str = "auto",
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule over a sequence, or over its next part.

    Args:
        q, k: queries and keys ``[B, T, H, Dk]``. The caller normalises them and scales ``q``.
        v: values ``[B, T, H, Dv]``.
        g: decay in (0, 1], ``[B, T, H]``.
        beta: update rate in [0, 1], ``[B, T, H]``.
        state: float32 ``[B, H, Dv, Dk]``; zeros where it is None.
        mask: bool ``[B, T]``. A token whose entry is False leaves the state as it was and yields
            zeros, whatever its q, k and v hold.
        backend: ``"ops"`` is the chunked form, one step at a time for T = 1. ``"metal"`` and
            ``"cuda"`` are two kernels (three where the sequence is cut into segments), for q, k and
            v of one dtype (float32, float16 or bfloat16) and Dk and Dv multiples of 16 up to 256;
            they take g and beta as float32, and keep the state's digits whatever the dtype.
            ``"auto"`` runs them where they can run and are proven (ops/backend.py).

    Returns:
        ``y [B, T, H, Dv]`` in v's dtype and the new state, float32 ``[B, H, Dv, Dk]``. Splitting
        a sequence anywhere and handing the state on gives what one call gives.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not there.
    """
    _check_shapes(q, k, v, g, beta, state, mask)
    backend = resolve_backend(backend, _supported(q, k, v))
    if state is None:
        B, _, H, Dk = q.shape
        state = mx.zeros((B, H, v.shape[-1], Dk), mx.float32)
    if backend != "ops":
        g, beta, state = (x.astype(mx.float32) for x in (g, beta, state))
        return _differentiable(backend, mask)(q, k, v, g, beta, state)
    form = naive if q.shape[1] == 1 else chunked
    y, state = form(*(x.astype(mx.float32) for x in (q, k, v, g, beta, state)), mask)
    return y.astype(v.dtype), state


def _supported(q, k, v):
    gpu = kernels.gpu_backend()
    fits = gpu is not None and q.dtype == k.dtype and supports(q, v)
    return (gpu, "ops") if fits else ("ops",)


def _differentiable(backend, mask):
    @mx.custom_function
    def forward(*primals):
        return gated_delta_kernels(backend, *primals, mask)[:2]

    @forward.vjp
    def backward(primals, cotangents, _):
        # The forward pass saves nothing: whether a gradient will be asked for it cannot know.
        checkpoints = gated_delta_kernels(backend, *primals, mask, save=True)[2]
        return gated_delta_vjp(backend, *primals, mask, checkpoints, *cotangents)

    return forward


def gated_delta_kernels(
    backend, q, k, v, g, beta, state, mask, *, save=False, rows=None, segments=None
):
    """The forward kernels, without a gradient. Between them lie 136 bytes a head and token.

    Args:
        save: whether to write the state before each ``CHUNK`` tokens.
        rows: of the state, in one threadgroup: a multiple of 16 that divides Dv.
        segments: at most how many parts of the sequence run side by side, each of a multiple of
            ``CHUNK`` tokens. More than one take up to 2.3 times the products where Dk = Dv,
            and three states each.

    Returns:
        y, the new state, and float32 checkpoints ``[B, H, ceil(T / CHUNK), Dv, Dk]`` or nothing
        of use.
    """
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    # No kernel reads a mask that it is not told of.
    masked = mask is not None
    mask = mask if masked else g
    chunks, blocks = -(-T // _TILE), -(-T // CHUNK)
    [prepared] = _PREPARE(
        backend,
        [q, k, g, beta, mask],
        template=[("T", q.dtype), ("Dk", Dk), ("masked", masked)],
        groups=(chunks, H, B),
        threads=(32, 1, 1),
        output_shapes=[(B, H, chunks, _PREPARED)],
        output_dtypes=[mx.float32],
    )

    def run(state, rows, runs, shapes, save=False, ends=False):
        height = Dv + Dk if ends else Dv
        rows = rows or _rows(backend, Dk, height, q.dtype)
        flags = {"masked": masked, "save": save, "ends": ends}
        return _CHUNK(
            backend,
            [q, k, v, mask, state, prepared],
            template=[("T", q.dtype), ("Dk", Dk), ("Dv", Dv), ("slice", rows), *flags.items()],
            groups=(height // rows, H * runs, B),
            threads=(2 * rows, 1, 1),
            output_shapes=shapes,
            output_dtypes=[v.dtype, mx.float32, mx.float32],
        )

    segments = segments or _segments(backend, B, T, H, Dv)
    # The kernel finds their length from their number, and none is empty.
    segments = -(-blocks // -(-blocks // segments))
    starts = state
    if segments > 1:
        shape = (B, H, segments - 1, Dv + Dk, Dk)
        ends = run(state, None, segments - 1, [(1,), shape, (1,)], ends=True)[1]
        [starts] = _STARTS(
            backend,
            [state, ends],
            template=[("Dk", Dk), ("Dv", Dv)],
            groups=(Dv // _TILE, H, B),
            threads=(2 * Dk, 1, 1),
            output_shapes=[(B, H, segments, Dv, Dk)],
            output_dtypes=[mx.float32],
        )
    checkpoints = (B, H, blocks, Dv, Dk) if save else (1,)
    return run(starts, rows, segments, [v.shape, state.shape, checkpoints], save)


def _rows(backend, Dk, height, dtype):
    """Rows of the state in a threadgroup: more of them share the reads of q and k, and more
    threadgroups fill a GPU. Wide keys need many threads to hold the next chunk's in registers.
    """
    most = 128 if Dk * dtype.size > 512 else 32 if backend == "cuda" else 64
    return max(n for n in range(_TILE, most + 1, _TILE) if height % n == 0)


def _segments(backend, B, T, H, Dv):
    """Parts of the sequence to run side by side: as many as fill the GPU, and none of few tokens.

    A second part costs more than it saves; and Apple's GPUs, with fewer and narrower cores, have
    enough to do with the heads.
    """
    if backend != "cuda":
        return 1
    segments = min(_SIMDGROUPS * _TILE // (B * H * Dv), T // _SEGMENT)
    return segments if segments > 2 else 1


def naive(q, k, v, g, beta, state, mask=None):
    """The recurrence token by token, in the dtype of its arguments: the reference for tests.

    Shapes as in :func:`gated_delta`; the state must be given.
    """
    q, k, v, g, beta = _without_masked(q, k, v, g, beta, mask)
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None]
        recalled = (state @ k[:, t, :, :, None])[..., 0]
        delta = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + delta[..., None] * k[:, t, :, None, :]
        outputs.append((state @ q[:, t, :, :, None])[..., 0])
    return mx.stack(outputs, axis=1), state


def chunked(q, k, v, g, beta, state, mask=None, chunk: int = CHUNK):
    """The recurrence in matrix products, a chunk of tokens at a time (2412.06464, WY form).

    Shapes as in :func:`gated_delta`; float32; any T >= 1. With u_t the correction that token t
    writes, D[t, j] the decay from token j to token t, and S the state before the chunk:

        (I + A) U = beta (V - decay K S^T),    A[t, j] = beta_t D[t, j] k_t.k_j  for j < t
        Y = decay Q S^T + (D * Q K^T) U,       S' = decay_C S + (D[C] * U)^T K

    Decays are products over the tokens between, never quotients of cumulative ones, so that a
    chunk may hold decays of 1e-6 beside decays of 1 and still lose no digits.
    """
    q, k, v, g, beta = _without_masked(q, k, v, g, beta, mask)
    T = q.shape[1]
    chunk = min(chunk, 1 << (T - 1).bit_length())
    q, k, v, g, beta = (
        _split(x, chunk, fill) for x, fill in zip((q, k, v, g, beta), (0, 0, 0, 1, 0))
    )

    rows = mx.arange(chunk)
    lower = rows[:, None] > rows
    log_g = mx.log(mx.maximum(g, _SMALLEST_DECAY))
    between = mx.cumsum(mx.where(lower, log_g[..., None], 0.0), axis=-2)
    between = mx.where(rows[:, None] >= rows, mx.exp(between), 0.0)
    from_start = mx.exp(mx.cumsum(log_g, axis=-1))[..., None]
    to_end = between[..., -1, :, None]
    beta = beta[..., None]

    k_transposed = k.swapaxes(-1, -2)
    A = mx.where(lower, beta * between * (k @ k_transposed), 0.0)
    inverse = _unit_lower_inverse(A)
    writes = inverse @ (beta * v)
    reads = inverse @ (beta * from_start * k)
    scores = between * (q @ k_transposed)
    q = from_start * q
    k = (to_end * k).swapaxes(-1, -2)

    state = state.swapaxes(-1, -2)
    outputs = []
    for n in range(q.shape[2]):
        u = writes[:, :, n] - reads[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + scores[:, :, n] @ u)
        state = from_start[:, :, n, -1:] * state + k[:, :, n] @ u
    y = mx.concatenate(outputs, axis=2).swapaxes(1, 2)[:, :T]
    return y, state.swapaxes(-1, -2)


def _unit_lower_inverse(A):
    """``(I + A)^-1`` for strictly lower triangular ``A [..., C, C]``, C a power of two.

    Blocks are merged two by two, from single entries up: the inverse of [[P, 0], [R, Q]] has
    -Q^-1 R P^-1 below its diagonal blocks. A sum of powers of A would cost as little, and lose
    every digit on a chunk of equal keys.
    """
    shape, C = A.shape, A.shape[-1]
    # One leading axis: MLX's CUDA gather takes no more than ten in all.
    A = A.reshape(-1, C, C)
    inverse = mx.ones((A.shape[0], C, 1, 1), A.dtype)
    size = 1
    while size < C:
        count = C // (2 * size)
        blocks = A.reshape(-1, count, 2, size, count, 2, size)
        diagonal = mx.arange(count)
        # Advanced indices on both sides of a slice come out in front.
        corner = blocks[:, diagonal, 1, :, diagonal, 0, :].swapaxes(0, 1)
        pairs = inverse.reshape(-1, count, 2, size, size)
        upper, below = pairs[:, :, 0], pairs[:, :, 1]
        corner = -(below @ (corner @ upper))
        top = mx.concatenate([upper, mx.zeros_like(upper)], axis=-1)
        inverse = mx.concatenate([top, mx.concatenate([corner, below], axis=-1)], axis=-2)
        size *= 2
    return inverse.reshape(shape)


def _split(x, chunk, fill):
    """``[B, T, H, ...]`` to ``[B, H, N, chunk, ...]``, padded at the end with ``fill``."""
    B, T, H, *rest = x.shape
    padding = -T % chunk
    if padding:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        x = mx.pad(x, widths, constant_values=fill)
    return x.swapaxes(1, 2).reshape(B, H, (T + padding) // chunk, chunk, *rest)


def _without_masked(q, k, v, g, beta, mask):
    if mask is None:
        return q, k, v, g, beta
    gate, vector = mask[..., None], mask[..., None, None]
    # Selected, not multiplied: padding may hold NaN.
    q, k, v = (mx.where(vector, x, 0) for x in (q, k, v))
    return q, k, v, mx.where(gate, g, 1), mx.where(gate, beta, 0)


def _check_shapes(q, k, v, g, beta, state, mask):
    def check(name, x, shape):
        if tuple(x.shape) != shape:
            raise ValueError(f"gated_delta: {name} has shape {tuple(x.shape)}, expected {shape}.")

    if q.ndim != 4 or v.ndim != 4 or q.shape[1] < 1:
        raise ValueError(
            f"gated_delta: q has shape {tuple(q.shape)} and v {tuple(v.shape)}, "
            "expected [B, T, H, Dk] and [B, T, H, Dv] with T >= 1."
        )
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    check("k", k, (B, T, H, Dk))
    check("v", v, (B, T, H, Dv))
    check("g", g, (B, T, H))
    check("beta", beta, (B, T, H))
    if state is not None:
        check("state", state, (B, H, Dv, Dk))
    if mask is not None:
        check("mask", mask, (B, T))
