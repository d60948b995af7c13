"""What each stage trains, and the gradients of its loss."""

import contextlib
from collections.abc import Iterator
from typing import Optional

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.trainer import grad_checkpoint

from .losses import attention_loss, head_loss
from .models import Student, cast

Weights = dict[str, mx.array]


class Attention:
    """Hybrid layers' attention outputs against the teacher's, on the teacher's own layer inputs.

    The layers do not see each other: each one's gradient is made and evaluated by itself, and no
    more than one layer's activations are alive. The loss is the mean over the layers.

    Raises:
        ValueError: no layer differs from the teacher's.
    """

    def __init__(self, student: Student, teacher: nn.Module, dtype: mx.Dtype):
        self._student, self._teacher, self._dtype = student.model, teacher, dtype
        self._layers = student.hybrid_layers()
        if not self._layers:
            raise ValueError(
                f"student {student.reader.folder}: every layer is the teacher's own; there is "
                "nothing for the objective 'attention' to train."
            )

    def trains(self, name: str) -> bool:
        return any(name.startswith(self._prefix(layer)) for layer in self._layers)

    def gradients(self, weights: Weights, tokens: mx.array) -> tuple[Weights, Weights]:
        """Gradients by name and the loss, of sequences ``[B, length + 1]``."""
        model = self._teacher.model
        h = model.embed_tokens(tokens[:, :-1])
        mask = create_attention_mask(h, None)
        grads, loss = {}, mx.array(0.0)
        for number, layer in enumerate(model.layers):
            x = layer.input_layernorm(h)
            target = layer.self_attn(x, mask)
            if number in self._layers:
                part, found = self._layer(number, weights, x, target, mask)
                loss = loss + part / len(self._layers)
                grads |= found
            h = h + target
            h = h + layer.mlp(layer.post_attention_layernorm(h))
            mx.eval(h, loss, grads)
        return grads, {"loss": loss}

    def _prefix(self, layer: int) -> str:
        return f"model.layers.{layer}.self_attn."

    def _layer(self, number, weights, x, target, mask):
        prefix = self._prefix(number)
        attention = self._student.layers[number].self_attn
        own = {name: w for name, w in weights.items() if name.startswith(prefix)}

        def loss(own):
            install(attention, own, self._dtype, prefix)
            return attention_loss(attention(x, mask), target)

        part, grads = mx.value_and_grad(loss)(own)
        return part, {name: grad / len(self._layers) for name, grad in grads.items()}


class NextToken:
    """Cross-entropy of the next token and, with a teacher, KL to its logits; everything trains."""

    def __init__(
        self,
        student: Student,
        dtype: mx.Dtype,
        teacher: Optional[nn.Module] = None,
        kl_weight: float = 0.0,
        ce_weight: float = 1.0,
        grad_checkpoint: bool = True,
    ):
        self._student, self._teacher, self._dtype = student.model, teacher, dtype
        self._weights_of_loss = kl_weight, ce_weight
        self._grad_checkpoint = grad_checkpoint
        self._head = "model.embed_tokens.weight"
        if not student.args.tie_word_embeddings:
            self._head = "lm_head.weight"

    def trains(self, name: str) -> bool:
        return True

    def gradients(self, weights: Weights, tokens: mx.array) -> tuple[Weights, Weights]:
        """Gradients by name, the loss and its parts, of sequences ``[B, length + 1]``."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        of_teacher = None
        if self._teacher is not None:
            h = self._teacher.model(inputs)
            mx.eval(h)
            of_teacher = h.reshape(-1, h.shape[-1]), output_layer(self._teacher)

        def loss(weights):
            install(self._student, weights, self._dtype)
            h = self._student.model(inputs)
            head = cast(self._head, weights[self._head], self._dtype)
            h = h.reshape(-1, h.shape[-1])
            return head_loss(h, head, targets, of_teacher, *self._weights_of_loss)

        layer = self._student.layers[0]
        with checkpointed(layer) if self._grad_checkpoint else contextlib.nullcontext():
            (total, kl, ce), grads = mx.value_and_grad(loss)(weights)
        figures = {"loss": total, "ce": ce}
        return grads, figures if self._teacher is None else {**figures, "kl": kl}


def output_layer(model: nn.Module):
    return model.model.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head


def install(module: nn.Module, weights: Weights, dtype: mx.Dtype, prefix: str = "") -> None:
    """Give a module float32 weights in the dtype of the computation."""
    module.update(
        tree_unflatten(
            [(name.removeprefix(prefix), cast(name, w, dtype)) for name, w in weights.items()]
        )
    )


@contextlib.contextmanager
def checkpointed(layer: nn.Module) -> Iterator[None]:
    """Let all layers of this class be recomputed in the backward pass, as mlx-lm does it."""
    plain = type(layer).__call__
    grad_checkpoint(layer)
    try:
        yield
    finally:
        type(layer).__call__ = plain
