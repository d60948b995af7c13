"""Several linear layers of one input as one product."""

import copy
import operator
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from ..ops.normed_linear import linear_backend, normed_linear

# Two threads that join the same layers would each take the other's half-made weights for new ones.
_JOINING = threading.Lock()


# Up to so many parts of an array MLX makes as one node of the graph, and more as a node each.
MOST_PARTS = 10


class _Weights(NamedTuple):
    """What layers multiply with, one below the other, as :func:`normed_linear` takes it."""

    weight: Any
    group_size: Optional[int] = None
    bits: Optional[int] = None


class _Group(NamedTuple):
    """Neighbours that are one product, or a layer by itself."""

    # All outputs without their biases, and with them.
    bare: Callable[[mx.array], mx.array]
    biased: Callable[[mx.array], mx.array]
    # For each layer: its bias, if the bare product lacks it; where its outputs end, None for the
    # end of all; and itself, its weights turned.
    biases: Sequence[Optional[mx.array]]
    ends: Sequence[Optional[int]]
    each: Sequence[Callable[[mx.array], mx.array]]
    # None where they are of another kind, or layers do something else.
    weights: Optional[_Weights] = None
    # Whether zeros follow the layers' outputs.
    is_padded: bool = False

    def split(self, outputs: mx.array) -> list[mx.array]:
        """Slices of the product, one a layer."""
        # Behind the end of it all is nothing; MLX would make a slice of each part.
        inner = [end for end in self.ends if end not in (None, outputs.shape[-1])]
        if not inner:
            return [outputs]
        size, total = self.ends[0], outputs.shape[-1]
        are_even = list(self.ends) == [size * (i + 1) for i in range(len(self.ends))]
        if outputs.size == total == self.ends[-1] and outputs.ndim > 1 and are_even:
            # What is computed of a slice lies as that does, which the next product would copy.
            rows = outputs.reshape(-1, *outputs.shape[1:-1], size)
            return mx.split(rows, len(self.ends))
        parts = mx.split(outputs, inner[: MOST_PARTS - 1], axis=-1)
        if len(inner) >= MOST_PARTS:
            more = [*inner[MOST_PARTS - 2 :], outputs.shape[-1]]
            parts[-1:] = [outputs[..., start:end] for start, end in pairwise(more)]
        return parts[: len(self.ends)]


