"""Causal softmax attention of a few heads over a compact KV cache."""

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Optional, Union

import mlx.core as mx

from .. import kernels
from .backend import kernels_run, resolve_backend

KeysOrValues = Union[mx.array, tuple[mx.array, mx.array, mx.array]]

# The head sizes that MLX's fused kernels take, and the queries of all heads from which on they
# have work for the whole machine: unlike ours they do not split keys among threadgroups.
FUSED_HEAD_DIMS = (64, 80, 128)
FUSED_QUERIES = {"metal": 2048, "cuda": 16384}

# The scores of one block of queries stay below this where MLX would hold them in memory.
SCORE_BYTES = 64 << 20

# The head sizes that our kernels take, and those among them of the kernel for few queries.
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DECODE_HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

# Queries of one KV head, a head and a token each, up to which the kernel for few queries runs, and
# how many a threadgroup of it takes at most.
DECODE_QUERIES = 8
DECODE_ROWS = 4

# (elements of a key that a lane reads, keys that it reads before it works on them) by the bits.
DECODE_READS = {None: (16, 2), 8: (16, 2), 4: (16, 2)}

# Tiles of plain keys that the kernel for many queries holds, where they fit; more than one pays
# where the machine copies on its own.
BUFFERS = {"metal": 1, "cuda": 2}

# For the kernel for many queries: SIMD-groups of a threadgroup; tiles of 16 rows that each has
# where elements have 16 bits and heads up to 128, which takes the registers there are with CUDA;
# and by these tiles, keys whose scores it holds.
SIMDGROUPS = 4
ROW_TILES = {"metal": 1, "cuda": 2}
AT_ONCE = {1: 32, 2: 16}

# Keys of a tile, and the bytes of a key up to which it has so many, else 16.
KEYS = {"metal": (32, 128), "cuda": (32, 256)}

# Keys are split among threadgroups: not below the first number of keys a threadgroup, nor above
# the second number of threadgroups.
DECODE_SPLIT = (256, 4096)
PREFILL_SPLIT = (512, 264)

# SIMD-groups of a threadgroup that brings splits together; they share a row below so many rows.
MERGE_SIMDGROUPS, MERGE_ROWS = 8, 256

_INPUTS = (
    *("q", "k", "k_scales", "k_biases", "v", "v_scales", "v_biases", "mask"),
    *("layout", "position", "scale"),
)
_DECODE = kernels.Kernel(
    "head_attention_decode",
    _INPUTS,
    ("o", "stats"),
    ("keys_values.h", "head_attention_decode.h"),
)
_PREFILL = kernels.Kernel(
    "head_attention_prefill",
    _INPUTS,
    ("o", "stats"),
    ("tile.h", "keys_values.h", "head_attention_prefill.h"),
)
_MERGE = kernels.Kernel("head_attention_merge", ("sums", "stats"), ("o",), ("keys_values.h",))


