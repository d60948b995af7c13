"""Several linear layers of one input as one product."""

import copy
from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn


class SideBySide:
    """Runs linear layers of one input together, for decode steps, where each product costs a start.

    Neighbours of one kind are joined: their weights become slices of one array, so that nothing
    is held twice, and they remain the layers they were. Once a layer's weights have been replaced
    they are joined anew. What cannot be joined, such as LoRA layers, runs by itself. A joined
    product has no gradient for the layers' own weights.
    """

    def __init__(self):
        self._parts, self._joined = [], []

    def __call__(self, x: mx.array, layers: Sequence[nn.Module]) -> mx.array:
        """The layers' outputs for ``x [..., dim]``, one after the other on the last axis."""
        parts = [part for layer in layers for part in layer.values()]
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts)):
            self._joined = [
                group if kind is None else [_join(group)]
                for kind, group in ((k, list(g)) for k, g in groupby(layers, _kind))
            ]
            self._parts = [part for layer in layers for part in layer.values()]
        outputs = [layer(x) for group in self._joined for layer in group]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)


def _kind(layer):
    """What layers have in common that can be joined; None for no such layer."""
    if type(layer) is nn.Linear:
        return nn.Linear, layer.weight.dtype
    if type(layer) is nn.QuantizedLinear:
        settings = layer.group_size, layer.bits, getattr(layer, "mode", "affine")
        return nn.QuantizedLinear, layer.scales.dtype, *settings
    return None


def _join(layers):
    if len(layers) == 1:
        return layers[0]
    joined = copy.copy(layers[0])
    sizes = [layer.weight.shape[0] for layer in layers]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    biases = [layer["bias"] for layer in layers if "bias" in layer]
    if biases:
        joined.bias = mx.concatenate(
            [
                layer["bias"] if "bias" in layer else mx.zeros(size, biases[0].dtype)
                for layer, size in zip(layers, sizes)
            ]
        )
        mx.eval(joined.bias)
    for name in ("weight", "scales", "biases"):
        if name in joined:
            joined[name] = mx.concatenate([layer[name] for layer in layers])
            slices = mx.split(joined[name], ends)
            # Now, not with all layers of a model at once: until then both copies are held.
            mx.eval(joined[name], slices)
            for layer, part in zip(layers, slices):
                layer[name] = part
    mx.clear_cache()
    return joined
