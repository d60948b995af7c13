"""What the scores say of a model whose retrieval head is known, and how they are put together."""

from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest
from selection_models import (
    BYSTANDER,
    PREVIOUS,
    RETRIEVAL,
    Reference,
    built_model,
    random_model,
    random_pair,
)
from tiny import write_tokenizer
from transformers import AutoTokenizer

from mlx_hydra.select.attention import retrieval_scores
from mlx_hydra.select.causal import PairScores, capability_scores, fuse, score_pair, spearman
from mlx_hydra.select.choose import ranked
from mlx_hydra.select.knockout import knockout_curve
from mlx_hydra.select.measure import halves_agree, measure
from mlx_hydra.select.probes import Pair, builtin_pairs
from mlx_hydra.select.state import State


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return builtin_pairs(AutoTokenizer.from_pretrained(folder), 60, 3, seed=1)


def test_the_model_built_by_hand_answers(pairs):
    model = built_model()
    for pair in pairs:
        logits = model(mx.array([pair.clean_tokens]))[0, len(pair.prompt) - 1 :]
        assert mx.argmax(logits, -1).tolist() == pair.answer


def test_causal_finds_the_head_that_retrieves_and_not_the_bystander(pairs, tmp_path):
    measured = measure(built_model(), pairs, "causal", State(tmp_path / "x", {}))
    order = ranked(measured.scores)
    assert order[:2] == [RETRIEVAL, PREVIOUS]
    assert measured.scores[RETRIEVAL] == 1
    # What feeds the retrieval head is found as its sender alone.
    assert 0.1 < measured.scores[PREVIOUS] < 0.9
    for name in ("single", "multi_key"):
        found = measured.details["capabilities"][name]
        receiver, sender = np.array(found["receiver"]), np.array(found["sender"])
        assert receiver[RETRIEVAL] == pytest.approx(1, abs=1e-3)
        assert abs(receiver[PREVIOUS]) < 1e-3
        assert sender[PREVIOUS] > 0.1
        assert sender[RETRIEVAL] == 0
        assert found["answered"] == found["pairs"] == 3
        assert found["consistency"][1][RETRIEVAL[1]] == 1
    others = np.ones(measured.scores.shape, bool)
    others[RETRIEVAL] = others[PREVIOUS] = False
    assert np.abs(measured.scores[others]).max() < 0.01
    assert abs(measured.scores[BYSTANDER]) < 0.01


def test_attention_takes_the_bystander_for_the_head_that_retrieves(pairs, tmp_path):
    measured = measure(built_model(), pairs, "attention", State(tmp_path / "x", {}))
    assert set(ranked(measured.scores)[:2]) == {RETRIEVAL, BYSTANDER}
    assert measured.scores[BYSTANDER] == pytest.approx(1, abs=1e-3)
    assert measured.scores[PREVIOUS] < 0.01


def test_silencing_tells_the_two_orders_apart(pairs, tmp_path):
    model = built_model()
    measured = measure(model, pairs, "causal", State(tmp_path / "x", {}))
    ticks = []
    points = knockout_curve(model, pairs, ranked(measured.scores), 0, ticks.append)
    curve = {(point.order, point.heads): point for point in points}
    assert [h for order, h in curve if order == "scores"] == [0, 1, 2]
    assert curve["scores", 0].accuracy == 1
    assert curve["scores", 1].accuracy == 0
    assert curve["scores", 1].readout == pytest.approx(0, abs=1e-6)
    at_random = [point for point in points if point.order != "scores" and point.heads == 2]
    assert len(at_random) == 3
    assert all(point.accuracy > 0.4 for point in at_random)
    assert sum(ticks) == len(pairs) * (1 + 2 * 4)


def test_silencing_equals_zeroed_columns(pairs):
    """Nothing is frozen: it is as if o_proj had no weights for the head."""
    model, pair = random_model(3), random_pair(3)
    (point,) = [
        p for p in knockout_curve(model, [pair], [(1, 2), *[(0, 0)] * 7], 0) if p.heads == 1
    ][:1]
    weight = np.array(model.model.layers[1].self_attn.o_proj.weight)
    weight[:, 2 * 16 : 3 * 16] = 0
    model.model.layers[1].self_attn.o_proj.weight = mx.array(weight)
    reference = Reference(model)
    expected = reference.readout(reference.run(pair.clean_tokens)[0], pair)
    assert point.readout == pytest.approx(expected, abs=1e-4)