class SideBySide:
    """Runs linear layers of one input together, as each product costs a start, and small ones more.

    Neighbours of one kind are joined: their weights become slices of one array, so that nothing
    is held twice, and they remain the layers they were. Once a layer's weights have been assigned
    anew they are joined anew; a change in place, as by ``w *= 2``, is not noticed. What cannot be
    joined, such as LoRA layers, runs by itself, and so does all inside mx.compile or mx.grad where
    the weights are arguments. A joined product has no gradient for the layers' own weights. A layer
    alone is a product of weights that have been turned, which it does for every call itself.
    """

    def __init__(self):
        self.forget()

    def __reduce__(self):
        # A copy joins weights of its own.
        return SideBySide, ()

    def forget(self) -> None:
        """Let go of the joined products, whose weights are held as long."""
        # Of the layers' weights, and the products. One tuple: another thread may be reading.
        self._known = (), ()

    def __call__(self, x: mx.array, layers: Sequence[nn.Module]) -> mx.array:
        """The layers' outputs for ``x [..., dim]``, one after the other on the last axis.

        Without :meth:`biases`, and up to seven zeros follow.
        """
        *groups, last = self._groups(layers)
        outputs = [group.bare(x)[..., : group.ends[-1]] for group in groups] + [last.bare(x)]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def of_sum(
        self,
        h: mx.array,
        update: mx.array,
        norm: nn.Module,
        layers: Sequence[nn.Module],
        together: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """``h + update`` of a few rows ``[B, dim]``, and what a call gives of its norm.

        In one kernel where that takes it, without a gradient.

        Args:
            together: give SwiGLU of two layers' outputs, with their biases, instead.
        """
        if (found := _operands(self._groups(layers), norm, together, h.dtype)) is not None:
            arguments = (h, update, norm.weight, found.pop("weight"))
            if (backend := linear_backend(*arguments, **found)) != "ops":
                return normed_linear(
                    *arguments, eps=norm.eps, swiglu=together, backend=backend, **found
                )
        total = h + update
        x = norm(total)
        return total, swiglu(*self.apart(x, layers)) if together else self(x, layers)

    def apart(self, x: mx.array, layers: Sequence[nn.Module]) -> list[mx.array]:
        """The layers' outputs, each by itself: slices, where a product has several."""
        return [part for group in self._groups(layers) for part in group.split(group.biased(x))]

    def unbiased(
        self, x: mx.array, layers: Sequence[nn.Module], leading: Sequence[int] = ()
    ) -> list[mx.array]:
        """The layers' outputs as :meth:`apart` gives them, without :meth:`biases`.

        To be asked for a product with a bias takes cuBLAS longer than a kernel takes for the sum.

        Args:
            leading: the axes that the first one of x is made of, if several.
        """
        parts = []
        for group in self._groups(layers):
            output = group.bare(x)
            parts += group.split(mx.unflatten(output, 0, leading) if leading else output)
        return parts

    def biases(self, layers: Sequence[nn.Module]) -> list[Optional[mx.array]]:
        """For each layer the bias that has yet to be added to its outputs, or None."""
        return [bias for group in self._groups(layers) for bias in group.biases]

    def one_by_one(self, x: mx.array, layers: Sequence[nn.Module]) -> list[mx.array]:
        """The layers' outputs, a product each, for what is slow to read slices of many rows."""
        return [each(x) for group in self._groups(layers) for each in group.each]

    def join(self, layers: Sequence[nn.Module]) -> None:
        """Join layers now, before what is compiled holds their weights as they are."""
        self._groups(layers)

    def _groups(self, layers):
        known, groups = self._known
        if _are(parts := _parts(layers), known):
            return groups
        with _JOINING:
            known, groups = self._known
            if _are(parts := _parts(layers), known):
                return groups
            self.forget()
            if not _can_eval(parts):
                return [_alone(layer) for layer in layers]
            groups = []
            for kind, group in ((kind, list(group)) for kind, group in groupby(layers, _kind)):
                if kind is None:
                    groups += [_alone(layer) for layer in group]
                else:
                    groups.append(_join(group))
            self._known = _parts(layers), groups
        return groups


def _operands(groups, norm, together, dtype):
    """What :func:`normed_linear` multiplies with, by its names; None where it would be wrong."""
    first, *others = groups
    if type(norm) is not nn.RMSNorm or any(group.weights is None for group in groups):
        return None
    if dtype not in (mx.float32, norm.weight.dtype):
        # The norm's output is of another type, and so is all behind it.
        return None
    if together and (others or any(b is not None for b in first.biases) or first.is_padded):
        return None
    if len(others) > 1 or any(group.weights.bits is not None for group in others):
        return None
    return first.weights._asdict() | {"tail": others[0].weights.weight if others else None}


def _parts(layers):
    # What stands in for a layer may be no module.
    return [part for x in layers for part in (x.values() if isinstance(x, nn.Module) else [x])]


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


class _Product:
    """Plain layers that are joined, or one.

    Their weights lie turned: a view, which a compiled step would make anew for each token.
    """

    def __init__(self, weight: mx.array, bias: Optional[mx.array] = None):
        self.turned, self.bias = weight.T, bias
        mx.eval(self.turned)

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.turned if self.bias is None else mx.addmm(self.bias, x, self.turned)


def _alone(layer):
    return _Group(layer, layer, [None], [None], [layer], _weights(layer))


def _weights(layer):
    """Those of a layer without a bias of its own."""
    if type(layer) is nn.Linear and "bias" not in layer:
        return _Weights(layer.weight)
    if type(layer) is nn.QuantizedLinear and "bias" not in layer:
        return _packed(layer)
    return None


def _packed(layer):
    if getattr(layer, "mode", "affine") != "affine":
        return None
    return _Weights((layer.weight, layer.scales, layer.biases), layer.group_size, layer.bits)


def _join(layers):
    first, is_plain = layers[0], type(layers[0]) is nn.Linear
    biases = [layer.get("bias") for layer in layers]
    if len(layers) == 1:
        if not is_plain:
            return _alone(first)
        biased = _Product(first.weight, *biases)
        return _Group(
            _Product(first.weight), biased, biases, [None], [biased], _Weights(first.weight)
        )
    sizes = [layer.weight.shape[0] for layer in layers]
    ends = list(accumulate(sizes))
    # cuBLAS leaves its fast products to rows of whole 16 bytes.
    padding = -ends[-1] % 8 if is_plain else 0
    joined = {}
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    if dtype is not None:
        parts = [mx.zeros(n, dtype) if b is None else b for b, n in zip(biases, sizes)]
        joined["bias"] = mx.concatenate([*parts, mx.zeros(padding, dtype)])
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
        weight = joined["weight"]
        each = [_Product(layer.weight, bias) for layer, bias in zip(layers, biases)]
        bare, biased = _Product(weight), _Product(weight, joined.get("bias"))
        return _Group(bare, biased, biases, ends, each, _Weights(weight), padding > 0)
    bare, biased = copy.copy(first), copy.copy(first)
    for name, array in joined.items():
        bare[name] = biased[name] = array
    bare.pop("bias", None)
    return _Group(bare, biased, biases, ends, layers, _packed(bare))
