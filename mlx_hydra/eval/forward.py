"""Prompts of one length as batches: read in steps into the model's own cache, answered greedily."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

# A batch holds as many sequences as fit into so many tokens, and at least one.
BATCH_TOKENS = 8192

T = TypeVar("T")


def batches(items: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    """The items, sequences of ``length`` tokens each, in batches."""
    size = max(1, BATCH_TOKENS // length)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def read(
    model: Callable[..., mx.array],
    tokens: mx.array,
    cache: list[Any],
    step: int,
    advance: Callable[[int], None],
) -> None:
    """Bring tokens ``[B, T]`` into a cache, ``step`` tokens of the batch at a time.

    Nothing asks for the logits, so they are not computed. ``advance`` is told how many tokens
    each step brought in.
    """
    B, length = tokens.shape
    width = max(1, step // B)
    for start in range(0, length, width):
        part = tokens[:, start : start + width]
        model(part, cache=cache)
        mx.eval([c.state for c in cache])
        advance(part.size)
        mx.clear_cache()


def answer(
    model: Callable[..., mx.array],
    prompts: Sequence[Sequence[int]],
    count: int,
    ends: set[int],
    step: int,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the token that ends it.

    Args:
        model: a model as mlx-lm calls it.
        prompts: token ids, all of one length.
        count: the most tokens of an answer.
        ends: tokens that end an answer.
        step: tokens that are read at a time.
        advance: told how many tokens were read.

    Raises:
        ValueError: the model's logits are not finite.
    """
    tokens, cache = mx.array(prompts), make_prompt_cache(model)
    read(model, tokens[:, :-1], cache, step, advance)
    advance(len(prompts))
    last, answers = tokens[:, -1:], [[] for _ in prompts]
    open_answers = dict(enumerate(answers))
    for _ in range(count):
        logits = model(last, cache=cache)[:, -1:]
        # What perplexity would refuse, too: -inf alone may be how a model masks a token.
        if not mx.isfinite(mx.logsumexp(logits.astype(mx.float32), axis=-1)).all():
            raise ValueError(
                "--needles: the model gives logits that are not finite at length "
                f"{tokens.shape[1]}."
            )
        last = mx.argmax(logits, axis=-1)
        for i, token in enumerate(last[:, 0].tolist()):
            if i in open_answers and token in ends:
                del open_answers[i]
            elif i in open_answers:
                open_answers[i].append(token)
        if not open_answers:
            break
    return answers