def test_retrieval_scores_are_attention_weights():
    model = random_model(2)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 20, 40).tolist()
    answer, distractor = [31, 32, 33], [41, 42, 43]
    # The answer is told twice, and its last token with it a third time.
    text = {}
    for name, (a, b, c) in (("clean", answer), ("other", distractor)):
        text[name] = [*prompt[:9], a, b, c, *prompt[12:25], a, b, c, c, *prompt[29:]]
    pair = Pair(text["clean"], text["other"], answer, distractor, "single")
    reference = Reference(model)
    scores = retrieval_scores(model, pair)
    tokens = pair.clean_tokens
    x = reference.w["model.embed_tokens.weight"][tokens]
    places = [[9, 25], [10, 26], [11, 27, 28]]
    weights = reference.heads(x, 0)[1]
    expected = np.mean([weights[:, 39 + j, at].sum(-1) for j, at in enumerate(places)], axis=0)
    np.testing.assert_allclose(scores[0], expected, atol=1e-5)


def test_attention_needs_the_answer_in_the_text():
    pair = Pair([1, 2, 3, 4], [1, 5, 3, 4], [6], [7], "single")
    with pytest.raises(ValueError, match="no token of its answer where its prompts differ"):
        retrieval_scores(random_model(), pair)


def test_attention_that_is_not_finite_is_refused():
    model = random_model()
    model.model.layers[0].self_attn.q_proj.weight *= mx.nan
    with pytest.raises(ValueError, match="attention of a single probe is not finite"):
        retrieval_scores(model, random_pair())


def scores_of(receiver, sender, clean=2.0, counterfactual=-1.0) -> PairScores:
    return PairScores([receiver], [sender], clean, counterfactual, {"clean": 10}, 10)


def test_consistency_and_fusion_by_hand():
    """Eq 11 and 12 on numbers that a reader can follow."""
    pairs = [
        scores_of([0.5, 0.02, 0.000, -0.3], [0.1, 0.00, 0.00, 0.0]),
        scores_of([0.3, 0.00, 0.005, -0.1], [0.9, 0.04, 0.00, 0.0]),
    ]
    scores, kappa = capability_scores(pairs)
    assert kappa.tolist() == [[1, 1, 0, 0]]
    np.testing.assert_allclose(scores, [[0.5, 0.02, 0, 0]])
    one_of_two, kappa = capability_scores([pairs[0], scores_of([0.3, 0.009, 0, 0], [0] * 4)])
    assert kappa.tolist() == [[1, 0.5, 0, 0]]
    np.testing.assert_allclose(one_of_two[0, 1], 0.0145 * 0.5)
    # Each capability to 0..1; one that tells no head from another adds nothing.
    fused = fuse([np.array([[0.0, 1.0, 4.0]]), np.array([[2.0, 1.0, 1.5]]), np.full((1, 3), 3.0)])
    np.testing.assert_allclose(fused, [[(0 + 1) / 3, 0.25 / 3, 1.5 / 3]])


def test_spearman_by_hand():
    assert spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 90])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24)
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([2, 1, 3, 5, 4])) == pytest.approx(0.8)
    # Ties share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman(np.array([0, 0, 1]), np.array([0, 1, 2])) == pytest.approx(np.sqrt(3) / 2)
    assert spearman(np.zeros(3), np.array([0, 1, 2])) == 0


def test_halves_are_every_other_pair():
    seen = []

    def scores(groups):
        seen.append(groups)
        return np.concatenate(groups)

    assert halves_agree({"a": [1, 9, 2, 8], "b": [5, 5]}, scores) == pytest.approx(-1)
    assert seen == [[[1, 2], [5]], [[9, 8], [5]]]
    assert halves_agree({"a": [1, 2], "b": [5]}, scores) is None


def test_probes_that_the_model_does_not_answer_are_left_out(tmp_path):
    state = State(tmp_path / "x", {})
    pair = random_pair()
    for number, scores in enumerate(
        [
            scores_of([0.5, 0.0], [0, 0]),
            scores_of([0.9, 0.9], [0, 0], clean=-0.1),
            scores_of([0.9, 0.9], [0, 0], clean=1, counterfactual=0.995),
        ]
    ):
        state.add(number, asdict(scores))
    measured = measure(None, [pair] * 3, "causal", state)
    assert measured.scores.tolist() == [[1, 0]]
    found = measured.details["capabilities"]["single"]
    assert (found["pairs"], found["answered"]) == (3, 1)
    assert measured.details["forward_passes_per_pair"] == {"clean": 1}
    others = [pair, replace(pair, capability="other"), pair]
    measured = measure(None, others, "causal", state)
    assert measured.scores.tolist() == [[1, 0]]
    assert measured.details["capabilities"]["other"] == {
        "pairs": 1,
        "answered": 0,
        "readout": -0.1,
        "counterfactual_readout": -1,
    }
    state.results[0] = state.results[1]
    with pytest.raises(ValueError, match=r"answers none of the 3 probes.*: -0\.1/-1, -0\.1/-1, 1/"):
        measure(None, [pair] * 3, "causal", state)


def test_the_same_seed_gives_the_same_scores(pairs):
    model = random_model(4)
    assert score_pair(model, random_pair(4)) == score_pair(model, random_pair(4))
    folder_pairs = [pair.prompt for pair in pairs]
    assert len({tuple(prompt) for prompt in folder_pairs}) == len(folder_pairs)