def head_attention(
    q: mx.array,
    k: KeysOrValues,
    v: KeysOrValues,
    kv_index: Union[Sequence[int], mx.array],
    *,
    scale: float,
    offset: Union[int, mx.array] = 0,
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
        offset: query t sees the keys 0 .. offset + t. Where :func:`takes_arrays` says so, it may
            be an int32 array of one number that is not evaluated: whether S is enough is not
            checked then, and there is no gradient.
        mask: bool ``[B, 1, T, S]``, in place of the causal rule (batches with padding).
        group_size, bits: how k and v are quantised; None for plain arrays.
        backend: ``"metal"`` and ``"cuda"`` are our kernels, for head sizes of 32, 64, 80, 96, 128
            and 256, float32, float16 or bfloat16 throughout, 4 or 8 bits: one for few queries a KV
            head and one for many, both over parts of the keys that a third brings together where
            there is work for too few threadgroups else. Keys are read in place, once for all
            heads that share them, and unpacked tile by tile. Gradients are those of
            ``"ops"``, in blocks of queries; where k and v are quantised of q alone, with k and v
            unpacked. ``"ops"`` is
            ``mx.fast.scaled_dot_product_attention``, a call for all heads where the groups are of
            one size and in order, else a call a KV head; in blocks of queries where the fused
            kernel of MLX does not apply and its scores would not fit. ``"auto"`` takes our
            kernels where they are proven (ops/backend.py), but ``"ops"`` where MLX's fused kernel
            has enough to do: thousands of queries over all heads, groups of one size in order,
            plain 16-bit keys, head sizes of 64, 80 and 128.

    Returns:
        ``[B, Hf, T, D]`` in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, an index out of range, a missing backend.
    """
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
    if isinstance(offset, int) and offset + T > S:
        raise ValueError(f"head_attention: {S} keys for {T} queries at offset {offset}.")

    call = _Call(tuple(index), scale, offset, mask, group_size, bits)
    chosen = resolve_backend(backend, _supported(q, k, v, call))
    if chosen == "ops":
        return _by_ops(q, k, v, call)
    return _by_kernels(q, k, v, call, chosen)


def takes_arrays(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether decode steps with keys of a dtype run on kernels, which read an array's offset."""
    return dtype in DTYPES and head_dim in DECODE_HEAD_DIMS and kernels_run()


def prefill_splits(
    q: mx.array, k: mx.array, v: mx.array, kv_index: Sequence[int], offset: int
) -> Optional[int]:
    """Into how many parts :func:`head_attention_prefill` had best cut the keys of a call.

    Few different numbers for a growing offset, as each is a function to compile.

    Args:
        q, k, v, kv_index, offset: as :func:`head_attention` takes them; no keys of another kind.

    Returns:
        None where :func:`head_attention` would take no kernel of ours for it, or the one for few
        queries.
    """
    call = _Call(tuple(kv_index), 1.0, offset, None, None, None)
    backend = resolve_backend("auto", _supported(q, k, v, call))
    if backend == "ops":
        return None
    plan = _plan(q, call, backend)
    if plan.kernel is not _PREFILL:
        return None
    sequences, total = len(q) * _heads_by_group(call.index)[0], offset + q.shape[2]
    found, most = (plan.splits(sequences, keys) for keys in (total, 1 << 40))
    return found if found == most else 1 << (found.bit_length() - 1)


def head_attention_prefill(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    kv_index: Sequence[int],
    *,
    scale: float,
    offset: mx.array,
    splits: int,
) -> mx.array:
    """Attend as :func:`head_attention` does, in a function that is compiled for any number of keys.

    No shape tells how many there are. It has no gradient.

    Args:
        q, kv_index, scale: as :func:`head_attention` takes them.
        k, v: the first of the keys and values, ``[B, Hk, 1, D]``: views of arrays where the
            others lie behind, a step of the third axis apart; kernels read on.
        offset: int32 ``[1]``.
        splits: what :func:`prefill_splits` gives.

    Returns:
        ``[B, Hf, T, D]`` in q's dtype.
    """
    call = _Call(tuple(kv_index), scale, offset, None, None, None)
    return _run(q, k, v, call, kernels.gpu_backend(), splits)


class Parts(NamedTuple):
    """Attention over parts of the keys, which have yet to be brought together.

    sums: float32 ``[B, Hf, T, parts, D]``, values times their weights in each part.
    stats: float32 ``[B, Hf, T, parts, 2]``, the largest score of a part in powers of two, and the
    sum of its weights, which are powers of two below that.
    """

    sums: mx.array
    stats: mx.array


def head_attention_parts(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    kv_index: Sequence[int],
    *,
    scale: float,
    offset: mx.array,
) -> Parts:
    """Attend as :func:`head_attention`'s kernels do, and leave the last step to others.

    Where :func:`takes_arrays` says so. It has no gradient.

    Args:
        q, k, v, kv_index, scale: as :func:`head_attention` takes them; plain keys of q's dtype.
        offset: int32 ``[1]``.
    """
    call = _Call(tuple(kv_index), scale, offset, None, None, None)
    return Parts(*_attend(q, k, v, call, kernels.gpu_backend(), None, apart=True))


class _Call(NamedTuple):
    """What head_attention is asked for, beside its differentiable inputs."""

    index: tuple[int, ...]
    scale: float
    offset: Union[int, mx.array]
    mask: Optional[mx.array]
    group_size: Optional[int]
    bits: Optional[int]


def _supported(q, k, v, call):
    gpu = kernels.gpu_backend()
    B, Hf, T, D = q.shape
    dtype = q.dtype
    keys, values = (k, v) if call.bits is None else (k[0], v[0])
    parts = (k, v) if call.bits is None else (*k[1:], *v[1:])
    mask = call.mask
    if (
        gpu is None
        or D not in HEAD_DIMS
        or dtype not in DTYPES
        or any(part.dtype != dtype for part in parts)
        or keys.shape != values.shape
        # Metal passes fewer in another address space.
        or keys.size < 8
        or call.bits not in (None, 4, 8)
        or (mask is not None and (mask.dtype != mx.bool_ or mask.ndim != 4 or mask.shape[1] != 1))
    ):
        return ("ops",)
    fused = call.bits is None and dtype != mx.float32 and D in FUSED_HEAD_DIMS
    many = T > DECODE_QUERIES and B * Hf * T >= FUSED_QUERIES[gpu]
    if fused and many and _is_uniform(call.index, keys.shape[1]):
        return ("ops", gpu)
    return (gpu, "ops")


def _is_uniform(index, Hk):
    repeats, remainder = divmod(len(index), Hk)
    return not remainder and list(index) == [i for i in range(Hk) for _ in range(repeats)]


def _by_kernels(q, k, v, call, backend):
    """Our kernels, with the gradients of the plain form."""
    if isinstance(call.offset, mx.array):
        return _run(q, k, v, call, backend)
    if call.bits is not None:

        @mx.custom_function
        def attend(q):
            return _run(q, k, v, call, backend)

        @attend.vjp
        def attend_vjp(q, cotangent, _):
            return _gradients(q, k, v, cotangent, call)[0]

        return attend(q)

    @mx.custom_function
    def attend(q, k, v):
        return _run(q, k, v, call, backend)

    @attend.vjp
    def attend_vjp(primals, cotangent, _):
        return _gradients(*primals, cotangent, call)

    return attend(q, k, v)


class _Plan(NamedTuple):
    """Which kernel takes a call's queries, in what shape, and how keys are to be split."""

    kernel: kernels.Kernel
    template: list[tuple]
    threads: int
    blocks: int
    split: tuple[int, int]

    def splits(self, sequences: int, total: int) -> int:
        """Parts of so many keys, for so many blocks of sequences and KV heads."""
        fewest, most = self.split
        return max(1, min(-(-total // fewest), most // (sequences * self.blocks)))


def _plan(q, call, backend):
    T, D = q.shape[2:]
    queries = _heads_by_group(call.index)[2] * T
    size = q.dtype.size
    if queries <= DECODE_QUERIES and D in DECODE_HEAD_DIMS:
        rows = next(r for r in (1, 2, DECODE_ROWS) if r >= min(queries, DECODE_ROWS))
        elements, at_once = DECODE_READS[call.bits]
        elements = elements if rows <= 2 else 8
        template = [("ROWS", rows), ("E", elements), ("AT_ONCE", at_once)]
        return _Plan(_DECODE, template, 128, -(-queries // rows), DECODE_SPLIT)
    simdgroups = next(s for s in (1, 2, 4) if 16 * s >= min(queries, 16 * SIMDGROUPS))
    # Packed keys take registers of their own.
    many = queries > 16 * SIMDGROUPS and size == 2 and D <= 128 and call.bits is None
    row_tiles = ROW_TILES[backend] if many else 1
    tile, up_to = KEYS[backend]
    tile = tile if D * size <= up_to else 16
    buffers = BUFFERS[backend] if call.bits is None and D * size < 1024 else 1
    template = [("SIMDGROUPS", simdgroups), ("KEYS", tile), ("BUFFERS", buffers)]
    template += [("ROW_TILES", row_tiles), ("AT_ONCE", min(AT_ONCE[row_tiles], tile))]
    blocks = -(-queries // (16 * simdgroups * row_tiles))
    threads = 32 * simdgroups * (2 if D > 128 else 1)
    return _Plan(_PREFILL, template, threads, blocks, PREFILL_SPLIT)


def _run(q, k, v, call, backend, splits=None):
    (B, Hf, T, D), (o, stats) = q.shape, _attend(q, k, v, call, backend, splits)
    if o.ndim == 4:
        return o
    outputs = B * Hf * T
    simdgroups = MERGE_SIMDGROUPS if outputs < MERGE_ROWS else 1
    (o,) = _MERGE(
        backend,
        [o, stats],
        template=[("T", q.dtype), ("SIMDGROUPS", simdgroups)],
        groups=(-(-D // 32), -(-outputs * simdgroups // MERGE_SIMDGROUPS), 1),
        threads=(32 * MERGE_SIMDGROUPS, 1, 1),
        output_shapes=[(B, Hf, T, D)],
        output_dtypes=[q.dtype],
    )
    return o


def _attend(q, k, v, call, backend, splits, apart=False):
    """``[B, Hf, T, D]``, and nothing; or :class:`Parts`, where they are several or left apart."""
    B, Hf, T, D = q.shape
    S = (k if call.bits is None else k[0]).shape[2]
    n, heads, _ = _heads_by_group(call.index)
    plan, offset = _plan(q, call, backend), call.offset
    if isinstance(offset, int):
        offset = kernels.positions(offset, B)
    if splits is None:
        total = call.offset + T if isinstance(call.offset, int) and call.mask is None else S
        keys = -(-total // plan.splits(B * n, total))
        splits = -(-total // keys)

    k, k_scales, k_biases = (k, q, q) if call.bits is None else k
    v, v_scales, v_biases = (v, q, q) if call.bits is None else v
    mask = q if call.mask is None else mx.broadcast_to(call.mask, (B, 1, T, S))
    whole = splits == 1 and not apart
    shape = (B, Hf, T, D) if whole else (B, Hf, T, splits, D)
    out = q.dtype if whole else mx.float32
    template = [*plan.template, ("T", q.dtype), ("Out", out), ("D", D)]
    template += [("BITS", call.bits or 0), ("GROUP", call.group_size or D)]
    template += [("MASKED", call.mask is not None), ("WHOLE", whole)]
    return plan.kernel(
        backend,
        [
            *(q, k, k_scales, k_biases, v, v_scales, v_biases, mask),
            kernels.constant((plan.blocks, n, *heads), mx.int32),
            offset,
            kernels.constant((call.scale,), mx.float32),
        ],
        template=template,
        groups=(splits * plan.blocks, n, B),
        threads=(plan.threads, 1, 1),
        output_shapes=[shape, (1,) if whole else (B, Hf, T, splits, 2)],
        output_dtypes=[out, mx.float32],
    )


@functools.lru_cache(maxsize=256)
def _heads_by_group(index):
    """n, (the n KV heads read, n + 1 bounds, query heads by KV head), and the largest group."""
    groups = [[h for h, i in enumerate(index) if i == kv_head] for kv_head in sorted(set(index))]
    bounds = [0]
    for group in groups:
        bounds.append(bounds[-1] + len(group))
    heads = [h for group in groups for h in group]
    return len(groups), (*sorted(set(index)), *bounds, *heads), max(map(len, groups))


def _gradients(q, k, v, cotangent, call):
    """Gradients of the plain form, a block of queries after the other; q's alone if packed."""
    B, H, T, _ = q.shape
    plain = call.bits is None
    if not plain:
        # Not every GPU backend of MLX has packed products of all sizes.
        packed = {"group_size": call.group_size, "bits": call.bits}
        k, v = (mx.dequantize(*x, **packed) for x in (k, v))
        call = call._replace(group_size=None, bits=None)
    rows = max(16, SCORE_BYTES // (4 * B * H * (call.offset + T)))
    dq, sums = [], [mx.zeros(x.shape, mx.float32) for x in (k, v)] if plain else []
    for start in reversed(range(0, T, rows)):
        stop = min(start + rows, T)
        part = call._replace(
            offset=call.offset + start,
            mask=None if call.mask is None else call.mask[:, :, start:stop],
        )
        seen = call.offset + stop if call.mask is None else k.shape[2]
        block, given = q[:, :, start:stop], cotangent[:, :, start:stop]
        if dq:
            # One after the other: each holds scores of its own.
            block = mx.depends(block, [dq[0], *sums])
        keys, values = _keys(k, seen), _keys(v, seen)

        def attend(q, k=keys, v=values, part=part):
            return _by_ops(q, k, v, part)

        primals = [block, keys, values] if plain else [block]
        _, found = mx.vjp(attend, primals, [given])
        dq.insert(0, found[0])
        for total, x in zip(sums, found[1:]):
            total[:, :, :seen] = total[:, :, :seen] + x
    return mx.concatenate(dq, axis=2), *(x.astype(q.dtype) for x in sums)


def _by_ops(q, k, v, call):
    index, scale, offset, mask, group_size, bits = call
    T = q.shape[2]
    Hk, S = (k if bits is None else k[0]).shape[1:3]
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

    if _is_uniform(index, Hk):
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
