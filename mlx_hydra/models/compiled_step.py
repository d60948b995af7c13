"""A decode step of one token as one compiled function, for which the host walks no layers."""

import operator
from collections.abc import Callable, Sequence, ValuesView
from itertools import chain
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache

from .. import kernels
from ..ops.backend import kernels_run
from ..ops.head_attention import takes_arrays
from .cache import CacheList, full_part, grow, linear_part

# Compiled functions that are kept.
TRACES = 4

PLAIN = (nn.Linear, nn.QuantizedLinear, nn.RMSNorm, nn.Conv1d)


class Position:
    """Where a compiled step's token stands, and what its layers make of that alike.

    Args:
        offset: int32 ``[1]``; an array, as MLX would build a kernel for every number that stood in
            a compiled function.
        seen: which rows of the KV cache the token sees, bool ``[1, 1, 1, S]``; None where kernels
            run, which take the offset for it.
    """

    def __init__(self, offset: mx.array, seen: Optional[mx.array] = None):
        self.offset, self.seen = offset, seen
        self._indices: dict[tuple, mx.array] = {}

    def index(self, shape: tuple) -> mx.array:
        """The offset for each element of a row ``shape``."""
        if shape not in self._indices:
            self._indices[shape] = mx.broadcast_to(self.offset, shape)
        return self._indices[shape]


class KVBuffers:
    """A KV cache's buffers inside a compiled step: read whole, and written where an array says.

    In place where safe, by a scatter: MLX's slice_update fetches where to write from the host's
    memory on CUDA (31 us a call on an H100, a scatter 3).
    """

    def __init__(self, keys: mx.array, values: mx.array, position: Position):
        self.keys, self.values, self.position = keys, values, position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put down a token's keys and values ``[B, H, 1, D]``."""
        index = self.position.index(keys.shape)
        self.keys = mx.put_along_axis(self.keys, index, keys, axis=2)
        self.values = mx.put_along_axis(self.values, index, values, axis=2)
        return self.keys, self.values


class Remembered:
    """Layers that an ordinary step has run, and joined, as what is compiled holds their weights.

    Modules, weights and settings that are assigned anew afterwards are noticed; a weight that is
    changed in place, as by ``w *= 2``, is not.
    """

    def __init__(self):
        self.forget()

    def __reduce__(self):
        return Remembered, ()

    def forget(self) -> None:
        """Let go of the layers, whose weights are held as long."""
        # Layers, views of what holds their weights and settings, and these as they were. One tuple:
        # another thread may be reading.
        self._known: tuple[list[nn.Module], list[ValuesView], list[Any]] = [], [], []

    def remembers(self, layers: Sequence[nn.Module]) -> bool:
        """Whether an ordinary step has run with these very layers, weights and settings."""
        modules, views, known = self._known
        if not modules or not all(map(operator.is_, layers, modules)):
            return False
        # By no Python loop, as every token asks.
        parts = list(chain.from_iterable(views))
        return len(parts) == len(known) and all(map(operator.is_, parts, known))

    @property
    def is_empty(self) -> bool:
        return not self._known[0]

    def remember(self, layers: Sequence[nn.Module]) -> None:
        """Take these layers for what is compiled next; none with weights in lists."""
        modules = list(layers)
        for module in modules:
            modules += [part for part in module.values() if isinstance(part, nn.Module)]
        # Not the settings of MLX's plain layers, of which there are many, and which do not change.
        places = modules + [vars(module) for module in modules if type(module) not in PLAIN]
        views = list(map(dict.values, places))
        parts = list(chain.from_iterable(views))
        self.forget()
        # What is put into a list, or taken out, is not noticed.
        lists = [part for part in parts if type(part) in (list, tuple, dict)]
        if not any(isinstance(leaf, mx.array) for _, leaf in tree_flatten(lists)):
            self._known = modules, views, parts


