"""The cache of a HydraHead model, made of mlx-lm's own parts.

A layer with both kinds of heads holds a KV cache of its full heads' keys and values and the
recurrent and convolution state of its linear heads; a layer with one kind holds just its part.
"""

from typing import Any, Optional

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, KVCache

from ..config import ModelArgs

# Places in the ArraysCache of a layer's linear heads. mlx-lm asks the first whether it is empty.
RECURRENT, CONV = 0, 1


class CacheList(mlx_lm_cache.CacheList):
    """mlx-lm's CacheList for a layer with both kinds of heads, which can also quantise its keys.

    It keeps its parent's name on purpose: a prompt-cache file records the name of each class, and
    mlx-lm then loads the file with its own, which the model takes as well.
    """

    @property
    def offset(self):
        return self.caches[0].offset

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "CacheList":
        kv, *rest = self.caches
        if hasattr(kv, "to_quantized"):
            kv = kv.to_quantized(group_size=group_size, bits=bits)
        return CacheList(kv, *rest)

    def trim(self, n):
        raise ValueError(
            "A recurrent state cannot be rolled back: a HydraHead cache is not trimmable "
            "(is_trimmable() is False). Start from a copy made before those tokens."
        )


def make_cache(args: ModelArgs) -> list:
    """One cache a layer, for a single sequence."""
    caches = []
    states = 1 if args.linear_attention.conv_kernel_size is None else 2
    for layer in range(args.num_hidden_layers):
        heads = args.layer_heads(layer)
        if not heads.linear:
            caches.append(KVCache())
        elif not heads.full:
            caches.append(ArraysCache(size=states))
        else:
            caches.append(CacheList(KVCache(), ArraysCache(size=states)))
    return caches


def full_part(cache: Any) -> Optional[Any]:
    """The keys and values of a layer's full heads; None where it has none."""
    if isinstance(cache, mlx_lm_cache.CacheList):
        return cache[0]
    return None if isinstance(cache, ArraysCache) else cache


def linear_part(cache: Any) -> Optional[ArraysCache]:
    """The states of a layer's linear heads; None where it has none."""
    if isinstance(cache, mlx_lm_cache.CacheList):
        return cache[1]
    return cache if isinstance(cache, ArraysCache) else None


def cache_bytes(caches: list) -> dict[str, int]:
    """Bytes held for the full heads and for the linear heads, over all layers."""
    parts = {"full_attention": full_part, "linear_attention": linear_part}
    return {
        name: sum(part.nbytes for c in caches if (part := find(c)) is not None)
        for name, find in parts.items()
    }


def append(cache: Any, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
    """Put down keys and values ``[B, H, T, D]`` and fetch all, as the cache's own method does.

    A plain cache whose buffers are full and will be full again gets them side by side, where that
    method would make room of zeros, and fill it then.
    """
    T = keys.shape[2]
    if type(cache) is not KVCache or (cache.offset + T) % cache.step:
        return cache.update_and_fetch(keys, values)
    if cache.keys is None:
        cache.keys, cache.values = mx.contiguous(keys), mx.contiguous(values)
    elif cache.offset == cache.keys.shape[2]:
        cache.keys = mx.concatenate([cache.keys, keys], axis=2)
        cache.values = mx.concatenate([cache.values, values], axis=2)
    else:
        return cache.update_and_fetch(keys, values)
    cache.offset += T
    return cache.keys, cache.values


def grow(cache: KVCache) -> None:
    """Make room behind a plain cache's full buffers, as its own method would for a token."""
    for name in ("keys", "values"):
        rows = getattr(cache, name)
        B, H, _, D = rows.shape
        room = mx.zeros((B, H, cache.step, D), rows.dtype)
        setattr(cache, name, mx.concatenate([rows, room], axis=2))


def padding_mask(cache: Optional[ArraysCache], T: int) -> Optional[mx.array]:
    """Which of the next T tokens are no padding, bool ``[B, T]``; None where all are.

    Not the cache's own make_mask, which in mlx-lm 0.31 takes either side's padding, not both.
    """
    if cache is None:
        return None
    position, mask = mx.arange(T), None
    if cache.left_padding is not None:
        mask = position >= cache.left_padding[:, None]
    if cache.lengths is not None:
        inside = position < cache.lengths[:, None]
        mask = inside if mask is None else mask & inside
    return mask


def depends_on_counters(x: mx.array, caches: list) -> mx.array:
    """Tie the per-sequence counters of a batched cache to an output.

    Nothing else reads most of them while decoding, and the graph behind each would grow by a node
    a token.
    """
    counters = [
        value
        for cache in caches
        for part in (full_part(cache), linear_part(cache))
        for name in ("offset", "left_padding", "lengths")
        if isinstance(value := getattr(part, name, None), mx.array)
    ]
    return mx.depends(x, counters) if counters else x
