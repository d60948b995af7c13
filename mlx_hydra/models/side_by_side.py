"""Several linear layers of one input as one product."""

import copy
import operator
import threading
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Optional

import mlx.core as mx
import mlx.nn as nn

from .. import kernels

# Two threads that join the same layers would each take the other's half-made weights for new ones.
_JOINING = threading.Lock()


class SideBySide:
    """Runs linear layers of one input together, as each product costs a start, and small ones more.

    Neighbours of one kind are joined: their weights become slices of one array, so that nothing
    is held twice, and they remain the layers they were. Once a layer's weights have been assigned
    anew they are joined anew; a change in place, as by ``w *= 2``, is not noticed. What cannot be
    joined, such as LoRA layers, runs by itself, and so does all inside mx.compile or mx.grad where
    the weights are arguments. A joined product has no gradient for the layers' own weights.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Let go of the joined products, whose weights are held as long."""
        # Of the layers' weights, and the products. One tuple: another thread may be reading.
        self._known = (), ()

    def __call__(self, x: mx.array, layers: Sequence[nn.Module]) -> mx.array:
        """The layers' outputs for ``x [..., dim]``, one after the other on the last axis.

        Up to seven zeros follow.
        """
        *products, (layer, _) = self._products(layers)
        outputs = [layer(x)[..., : ends[-1]] for layer, ends in products] + [layer(x)]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def apart(self, x: mx.array, layers: Sequence[nn.Module]) -> list[mx.array]:
        """The layers' outputs, each by itself: slices, where a product has several."""
        outputs = []
        for layer, ends in self._products(layers):
            # To be asked for a product with a bias takes cuBLAS longer than a kernel for the sum.
            biases = layer.biases if type(layer) is _Product and on_cuda() else []
            output = x @ layer.turned if biases else layer(x)
            # Behind the end of it all is nothing; MLX would make a slice of each part.
            inner = [end for end in ends if end != output.shape[-1]] if len(ends) > 1 else []
            parts = mx.split(output, inner, axis=-1)[: len(ends)] if inner else [output]
            for i, bias in enumerate(biases):
                if bias is not None:
                    parts[i] = parts[i] + bias
            outputs += parts
        return outputs

    def join(self, layers: Sequence[nn.Module]) -> None:
        """Join layers now, before what is compiled holds their weights as they are."""
        self._products(layers)

    def _products(self, layers):
        """Pairs of a layer and where in its output those that it stands for end."""
        known, products = self._known
        if _are(parts := _parts(layers), known):
            return products
        with _JOINING:
            known, products = self._known
            if _are(parts := _parts(layers), known):
                return products
            self.forget()
            if not _can_eval(parts):
                return [(layer, [None]) for layer in layers]
            products = []
            for kind, group in ((kind, list(group)) for kind, group in groupby(layers, _kind)):
                if kind is None:
                    products += [(layer, [None]) for layer in group]
                else:
                    products.append((_join(group), _ends(group)))
            self._known = _parts(layers), products
        return products


def on_cuda() -> bool:
    return kernels.gpu_backend() == "cuda"


def _parts(layers):
    return [part for layer in layers for part in layer.values()]


def _are(parts, known):
    return len(parts) == len(known) and all(map(operator.is_, parts, known))


def is_inside_transformation(error: ValueError) -> bool:
    """Whether MLX refused to evaluate what mx.compile or mx.grad is only looking at."""
    return "transformation" in str(error)


def _can_eval(parts):
    try:
        mx.eval(parts)
    except ValueError as error:
        if not is_inside_transformation(error):
            raise
        return False
    return True


def _kind(layer):
    """What layers have in common that can be joined; None for no such layer."""
    if type(layer) is nn.Linear:
        kind, dtype = (nn.Linear,), layer.weight.dtype
    elif type(layer) is nn.QuantizedLinear:
        dtype = layer.scales.dtype
        kind = nn.QuantizedLinear, layer.group_size, layer.bits, getattr(layer, "mode", "affine")
    else:
        return None
    # A bias of another type would have all outputs in its own.
    return None if "bias" in layer and layer.bias.dtype != dtype else (*kind, dtype)


def _ends(layers):
    """Where the layers' outputs end, side by side."""
    return list(accumulate(layer.weight.shape[0] for layer in layers))


class _Product:
    """Plain layers that are joined.

    Their weights lie turned: a view, which a compiled step would make anew for each token.
    """

    def __init__(
        self, weight: mx.array, bias: Optional[mx.array], biases: Sequence[Optional[mx.array]]
    ):
        self.turned, self.bias, self.biases = weight.T, bias, biases
        mx.eval(self.turned)

    def __call__(self, x: mx.array) -> mx.array:
        if self.bias is None:
            return x @ self.turned
        if x.size == x.shape[-1] and on_cuda():
            # MLX has a product of a row of its own; and see SideBySide.apart.
            return x @ self.turned + self.bias
        return mx.addmm(self.bias, x, self.turned)


def _join(layers):
    if len(layers) == 1:
        return layers[0]
    first, is_plain = layers[0], type(layers[0]) is nn.Linear
    sizes = [layer.weight.shape[0] for layer in layers]
    ends = _ends(layers)
    # cuBLAS leaves its fast products to rows of whole 16 bytes.
    padding = -ends[-1] % 8 if is_plain else 0
    joined = {}
    biases = [layer["bias"] for layer in layers if "bias" in layer]
    if biases:
        joined["bias"] = mx.concatenate(
            [
                layer["bias"] if "bias" in layer else mx.zeros(size, biases[0].dtype)
                for layer, size in zip(layers, sizes)
            ]
            + [mx.zeros(padding, biases[0].dtype)]
        )
        mx.eval(joined["bias"])
    for name in ("weight", "scales", "biases"):
        if name in first:
            weights = [layer[name] for layer in layers]
            if padding:
                weights.append(mx.zeros((padding, weights[0].shape[1]), weights[0].dtype))
            joined[name] = mx.concatenate(weights)
            slices = mx.split(joined[name], ends)[: len(ends)]
            # Now, not with all layers of a model at once: until then both copies are held.
            mx.eval(joined[name], slices)
            for layer, part in zip(layers, slices):
                layer[name] = part
    mx.clear_cache()
    if is_plain:
        own = [layer.get("bias") for layer in layers] if biases else []
        return _Product(joined["weight"], joined.get("bias"), own)
    product = copy.copy(first)
    for name, array in joined.items():
        product[name] = array
    return product
