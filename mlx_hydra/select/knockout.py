"""The check on scores: what answering loses as heads are silenced, best first or at random."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.qwen3 import Model

from .patching import Head
from .probes import Pair
from .trace import prefill, readout_of, replaced_o_proj

RANDOM_ORDERS = 3
# Heads silenced at most, of all.
LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class Point:
    """The mean over the probes after some heads were silenced.

    order: "scores", or "random 0" and so on.
    readout: the paper's Eq 9, in logits.
    accuracy: share of the answers' tokens that are the most likely one, teacher-forced.
    """

    order: str
    heads: int
    readout: float
    accuracy: float


class Silenced:
    """Stands in for o_proj and puts zero in the place of some heads' outputs."""

    def __init__(self, o_proj, heads: Sequence[int], num_heads: int):
        self._o_proj = o_proj
        self._keep = mx.array([head not in heads for head in range(num_heads)])

    def __call__(self, x: mx.array) -> mx.array:
        keep = mx.repeat(self._keep, x.shape[-1] // len(self._keep))
        return self._o_proj(mx.where(keep, x, 0))


def counts(total: int) -> list[int]:
    """Numbers of heads to silence: doubled from one to a quarter of all."""
    largest = max(1, round(LARGEST_SHARE * total))
    return [n for n in (1 << i for i in range(largest.bit_length())) if n < largest] + [largest]


def curve_length(total: int, pairs: int) -> int:
    """How many probes a whole curve reads."""
    return pairs * (1 + len(counts(total)) * (1 + RANDOM_ORDERS))


def knockout_curve(
    model: Model,
    pairs: Sequence[Pair],
    order: Sequence[Head],
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Point]:
    """Answer probes with ever more heads silenced, in an order and in seeded random orders.

    Nothing is frozen here: a silenced head is silent in the whole run, for all that follow it.

    Args:
        order: all heads, the one that should matter most first.
        advance: called with 1 after each probe.
    """
    rng = np.random.default_rng(seed)
    orders = {"scores": list(order)}
    for i in range(RANDOM_ORDERS):
        orders[f"random {i}"] = [order[j] for j in rng.permutation(len(order))]
    untouched = measure(model, pairs, [], advance)
    points = []
    for name, heads in orders.items():
        points.append(Point(name, 0, *untouched))
        points += [
            Point(name, count, *measure(model, pairs, heads[:count], advance))
            for count in counts(len(heads))
        ]
    return points


def measure(
    model: Model, pairs: Sequence[Pair], silenced: Sequence[Head], advance: Callable[[int], None]
) -> tuple[float, float]:
    """Mean readout and share of right tokens without some heads."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in silenced:
        by_layer.setdefault(layer, []).append(head)
    readouts, right = [], []
    layers: Iterator[int] = iter(range(len(model.model.layers)))

    def silence(o_proj):
        heads = by_layer.get(next(layers), [])
        return Silenced(o_proj, heads, model.args.num_attention_heads) if heads else o_proj

    with replaced_o_proj(model, silence):
        for pair in pairs:
            tokens, J = pair.clean_tokens, len(pair.answer)
            cache = make_prompt_cache(model)
            prefill(model, tokens[:-J], cache)
            hidden = model.model(mx.array(tokens[-J:])[None], cache=cache)[0]
            readouts.append(readout_of(model, pair, hidden).item())
            head = (
                model.model.embed_tokens.as_linear
                if model.args.tie_word_embeddings
                else model.lm_head
            )
            right += (mx.argmax(head(hidden), -1) == mx.array(pair.answer)).tolist()
            advance(1)
    return float(np.mean(readouts)), float(np.mean(right))
