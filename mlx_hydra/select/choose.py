"""From scores, or from none, to the heads that keep full attention."""

import math
from dataclasses import dataclass

import numpy as np

GRANULARITIES = ("head", "group")
Heads = list[list[int]]


@dataclass(frozen=True)
class Budget:
    """How many heads stay full.

    ratio: their share of all, in (0, 1].
    min_per_layer: in each layer at least.
    size: heads that are chosen together: 1, or a KV group's.
    """

    ratio: float
    min_per_layer: int
    size: int = 1

    def units(self, num_heads: int) -> tuple[int, int]:
        """What is chosen from and needed at least, in a layer: heads, or groups.

        Raises:
            ValueError: the ratio or the smallest number is out of range.
        """
        check_ratio(self.ratio)
        if not 0 <= self.min_per_layer <= num_heads:
            raise ValueError(
                f"--min-per-layer {self.min_per_layer}: expected a number from 0 to {num_heads}."
            )
        return num_heads // self.size, math.ceil(self.min_per_layer / self.size)

    def check_enough(self, num_layers: int, num_heads: int, count: int) -> None:
        """Raise a ValueError if ``count`` heads or groups in all are too few for the layers."""
        in_layer, least = self.units(num_heads)
        if least * num_layers > count:
            raise ValueError(
                f"--min-per-layer {self.min_per_layer}: {num_layers} layers need "
                f"{least * num_layers * self.size} heads in all, --full-ratio {self.ratio} keeps "
                f"{count * self.size}; expected a ratio from {least / in_layer:.4g} up, or fewer "
                "heads a layer."
            )


def choose_by_scores(scores: np.ndarray, budget: Budget) -> Heads:
    """The highest scores of the whole model, with so many heads in each layer at least.

    Each layer's best come first, then the best of all the rest, up to ``round(ratio * L * H)``
    heads. KV groups are chosen by the mean of their heads' scores: as all are of one size, that
    keeps the largest sum of scores. Of equal scores, and most causal scores are 0, one of the layer
    with the fewest chosen is taken, and of a layer's the first: no layer is filled up by chance.

    Args:
        scores: ``[L, H]``.

    Raises:
        ValueError: the ratio leaves fewer heads than the layers must have, or is out of range; a
            score is not finite.
    """
    L, H = scores.shape
    if (bad := np.argwhere(~np.isfinite(scores))).size:
        layer, head = bad[0]
        raise ValueError(
            f"The score of layer {layer}, head {head} is {scores[layer, head]}: expected finite "
            "numbers; score the heads again."
        )
    in_layer, least = budget.units(H)
    total = L * in_layer
    count = max(1, round(budget.ratio * total))
    budget.check_enough(L, H, count)
    units = scores.reshape(L, in_layer, budget.size).mean(-1)
    # A stable sort, so that equal scores do not depend on the platform.
    order = np.argsort(-units, axis=1, kind="stable")
    chosen = np.zeros(units.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :least], True, axis=1)
    for _ in range(count - least * L):
        rest = np.where(chosen, -np.inf, units)
        best = rest == rest.max()
        layer = np.where(best.any(1), chosen.sum(1), in_layer).argmin()
        chosen[layer, best[layer].argmax()] = True
    return by_layer(np.repeat(chosen, budget.size, axis=1))


def choose_fixed(shape: tuple[int, int], budget: Budget) -> Heads:
    """The same heads in each layer, spread evenly over its heads: ``round(ratio * H)`` of them.

    At least one; KV groups are spread as heads are.

    Raises:
        ValueError: the ratio leaves fewer heads than a layer must have, or is out of range.
    """
    L, H = shape
    in_layer, _ = budget.units(H)
    count = max(1, round(budget.ratio * in_layer))
    budget.check_enough(L, H, count * L)
    chosen = np.zeros(in_layer, dtype=bool)
    chosen[[i * in_layer // count for i in range(count)]] = True
    return by_layer(np.tile(np.repeat(chosen, budget.size), (L, 1)))


def choose_layers(shape: tuple[int, int], ratio: float) -> Heads:
    """Whole layers, ``round(ratio * L)`` of them and one at least, the last of each stretch."""
    L, H = shape
    check_ratio(ratio)
    count = max(1, round(ratio * L))
    full = {(i + 1) * L // count - 1 for i in range(count)}
    return [list(range(H)) if layer in full else [] for layer in range(L)]


def check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"--full-ratio {ratio}: expected a number over 0 and up to 1.")


def by_layer(chosen: np.ndarray) -> Heads:
    return [np.flatnonzero(layer).tolist() for layer in chosen]


def ranked(scores: np.ndarray) -> list[tuple[int, int]]:
    """All heads as (layer, head), the highest score first."""
    order = np.argsort(-scores, axis=None, kind="stable")
    return [divmod(int(i), scores.shape[1]) for i in order]
