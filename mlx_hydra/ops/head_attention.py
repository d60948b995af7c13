"""Causal softmax attention of a few heads over a compact KV cache."""

from collections.abc import Sequence
from itertools import groupby
from typing import Optional, Union

import mlx.core as mx

from .backend import resolve_backend

KeysOrValues = Union[mx.array, tuple[mx.array, mx.array, mx.array]]

# The head sizes that MLX's fused kernels take.
FUSED_HEAD_DIMS = (64, 80, 128)

# The scores of one block of queries stay below this where MLX would hold them in memory.
SCORE_BYTES = 64 << 20


def head_attention(
    q: mx.array,
    k: KeysOrValues,
    v: KeysOrValues,
    kv_index: Union[Sequence[int], mx.array],
    *,
    scale: float,
    offset: int = 0,
    mask: Optional[mx.array] = None,
    group_size: Optional[int] = None,
    bits: Optional[int] = None,
    backend: str = "auto",
) -> mx.array:
    """Attend with heads that share KV heads in any grouping.

    Args:
        q: queries ``[B, Hf, T, D]``.
        k, v: keys and values ``[B, Hk, S, D]``, S >= offset + T; entries past offset + T are not
            read. With ``bits``, the triples that ``mx.quantize`` gives.
        kv_index: for each query head the KV head it reads, int ``[Hf]``. Groups may differ in
            size; a head of k and v that no query head names is not read. Best given as Python
            ints: an array is evaluated.
        scale: what the scores are multiplied by.
        offset: query t sees the keys 0 .. offset + t.
        mask: bool ``[B, 1, T, S]``, in place of the causal rule (batches with padding).
        group_size, bits: how k and v are quantised; None for plain arrays.
        backend: ``"auto"`` or ``"ops"``: ``mx.fast.scaled_dot_product_attention``, a call for all
            heads where the groups are of one size and in order, else a call a KV head; in blocks
            of queries where the fused kernel of MLX does not apply and its scores would not fit.

    Returns:
        ``[B, Hf, T, D]`` in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, an index out of range, a missing backend.
    """
    resolve_backend(backend, ("ops",))
    index = kv_index.tolist() if isinstance(kv_index, mx.array) else list(kv_index)
    Hk, S = (k if bits is None else k[0]).shape[1:3]
    T = q.shape[2]
    if len(index) != q.shape[1]:
        raise ValueError(
            f"head_attention: kv_index has {len(index)} entries for {q.shape[1]} heads."
        )
    if bad := [i for i in index if not 0 <= i < Hk]:
        raise ValueError(
            f"head_attention: kv_index names KV head {bad[0]} of {Hk} (0 to {Hk - 1})."
        )
    if offset + T > S:
        raise ValueError(f"head_attention: {S} keys for {T} queries at offset {offset}.")

    end = offset + T
    if mask is None and end < S:
        k, v = _keys(k, end), _keys(v, end)

    def attend(q, k, v, mask):
        if bits is not None:
            return _quantised_attention(q, k, v, mask, scale, group_size, bits)
        if mask is None and q.shape[2] > 1:
            mask = "causal"
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def attend_in_blocks(q, k, v, before=()):
        rows = _rows_per_block(q, end, bits)
        if rows >= T:
            return attend(q, k, v, mask)
        blocks = list(before)
        for start in range(0, T, rows):
            stop = min(start + rows, T)
            seen = S if mask is not None else offset + stop
            part = None if mask is None else mask[:, :, start:stop]
            block = q[:, :, start:stop]
            if blocks and mx.default_device() == mx.cpu:
                # One after the other: MLX would start several, and hold the scores of each.
                block = mx.depends(block, blocks[-1:])
            blocks.append(attend(block, _keys(k, seen), _keys(v, seen), part))
        return mx.concatenate(blocks[len(before) :], axis=2)

    repeats, remainder = divmod(len(index), Hk)
    if not remainder and index == [i for i in range(Hk) for _ in range(repeats)]:
        return attend_in_blocks(q, k, v)
    outputs, start = [], 0
    for kv_head, run in groupby(index):
        stop = start + len(list(run))
        head = slice(kv_head, kv_head + 1)
        group = q[:, start:stop], _heads(k, head), _heads(v, head)
        outputs.append(attend_in_blocks(*group, outputs[-1:]))
        start = stop
    return mx.concatenate(outputs, axis=1)


def _quantised_attention(q, k, v, mask, scale, group_size, bits):
    """Attention of uniform groups over keys and values that stay packed."""
    B, H, T, D = q.shape
    Hk, S = k[0].shape[1:3]
    if mask is None:
        mask = (mx.arange(S - T, S)[:, None] >= mx.arange(S))[None, None]
    k, v = (tuple(part[:, :, None] for part in x) for x in (k, v))
    packed = {"group_size": group_size, "bits": bits}
    q = (scale * q).reshape(B, Hk, H // Hk, T, D)
    scores = mx.quantized_matmul(q, *k, transpose=True, **packed)
    scores = mx.where(mask[:, :, None], scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    o = mx.quantized_matmul(weights, *v, transpose=False, **packed)
    return o.reshape(B, H, T, -1)


def _rows_per_block(q, end, bits):
    B, H, T, D = q.shape
    fused = mx.default_device() == mx.gpu and bits is None and D in FUSED_HEAD_DIMS
    if fused and q.dtype != mx.float32:
        return T
    return max(16, SCORE_BYTES // (4 * B * H * end))


def _keys(x, end):
    return x[:, :, :end] if isinstance(x, mx.array) else tuple(part[:, :, :end] for part in x)


def _heads(x, head):
    return x[:, head] if isinstance(x, mx.array) else tuple(part[:, head] for part in x)
