"""Scores of all heads over many probes: pair by pair, kept as they come, brought together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import mlx.core as mx
import numpy as np
from mlx_lm.models.qwen3 import Model

from .attention import retrieval_scores
from .causal import PairScores, capability_scores, fuse, score_pair, spearman
from .probes import Pair
from .state import State

METHODS = ("causal", "attention")


@dataclass(frozen=True)
class Measured:
    """The scores of all heads ``[L, H]``, and how they came about.

    details: what the report says of it, ready for JSON.
    """

    scores: np.ndarray
    details: dict[str, Any]


def measure(
    model: Model,
    pairs: Sequence[Pair],
    method: str,
    state: State,
    advance: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Score a model's heads on pairs; what the state holds is not measured again.

    Args:
        method: "causal" or "attention".
        advance: called with 1 for each pair that is done.

    Raises:
        ValueError: a pair on which there is nothing to measure, or no pair that the model answers.
    """
    for number, pair in enumerate(pairs):
        if number not in state.results:
            if method == "causal":
                result = asdict(score_pair(model, pair))
            else:
                result = {"scores": retrieval_scores(model, pair).tolist()}
            state.add(number, result)
            mx.clear_cache()
        advance(1)
    results: dict[str, list[dict]] = {}
    for number, pair in enumerate(pairs):
        results.setdefault(pair.capability, []).append(state.results[number])
    return (causal_scores if method == "causal" else attention_scores)(results)


def is_result(result: Any, method: str, shape: tuple[int, int]) -> bool:
    """Whether something that was read back is what measuring a pair gives."""
    try:
        if method == "causal":
            pair = PairScores(**result)
            tables = [pair.receiver, pair.sender]
            numbers = [pair.clean, pair.counterfactual, pair.forward, *pair.macs.values()]
        else:
            tables, numbers = [result["scores"]], []
        whole = all(np.shape(table) == shape and np.isfinite(table).all() for table in tables)
        return whole and bool(np.isfinite(numbers).all())
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def causal_scores(results: Mapping[str, Sequence[dict]]) -> Measured:
    """The paper's Eq 11 and 12 over the pairs that the model answers.

    A capability of which it answers none is left out.
    """
    answered, capabilities, everything = {}, {}, []
    for name, found in results.items():
        pairs = [PairScores(**result) for result in found]
        everything += pairs
        kept = [pair for pair in pairs if pair.is_answered]
        capabilities[name] = {
            "pairs": len(pairs),
            "answered": len(kept),
            "readout": float(np.mean([pair.clean for pair in pairs])),
            "counterfactual_readout": float(np.mean([pair.counterfactual for pair in pairs])),
        }
        if kept:
            answered[name] = kept
            scores, kappa = capability_scores(kept)
            capabilities[name] |= {
                "receiver": mean_of([pair.receiver for pair in kept]),
                "sender": mean_of([pair.sender for pair in kept]),
                "consistency": kappa.tolist(),
                "scores": scores.tolist(),
            }
    if not answered:
        readouts = ", ".join(f"{p.clean:.3g}/{p.counterfactual:.3g}" for p in everything[:4])
        raise ValueError(
            f"The model answers none of the {len(everything)} probes, so there is nothing to trace "
            f"(readouts, clean/counterfactual: {readouts}). Try a shorter --context, or probes of "
            "your own."
        )
    fused = fuse([capability_scores(kept)[0] for kept in answered.values()])
    agreement = halves_agree(
        answered, lambda half: fuse([capability_scores(kept)[0] for kept in half])
    )
    cost: dict[str, float] = {}
    for pair in everything:
        for part, macs in pair.macs.items():
            cost[part] = cost.get(part, 0) + macs / pair.forward / len(everything)
    return Measured(
        fused,
        {
            "spearman_of_halves": agreement,
            "forward_passes_per_pair": cost,
            "capabilities": capabilities,
        },
    )


def attention_scores(results: Mapping[str, Sequence[dict]]) -> Measured:
    """The mean retrieval score of each capability's pairs, and the mean of these."""

    def mean(groups: Sequence[Sequence[dict]]) -> np.ndarray:
        return np.mean([mean_of([r["scores"] for r in group]) for group in groups], axis=0)

    capabilities = {
        name: {"pairs": len(found), "scores": mean_of([r["scores"] for r in found])}
        for name, found in results.items()
    }
    details = {"spearman_of_halves": halves_agree(results, mean), "capabilities": capabilities}
    return Measured(mean(list(results.values())), details)


def mean_of(scores: Sequence) -> list[list[float]]:
    return np.mean(scores, axis=0).tolist()


def halves_agree(
    results: Mapping[str, Sequence], scores: Callable[[list[Sequence]], np.ndarray]
) -> Optional[float]:
    """Spearman's rank correlation of the scores from every other pair with those from the rest.

    Returns:
        None where a capability has a single pair.
    """
    groups = list(results.values())
    if min(map(len, groups)) < 2:
        return None
    return spearman(*(scores([group[first::2] for group in groups]) for first in (0, 1)))
