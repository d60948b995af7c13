"""The paper's scores: what the answer loses where a head is told another document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mlx_lm.models.qwen3 import Model

from .patching import Head, Receivers, patched_readouts
from .probes import Pair
from .trace import Trace

# Of a head that counts: the paper's threshold of Eq 11.
THRESHOLD = 0.01
# Receivers of a hop, of all heads. (Ours.)
RECEIVER_SHARE = 0.05
ROUNDS = 2
# Logits that separate answer from distractor at least, for a share of it to mean anything. (Ours.)
LEAST_EFFECT = 0.01


@dataclass(frozen=True)
class PairScores:
    """What a pair tells of all heads, ``[L][H]``.

    receiver: Eq 10, the share of the readout that goes with the head's own output.
    sender: the share that goes with what the head passes to the receivers.
    clean, counterfactual: the readout in either run.
    macs: multiply-adds by what they were for.
    forward: multiply-adds of one pass over the pair's tokens.
    """

    receiver: list[list[float]]
    sender: list[list[float]]
    clean: float
    counterfactual: float
    macs: dict[str, int]
    forward: int

    @property
    def is_answered(self) -> bool:
        """Whether the model knows the answer from the distractor, and by the text."""
        return self.clean > 0 and self.clean - self.counterfactual > LEAST_EFFECT


def score_pair(model: Model, pair: Pair) -> PairScores:
    """Score all heads of a model on a pair.

    Raises:
        ValueError: the model's logits are not finite.
    """
    trace = Trace(model, pair)
    clean, other = trace.readout(trace.residual[-1]).item(), counterfactual_readout(trace)
    if not np.isfinite([clean, other]).all():
        raise ValueError(
            f"The readout of a {pair.capability} probe is {clean} ({other} in its counterfactual): "
            "expected finite logits; are the model's weights whole, and does its dtype hold them?"
        )
    shape = len(trace.layers), trace.num_heads
    heads = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    macs = dict(trace.macs)

    def effects(of: Sequence[Head], hops: Sequence[Receivers], name: str) -> np.ndarray:
        scores = np.zeros(shape)
        if of:
            readouts, count = patched_readouts(trace, of, hops)
            macs[name] = macs.get(name, 0) + count
            scores[tuple(zip(*of))] = (clean - np.array(readouts)) / (clean - other)
        return scores

    receiver = sender = np.zeros(shape)
    if clean - other > LEAST_EFFECT:
        receiver = effects(heads, [], "receivers")
        hops: list[Receivers] = []
        scores = receiver
        for _ in range(ROUNDS):
            if not (hop := strongest(scores)):
                break
            hops.insert(0, hop)
            scores = effects([h for h in heads if h[0] < max(hop)], hops, "senders")
            sender = np.maximum(sender, scores)
    return PairScores(
        receiver.tolist(), sender.tolist(), clean, other, macs, trace.forward_macs(0, trace.length)
    )


def counterfactual_readout(trace: Trace) -> float:
    """The readout of the counterfactual run: every head's output is from there."""
    J = trace.answer_length
    x = trace.residual[0][-J:]
    for layer, heads in zip(trace.layers, trace.other):
        x = x + layer.self_attn.o_proj(heads[-J:].flatten(-2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return trace.readout(x).item()


def strongest(scores: np.ndarray) -> dict[int, list[int]]:
    """The heads over the threshold, the strongest few of them, by layer."""
    most = max(1, round(RECEIVER_SHARE * scores.size))
    chosen: dict[int, list[int]] = {}
    for i in np.argsort(-scores, axis=None, kind="stable")[:most]:
        layer, head = divmod(int(i), scores.shape[1])
        if scores[layer, head] > THRESHOLD:
            chosen.setdefault(layer, []).append(head)
    return chosen


def capability_scores(pairs: Sequence[PairScores]) -> tuple[np.ndarray, np.ndarray]:
    """Eq 11 over the pairs of one capability: ``max(receiver, sender) * kappa``, and kappa.

    Receiver and sender scores are means over the pairs; kappa is the share of pairs in which the
    larger of the two is over the threshold.
    """
    receiver = np.array([pair.receiver for pair in pairs])
    sender = np.array([pair.sender for pair in pairs])
    kappa = (np.maximum(receiver, sender) > THRESHOLD).mean(0)
    return np.maximum(receiver.mean(0), sender.mean(0)) * kappa, kappa


def fuse(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Eq 12: each capability's scores brought to 0..1, then their mean."""
    scaled = []
    for s in scores:
        spread = s.max() - s.min()
        scaled.append((s - s.min()) / spread if spread > 0 else np.zeros_like(s))
    return np.mean(scaled, axis=0)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, equal scores sharing their mean rank; 0 for constant scores."""
    ranks = [mean_ranks(x.ravel()) for x in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def mean_ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
