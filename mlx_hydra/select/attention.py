"""The retrieval score of arXiv 2404.15574: how much a head looks at the token that is copied."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.qwen3 import Model

from .patching import at_positions, clean_keys_and_values, split_heads
from .probes import Pair
from .trace import Trace


def retrieval_scores(model: Model, pair: Pair) -> np.ndarray:
    """Each head's attention to the needle's token while the model is to say it, ``[L, H]``.

    For each token of the answer, teacher-forced, the attention that falls on this token among the
    swapped ones in the text; the mean over the answer's tokens that stand there. The paper counts
    how often that token has the most attention; its share of the attention is finer. (Ours.)

    Raises:
        ValueError: no token of the answer is among the swapped ones, or a score is not finite.
    """
    trace = Trace(model, pair, counterfactual=False)
    copied = [
        [place for place in pair.changed if pair.prompt[place] == token] for token in pair.answer
    ]
    asked = [j for j, places in enumerate(copied) if places]
    if not asked:
        raise ValueError(
            f"A {pair.capability} probe has no token of its answer where its prompts differ: "
            "there is none to look at."
        )
    is_copied = np.zeros((len(asked), trace.length), dtype=bool)
    for row, j in enumerate(asked):
        is_copied[row, copied[j]] = True
    positions = mx.array([trace.sites[j - trace.answer_length] for j in asked])
    causal = mx.arange(trace.length) <= positions[:, None]

    scores = np.zeros((len(trace.layers), trace.num_heads))
    for number, block in enumerate(trace.layers):
        attention = block.self_attn
        x = block.input_layernorm(trace.residual[number])[None]
        q = split_heads(attention.q_proj(x), attention.n_heads)
        q = at_positions(trace, attention, attention.q_norm(q))[0]
        q = q[:, mx.array([len(trace.sites) - trace.answer_length + j for j in asked])]
        group = attention.n_heads // attention.n_kv_heads
        for kv in range(attention.n_kv_heads):
            keys, _ = clean_keys_and_values(trace, number, kv)
            heads = slice(kv * group, (kv + 1) * group)
            logits = mx.where(causal, q[heads] @ keys.T * attention.scale, -mx.inf)
            mass = (mx.softmax(logits, -1) * mx.array(is_copied)).sum(-1).mean(-1)
            scores[number, heads] = np.array(mass)
    if not np.isfinite(scores).all():
        raise ValueError(
            f"The attention of a {pair.capability} probe is not finite: are the model's weights "
            "whole?"
        )
    return scores
