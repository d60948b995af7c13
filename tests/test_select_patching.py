"""Patching of all heads in one batch, against one run a head in float64."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from selection_models import Reference, random_model, random_pair

from mlx_hydra.select import causal, patching, trace
from mlx_hydra.select.causal import PairScores, counterfactual_readout, score_pair, strongest
from mlx_hydra.select.patching import patched_readouts
from mlx_hydra.select.trace import Trace

L, H = 3, 4
HEADS = [(layer, head) for layer in range(L) for head in range(H)]
# Receivers in one KV group and in two, more than one a layer, not in every layer.
FIRST = [(1, 1), (2, 0), (2, 3)]
SECOND = [(0, 3), (1, 0), (1, 1), (1, 2)]


def by_layer(heads):
    return {layer: [h for at, h in heads if at == layer] for layer, _ in heads}


@pytest.fixture(scope="module", params=["tied", "untied"])
def case(request):
    """A model, a pair, its trace, and the reference."""
    # A small scale keeps the logits near one, so that 1e-5 is about float32's rounding of them.
    model = random_model(1, scale=0.5, tie_word_embeddings=request.param == "tied")
    if request.param == "tied":
        model.model.embed_tokens.weight = 0.3 * model.model.embed_tokens.weight
    pair = random_pair(1)
    return model, pair, Trace(model, pair), Reference(model)


def test_readouts_of_both_runs(case):
    _, pair, traced, reference = case
    clean = reference.readout(reference.run(pair.clean_tokens)[0], pair)
    other = reference.readout(reference.run(pair.counterfactual_tokens)[0], pair)
    assert traced.readout(traced.residual[-1]).item() == pytest.approx(clean, abs=1e-5)
    assert counterfactual_readout(traced) == pytest.approx(other, abs=1e-5)
    assert abs(clean - other) > 0.01


def test_receivers_in_a_batch_equal_one_at_a_time(case):
    _, pair, traced, reference = case
    clean = reference.readout(reference.run(pair.clean_tokens)[0], pair)
    # The reference swaps the head at all positions: only the answer's can matter.
    expected = np.array([reference.patched(pair, *head) for head in HEADS])
    assert np.abs(expected - clean).min() > 1e-4
    got, _ = patched_readouts(traced, HEADS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hops", [[FIRST], [SECOND, FIRST]], ids=["one round", "two rounds"])
def test_senders_in_a_batch_equal_one_at_a_time(case, hops):
    _, pair, traced, reference = case
    senders = [head for head in HEADS if head[0] < max(layer for layer, _ in hops[0])]
    expected = np.array(
        [reference.patched(pair, *head, hops=hops, sites=traced.sites) for head in senders]
    )
    clean = reference.readout(reference.run(pair.clean_tokens)[0], pair)
    assert np.abs(expected - clean).max() > 2e-4
    got, _ = patched_readouts(traced, senders, [by_layer(hop) for hop in hops])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_a_head_with_no_receiver_after_it_changes_nothing(case):
    _, _, traced, _ = case
    got, _ = patched_readouts(traced, [(2, 1)], [{1: [0]}])
    assert got.item() == traced.readout(traced.residual[-1]).item()


def test_small_blocks_give_the_same(case, monkeypatch):
    model, pair, traced, _ = case
    hops = [by_layer(SECOND), by_layer(FIRST)]
    whole = [patched_readouts(traced, HEADS)[0], patched_readouts(traced, HEADS[:8], hops)[0]]
    monkeypatch.setattr(patching, "ROWS_BYTES", 1 << 14)
    monkeypatch.setattr(patching, "SCORES_BYTES", 1 << 11)
    monkeypatch.setattr(patching, "MLP_TOKENS", 5)
    monkeypatch.setattr(trace, "PREFILL_STEP", 7)
    again = Trace(model, pair)
    parts = [patched_readouts(again, HEADS)[0], patched_readouts(again, HEADS[:8], hops)[0]]
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_swapped_tokens_at_the_very_start_and_end():
    """Nothing is shared before them, and the last ones touch the answer's positions."""
    model = random_model(2, scale=0.5)
    pair = random_pair(3, length=30, places=(0, 26))
    assert pair.changed[0] == 0
    other = list(pair.counterfactual)
    other[29] = (other[29] + 1) % 61
    pair = dataclasses.replace(pair, counterfactual=other)
    traced, reference = Trace(model, pair), Reference(model)
    assert traced.sites == sorted(set(traced.sites))
    expected = [reference.patched(pair, *head) for head in HEADS]
    np.testing.assert_allclose(patched_readouts(traced, HEADS)[0], expected, rtol=0, atol=1e-4)
    hops = [FIRST]
    expected = [reference.patched(pair, *h, hops=hops, sites=traced.sites) for h in HEADS[:8]]
    got, _ = patched_readouts(traced, HEADS[:8], [by_layer(FIRST)])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_quantised_and_half_precision_models():
    pair = random_pair(4)
    for tied in (True, False):
        model = random_model(4, scale=0.5, hidden_size=64, head_dim=32, tie_word_embeddings=tied)
        nn.quantize(model, group_size=32, bits=8)
        whole = model(mx.array([pair.clean_tokens]))[0].astype(mx.float32)
        z = np.array(whole)[len(pair.prompt) - 1 :]
        lead = z[range(3), pair.answer] - z[range(3), pair.distractor]
        expected = (lead * 0.9 ** np.arange(3)).sum() / (0.9 ** np.arange(3)).sum()
        traced = Trace(model, pair)
        got = traced.readout(traced.residual[-1]).item()
        assert got == pytest.approx(expected, abs=1e-3)
        assert np.isfinite(np.array(patched_readouts(traced, HEADS)[0])).all()
    model = random_model(4, scale=0.5)
    exact, _ = patched_readouts(Trace(model, pair), HEADS)
    model.set_dtype(mx.bfloat16)
    traced = Trace(model, pair)
    assert traced.heads[0].dtype == traced.residual[-1].dtype == mx.float32
    close, _ = patched_readouts(traced, HEADS)
    np.testing.assert_allclose(close, exact, atol=0.1)


