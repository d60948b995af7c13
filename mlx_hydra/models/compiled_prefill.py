"""Steps of a prefill, of which each layer is two compiled functions, with the cache between them.

Keys and values are more in every step, for which MLX would trace a function anew; all else has the
same shapes in every step of one length. Our kernel for attention is told no number of keys by a
shape, and runs in the second function; what else attends runs between the two.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from .. import kernels
from ..ops.head_attention import prefill_splits
from .cache import append, full_part, linear_part
from .compiled_step import TRACES

# Shapes of steps that are known; beyond these the count begins anew.
SHAPES = 64


class CompiledPrefill:
    """Runs layers on steps of a length that an ordinary step has had before (:meth:`remember`)."""

    def __init__(self):
        self.forget()

    def __reduce__(self):
        return CompiledPrefill, ()

    def forget(self) -> None:
        """Let go of what has been traced, which holds weights."""
        self._traced: dict[tuple, list] = {}
        self._seen: set[tuple] = set()

    def remember(self, key: tuple) -> None:
        """Take what an ordinary step has run for what is compiled in the next of its kind.

        Args:
            key: what :func:`key_of` tells of the state that the step begins with.
        """
        if len(self._seen) >= SHAPES:
            self._seen.clear()
        self._seen.add(key)

    def runner(
        self, layers: Sequence[nn.Module], h: mx.array, cache: Sequence[Any], offset: Any
    ) -> Optional[Callable]:
        """What runs layer ``n`` on a state with its cache; None for a step to be run ordinarily.

        Args:
            h: ``[B, T, hidden]``, without padding.
        """
        key, leading = key_of(h), h.shape[:2]
        if not isinstance(offset, int) or key not in self._seen or not takes(layers, cache):
            return None
        # The one that was used last comes last, and stays longest. Put down in one piece: another
        # thread may be here, too.
        traced = dict(self._traced)
        functions = traced.pop(key, None) or [functions_of(layer, leading) for layer in layers]
        self._traced = dict(list(traced.items())[1 - TRACES :]) | {key: functions}
        where, empty, split = kernels.near(offset), {}, {}

        def run(n: int, h: mx.array, c: Any) -> mx.array:
            layer = layers[n]
            if functions[n] is None:
                return layer(h.reshape(*leading, -1), None, None, c, offset)
            before, after = functions[n]
            if h.ndim == 3:
                # Of rows a product is one node of the graph, of sequences of them three.
                h = h.flatten(0, 1)
            linear = linear_part(c)
            states = linear.cache
            if states[0] is None:
                # Layers of as many heads take the same zeros.
                heads = layer.self_attn.linear
                states = empty.get(heads.n_heads) or heads.empty_states(leading[0], h.dtype)
                empty[heads.n_heads] = states
            of_full, of_linear, states = before(h, where, tuple(states))
            linear.cache = list(states)
            splits = None
            if of_full:
                attention, (q, k, v, *gate) = layer.self_attn.full, of_full
                k, v = append(full_part(c), k, v)
                if isinstance(k, mx.array):
                    call = q.shape, k.shape, attention.kv_index, q.dtype, k.dtype, v.dtype
                    if call not in split:
                        split[call] = prefill_splits(q, k, v, attention.kv_index, offset)
                    splits = split[call]
                if splits is None:
                    o = attention.attend(q, k, v, None, full_part(c))
                    of_full = (o, *gate)
                else:
                    of_full = (q, k[:, :, :1], v[:, :, :1], *gate)
            h = after(splits)(h, where, of_full, of_linear)
            return mx.unflatten(h, 0, leading) if n + 1 == len(layers) else h

        return run


def key_of(h: mx.array) -> tuple:
    """What steps have in common for which the same functions are compiled."""
    return h.shape, h.dtype, str(mx.default_stream(mx.default_device()))


def takes(layers: Sequence[nn.Module], cache: Sequence[Any]) -> bool:
    """Whether all layers can be told their place by an array, and have all states or none."""
    if layers[0].training:
        return False
    for layer, c in zip(layers, cache):
        attention, linear = layer.self_attn, linear_part(c)
        if "full" in attention and not attention.full.takes_arrays:
            return False
        if linear is not None and (
            not attention.linear.takes_arrays
            or linear.left_padding is not None
            or linear.lengths is not None
            or len({state is None for state in linear.cache}) > 1
        ):
            return False
    return True


def functions_of(layer: nn.Module, leading: tuple[int, int]) -> Optional[tuple[Callable, Callable]]:
    """What a layer does before keys and values are put down, compiled, and after it.

    States are rows ``[B * T, hidden]``. The second is a function of the parts that attention splits
    keys into, None where it has been done. None for a layer without linear heads.

    Args:
        leading: B and T.
    """
    attention = layer.self_attn
    if "linear" not in attention:
        return None
    products, projections = attention.side_by_side, attention.projections
    count = len(attention.full.projections) if "full" in attention else 0
    full_bias, linear_bias = attention.gate_biases()
    dtype = None

    def before(h, where, states):
        nonlocal dtype
        x = layer.input_layernorm(h)
        # Which is traced before the second function is.
        dtype = x.dtype
        projected = products.unbiased(x, projections, leading)
        of_full, of_linear = projected[:count], projected[count:]
        if of_full:
            q, k, v, *gate = of_full
            of_full = (*attention.full.heads(q, k, v, where), *gate)
        cache = ArraysCache(size=len(states))
        cache.cache = list(states)
        o, gate = attention.linear(x, None, cache, where, of_linear)
        return tuple(of_full), (o,) if gate is None else (o, gate), tuple(cache.cache)

    @functools.cache
    def after(splits):
        def finish(h, where, of_full, of_linear):
            kinds = []
            if splits is not None:
                q, k, v, *gate = of_full
                of_full = (attention.full.attend_from(q, k, v, where, splits), *gate)
            if of_full:
                kinds.append(attention.full_outputs(*of_full, gate_bias=full_bias))
            kinds.append(attention.linear_outputs(*of_linear, gate_bias=linear_bias))
            heads = attention.fused(kinds).astype(dtype).flatten(0, 1)
            h = h + attention.output(heads)
            return h + layer.feed_forward(layer.post_attention_layernorm(h), together=False)

        return mx.compile(finish)

    return mx.compile(before), after
