"""The loss at the vocabulary, a few positions at a time, and never all logits at once."""

from collections.abc import Callable
from typing import NamedTuple, Optional

import mlx.core as mx

# One float32 array of logits at a time stays below this; some twenty are alive.
LOGIT_BYTES = 32 << 20


class HeadLoss(NamedTuple):
    """Means over the positions, float32: the loss that is differentiated, and its parts."""

    loss: mx.array
    kl: mx.array
    cross_entropy: mx.array


def head_loss(
    h: mx.array,
    weight: mx.array,
    targets: mx.array,
    teacher: Optional[tuple[mx.array, Callable[[mx.array], mx.array]]] = None,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> HeadLoss:
    """``kl_weight * KL(teacher || student) + ce_weight * cross-entropy``, for long sequences.

    Loss and gradients are made together, a block of positions after the other, so that neither
    pass holds more than a block's logits. Logits are made in the dtype of ``h``, everything from
    there on in float32.

    Args:
        h: what the student's output layer reads, ``[N, hidden]``.
        weight: of that layer, ``[vocabulary, hidden]``.
        targets: the tokens that come next, integers ``[N]``.
        teacher: what the teacher's output layer reads, ``[N, its hidden]``, and that layer; None
            for no KL. Nothing flows back into them.

    Returns:
        The loss, differentiable in ``h`` and ``weight``; the parts are for looking at.
    """
    N, V = len(targets), len(weight)
    rows = max(1, LOGIT_BYTES // (4 * V))
    words = mx.arange(V)

    def forward(h, weight):
        kl, ce = mx.array(0.0), mx.array(0.0)
        grad_weight, grads = mx.zeros(weight.shape), []
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            h_part, target = h[part], targets[part, None]
            if grads:
                # Else all blocks' logits are made before the first is done with.
                h_part = mx.depends(h_part, [grads[-1], grad_weight, kl, ce])
            log_q = log_softmax(h_part @ weight.T)
            q = mx.exp(log_q)
            ce = ce - mx.take_along_axis(log_q, target, axis=-1).sum()
            grad = ce_weight * (q - (words == target))
            if teacher is not None:
                teacher_h, teacher_head = teacher
                log_p = log_softmax(teacher_head(mx.depends(teacher_h[part], h_part)))
                p = mx.exp(log_p)
                kl = kl + (p * (log_p - log_q)).sum()
                grad = grad + kl_weight * (q - p)
            grad = (grad / N).astype(h.dtype)
            grads.append(grad @ weight)
            grad_weight = grad_weight + (grad.T @ h_part).astype(mx.float32)
        kl, ce = kl / N, ce / N
        loss = ce_weight * ce if teacher is None else kl_weight * kl + ce_weight * ce
        return loss, kl, ce, mx.concatenate(grads), grad_weight.astype(weight.dtype)

    differentiable = mx.custom_function(forward)

    @differentiable.vjp
    def backward(_, cotangents, outputs):
        *_, grad_h, grad_weight = outputs
        return (
            (cotangents[0] * grad_h).astype(h.dtype),
            (cotangents[0] * grad_weight).astype(weight.dtype),
        )

    return HeadLoss(*differentiable(h, weight)[:3])


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def attention_loss(outputs: mx.array, targets: mx.array) -> mx.array:
    """The mean squared difference, float32."""
    return (outputs.astype(mx.float32) - targets.astype(mx.float32)).square().mean()