def test_the_model_is_left_as_it_was():
    model, pair = random_model(5), random_pair(5)
    before = [layer.self_attn.o_proj for layer in model.model.layers]
    logits = model(mx.array([pair.clean_tokens]))
    score_pair(model, pair)
    assert all(a is layer.self_attn.o_proj for a, layer in zip(before, model.model.layers))
    assert mx.array_equal(model(mx.array([pair.clean_tokens])), logits)


def test_what_is_counted():
    """Multiply-adds by hand, for a pass over the tokens and for the batch of receivers."""
    model, pair = random_model(6), random_pair(6)
    traced = Trace(model, pair)
    T, J, hidden, D = 42, 3, 32, 16
    projections, mlp = hidden * D * (2 * 4 + 2 * 2), 3 * hidden * 64
    assert traced.length == T
    assert traced.macs["clean"] == L * (T * (projections + mlp) + 4 * D * T * T)
    # The counterfactual run begins at the first swapped token, 9.
    rest = L * ((T - 9) * (projections + mlp) + 4 * D * (T * T - 9 * 9))
    assert traced.macs["counterfactual"] == rest
    # A head's row passes through o_proj once and through the MLPs from its own layer on.
    rows = H * (3 + 2 + 1)
    _, macs = patched_readouts(traced, HEADS)
    assert macs == rows * J * mlp + L * H * J * H * D * hidden
    # All of it together is well under the three passes that are the target.
    assert sum(traced.macs.values()) + macs < 3 * traced.forward_macs(0, T)


def test_strongest_are_few_and_over_the_threshold():
    scores = np.zeros((4, 20))
    assert strongest(scores) == {}
    scores[1, 2], scores[3, 4], scores[0, 0] = 0.5, 0.4, 0.009
    assert strongest(scores) == {1: [2], 3: [4]}
    scores[3, 5], scores[2, 5], scores[0, 1] = 0.3, 0.6, 0.02
    assert strongest(scores) == {2: [5], 1: [2], 3: [4, 5]}


def test_sites_are_the_swapped_tokens_what_follows_and_the_answer():
    pair = random_pair(length=40, answer=3, places=(5, 9, 30))
    assert pair.changed == [5, 6, 7, 9, 10, 11, 30, 31, 32]
    assert pair.segments == [(5, 16), (30, 37), (39, 42)]
    assert random_pair(length=40, answer=3, places=(36,)).segments == [(36, 39), (39, 42)]
    assert random_pair(length=40, answer=1, places=(39,)).segments == [(39, 40)]


def test_a_pair_that_tells_nothing_has_no_scores():
    model = random_model(8)
    pair = random_pair(8)
    # Heads that write nothing leave nothing of the document at the answer's positions.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
    scores = score_pair(model, pair)
    assert scores.clean == scores.counterfactual
    assert not scores.is_answered
    assert not np.any(scores.receiver) and not np.any(scores.sender)
    assert isinstance(scores, PairScores)


def test_logits_that_are_not_finite_are_refused():
    model = random_model(9)
    model.model.layers[1].mlp.down_proj.weight *= mx.nan
    with pytest.raises(ValueError, match=r"readout of a single probe is nan .*: expected finite"):
        score_pair(model, random_pair(9))


@pytest.mark.parametrize("seed", [2, 17, 26])
def test_scores_of_a_pair_over_two_rounds(monkeypatch, seed):
    """Receivers, then senders to the strongest of them, then senders to the strongest of those."""
    monkeypatch.setattr(causal, "RECEIVER_SHARE", 0.2)
    model, pair = random_model(seed, scale=0.7, num_hidden_layers=4), random_pair(seed)
    reference = Reference(model)
    clean = reference.readout(reference.run(pair.clean_tokens)[0], pair)
    other = reference.readout(reference.run(pair.counterfactual_tokens)[0], pair)
    heads = [(layer, head) for layer in range(4) for head in range(H)]
    sites = [site for start, end in pair.segments for site in range(start, end)]

    def effects(hops):
        patched = [reference.patched(pair, *head, hops=hops, sites=sites) for head in heads]
        return (clean - np.array(patched)) / (clean - other)

    def top(scores):
        order = sorted(range(len(heads)), key=lambda i: -scores[i])[:3]
        return [heads[i] for i in order if scores[i] > 0.01]

    receiver = effects([])
    first = top(receiver)
    once = effects([first])
    second = top(once)
    twice = effects([second, first])
    # All of it has a say here.
    assert len(first) == 3 and second and np.max(twice - np.maximum(once, 0)) > 0.01

    got = score_pair(model, pair)
    np.testing.assert_allclose(np.ravel(got.receiver), receiver, atol=1e-4)
    expected = np.maximum(0, np.maximum(once, twice))
    np.testing.assert_allclose(np.ravel(got.sender), expected, atol=1e-4)
    assert got.is_answered == (clean > 0)