class CompiledStep:
    """Runs a model's layers on one token, as :func:`mx.compile` has traced them.

    An ordinary step has to run first (:class:`Remembered`). A cache that is full is made to grow.

    Args:
        takes_sums: whether a layer's ``of_sum`` does what calling it does.
    """

    def __init__(self, takes_sums: Callable[[nn.Module], bool]):
        self._takes_sums = takes_sums
        self.forget()

    def __reduce__(self):
        return CompiledStep, (self._takes_sums,)

    def forget(self) -> None:
        """Let go of what has been traced, which holds weights."""
        self._traced: dict[tuple, Callable] = {}

    def takes(self, layers: Sequence[nn.Module], h: mx.array, cache: Sequence[Any]) -> list[tuple]:
        """The parts of each layer's cache, if the step is a token on a GPU, over plain caches.

        Empty if not. On the CPU MLX would have to build kernels with the machine's compiler, for
        seconds.
        """
        # What dropout draws would be drawn once.
        if h.shape[1] != 1 or layers[0].training or not runs_on_gpu():
            return []
        linears = (layer.self_attn.linear for layer in layers if "linear" in layer.self_attn)
        heads = next(linears, None)
        by_kernels = kernels_run()
        if heads is None or (by_kernels and not takes_arrays(h.dtype, heads.head_dim)):
            return []
        parts = [(full_part(c), linear_part(c)) for c in cache]
        places = set()
        for layer, (full, linear) in zip(layers, parts):
            if full is not None:
                if not layer.self_attn.full.takes_arrays or type(full) is not KVCache:
                    return []
                if full.keys is None or full.keys.dtype != h.dtype:
                    return []
                places.add((full.offset, full.keys.shape[2]))
            if linear is not None and (
                linear.left_padding is not None
                or linear.lengths is not None
                or any(state is None for state in linear.cache)
            ):
                return []
        if len(places) != 1:
            return []
        offset, room = places.pop()
        part = next(part for _, part in parts if part is not None)
        same = (heads.step_backend(h, part) != "ops") == by_kernels
        return parts if same and offset <= room and heads.takes_arrays else []

    def __call__(self, layers: list, h: mx.array, parts: list[tuple]) -> mx.array:
        """What the layers make of ``h [B, 1, hidden]``; the caches go on by a token.

        Args:
            parts: what :meth:`takes` gives.
        """
        arrays = []
        for full, linear in parts:
            if full is not None:
                offset, room = full.offset, full.keys.shape[2]
                if offset == room:
                    grow(full)
                    room = full.keys.shape[2]
            arrays.append(
                (
                    () if full is None else (full.keys, full.values),
                    () if linear is None else tuple(linear.cache),
                )
            )
        # mx.compile keeps what it has traced for every shape: a few, for sequences that take
        # turns, and no more as caches grow.
        by_kernels = kernels_run()
        key = h.shape, h.dtype, room, by_kernels, str(mx.default_stream(mx.default_device()))
        traced = self._traced
        if key not in traced:
            # Put down in one piece: another thread may be here, too.
            kept = list(traced.items())[1 - TRACES :]
            self._traced = traced = dict(kept) | {
                key: mx.compile(traceable(layers, self._takes_sums))
            }
        where = [kernels.near(offset)]
        if not by_kernels:
            # Made here, for the number of rows must not stand in a compiled function either.
            where.append((mx.arange(room) <= offset)[None, None, None])
        h, arrays = traced[key](h, where, arrays)
        for (full, linear), (of_full, of_linear) in zip(parts, arrays):
            if full is not None:
                full.keys, full.values = of_full
                full.offset += 1
            if linear is not None:
                linear.cache = list(of_linear)
        return h


def runs_on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def traceable(layers: Sequence[nn.Module], takes_sums: Callable[[nn.Module], bool]):
    """The layers as a function of arrays: hidden state, Position's, and arrays of each cache.

    Layers get the token's state as ``[B, hidden]``, whose products are one node of the graph each;
    of ``[B, 1, hidden]`` MLX makes three, and the host handles each node for every token. Layers
    that take sums get it in two parts, which the kernel adds that needs the sum next.
    """

    def step(h, where, arrays):
        left, position, h = [], Position(*where), h[:, 0]
        nothing = mx.zeros(h.shape, h.dtype)
        update = nothing
        for layer, (of_full, of_linear) in zip(layers, arrays):
            full = KVBuffers(*of_full, position) if of_full else None
            linear = None
            if of_linear:
                linear = ArraysCache(size=len(of_linear))
                linear.cache = list(of_linear)
            parts = [part for part in (full, linear) if part is not None]
            cache = CacheList(*parts) if len(parts) == 2 else parts[0]
            if takes_sums(layer):
                h, update = layer.of_sum(h, update, cache, position.offset)
            else:
                h = layer(h + update, None, None, cache, position.offset)
                update = nothing
            left.append(
                (
                    () if full is None else (full.keys, full.values),
                    () if linear is None else tuple(linear.cache),
                )
            )
        h = h + update
        # Not by an axis put in, whose stride products take for that of other rows.
        return h.reshape(len(h), 1, -1), left

    return step
