"""Needle grids and perplexity against models whose answers are known by construction."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import qwen3
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_hydra.eval import NeedleCell, TextCell, forward, perplexity, score_needles, score_text
from mlx_hydra.eval.needle_grid import EXTRA_TOKENS, stands_in
from mlx_hydra.eval.perplexity import Text
from mlx_hydra.needles import SYMBOLS

# The end of a text in tiny's tokenizer.
END = 1


class Seen:
    """A cache that keeps the tokens themselves, ``[B, T]``."""

    def __init__(self):
        self.state = []

    def update(self, tokens: mx.array) -> np.ndarray:
        self.state = [mx.concatenate([*self.state, tokens], axis=1)]
        return np.array(self.state[0])


class Fake:
    """A model that gives certainty to what ``next_token`` says of the tokens so far."""

    def __init__(self, next_token, vocabulary: int = tiny.VOCABULARY):
        self.next_token, self.vocabulary = next_token, vocabulary
        self.shapes = []

    def make_cache(self):
        return [Seen()]

    def __call__(self, inputs, cache):
        self.shapes.append(inputs.shape)
        seen = cache[0].update(inputs)
        logits = np.zeros((*inputs.shape, self.vocabulary), np.float32)
        for row, tokens in zip(logits, seen.tolist()):
            row[-1, self.next_token(tokens)] = 9
        return mx.array(logits)


def copying(length: int):
    """An induction head for two tokens: what followed the last one where it stood first."""

    def next_token(tokens) -> int:
        answered = len(tokens) - length
        return tokens[tokens.index(tokens[-1]) + 1] if 0 <= answered < SYMBOLS else END

    return next_token


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder)


def cells(kind, **changes):
    return [
        NeedleCell(**{"kind": kind, "depth": depth, "samples": 4, "seed": 3, **changes})
        for depth in (0, 0.4, 1)
    ]


@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize(
    # Of several keys that are asked it answers the last; of several values it finds the first.
    ("kind", "exact", "found"),
    [("single", 1, 1), ("multi_key", 1, 1), ("multi_value", 0, 0.25), ("multi_query", 0, 0.25)],
)
def test_a_model_that_copies_finds_what_its_rule_says(tokenizer, kind, length, exact, found):
    for cell in cells(kind, length=length):
        scored = score_needles(Fake(copying(length)), tokenizer, cell, 16)
        assert (scored["exact"], scored["found"]) == (exact, found)
        assert scored["length"] == length and scored["depth"] == cell.depth


@pytest.mark.parametrize("kind", ["single", "multi_key", "multi_value", "multi_query"])
def test_a_model_that_never_copies_finds_nothing(tokenizer, kind):
    for cell in cells(kind, length=60):
        scored = score_needles(Fake(lambda tokens: 0), tokenizer, cell, 64)
        assert scored["exact"] == scored["found"] == 0
        assert scored["example"]["expected"] == cell.needles(tokenizer)[0].texts


def test_all_values_in_another_order_are_found_and_not_exact(tokenizer):
    cell = cells("multi_query", length=60, samples=1)[1]
    (needle,) = cell.needles(tokenizer)
    for order, exact in (([0, 1, 2, 3], 1), ([2, 1, 0, 3], 0)):
        wanted = [token for i in order for token in needle.answers[i]]
        model = Fake(lambda tokens, wanted=wanted: [*wanted, 1][len(tokens) - cell.length])
        scored = score_needles(model, tokenizer, cell, 64)
        assert (scored["exact"], scored["found"]) == (exact, 1)


def test_what_comes_before_the_answer_does_not_hide_it(tokenizer):
    cell = cells("single", length=60, samples=1)[1]
    (needle,) = cell.needles(tokenizer)
    for extra, found in ((EXTRA_TOKENS, 1), (EXTRA_TOKENS + 1, 0)):
        said = [7] * extra + needle.answer
        model = Fake(lambda tokens, said=said: [*said, 8][len(tokens) - cell.length])
        scored = score_needles(model, tokenizer, cell, 64)
        assert (scored["exact"], scored["found"]) == (0, found)


def test_nothing_counts_after_the_end_of_the_answer(tokenizer):
    cell = cells("single", length=60, samples=1)[1]
    (needle,) = cell.needles(tokenizer)
    said = [7, tokenizer.eos_token_id, *needle.answer, 8]
    model = Fake(lambda tokens: said[len(tokens) - cell.length])
    scored = score_needles(model, tokenizer, cell, 64)
    assert (scored["exact"], scored["found"]) == (0, 0)
    assert scored["example"]["text"] == tokenizer.decode([7])
    assert len(model.shapes) == 3


def test_a_value_must_stand_there_whole():
    assert stands_in("123", "it is 123.") and stands_in("123", "**123**")
    assert not stands_in("123", "1234") and not stands_in("123", "x123") and not stands_in("1", "")
    assert stands_in("a.b", "a.b") and not stands_in("a.b", "axb")


def test_prompts_follow_from_their_cell_alone(tokenizer):
    def prompts(**changes):
        cell = NeedleCell(**{"kind": "single", "depth": 0.5, "samples": 3, "seed": 0, **changes})
        return [needle.prompt for needle in cell.needles(tokenizer)]

    once = prompts(length=50)
    prompts(length=60)
    assert once == prompts(length=50) == prompts(length=50, samples=4)[:3]
    assert all(len(prompt) == 50 for prompt in once)
    assert once != prompts(length=50, seed=1)
    assert once[0] != once[1]
    assert prompts(length=50, depth=1) == prompts(length=50, depth=1.0)


@pytest.mark.parametrize("step", [1, 7, 50, 1000])
def test_a_batch_is_answered_as_its_members_are_alone(step, monkeypatch):
    model = tiny.model()
    prompts = tiny.tokens(31, batch=5).tolist()
    alone = [tiny.greedy(model, prompt, 6)[0] for prompt in prompts]
    end = alone[2][3]
    expected = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in alone]
    read = []
    assert forward.answer(model, prompts, 6, {end}, step, read.append) == expected
    assert sum(read) == 5 * 31
    assert max(read) <= max(step, 5)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts_are_answered(length):
    model = tiny.model()
    prompt = tiny.tokens(length)[0].tolist()
    found = forward.answer(model, [prompt], 4, set(), 8, lambda tokens: None)
    assert found == [tiny.greedy(model, prompt, 4)[0]]


def test_batches_hold_as_many_tokens_as_they_may(monkeypatch):
    monkeypatch.setattr(forward, "BATCH_TOKENS", 100)
    assert [len(batch) for batch in forward.batches(range(7), 30)] == [3, 3, 1]
    assert [len(batch) for batch in forward.batches(range(2), 500)] == [1, 1]


@tiny.exact_peak
def test_reading_a_prompt_computes_no_logits():
    vocabulary, length = 100_000, 1024
    model = tiny.model(vocab_size=vocabulary)
    prompt = tiny.tokens(length)[0].tolist()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    forward.answer(model, [prompt], 1, set(), length, lambda tokens: None)
    assert mx.get_peak_memory() - before < 0.2 * 4 * vocabulary * length


def text_of(tokens, start=()) -> Text:
    return Text("text", "digest", list(tokens), list(start))


def vocabulary_of(size: int):
    return SimpleNamespace(get_vocab=lambda: dict.fromkeys(range(size)))


@pytest.mark.parametrize("size", [2, 61, 1000])
def test_perplexity_of_equal_chances_is_the_vocabulary(size):
    class Uniform:
        def make_cache(self):
            return []

        def __call__(self, inputs, cache):
            return mx.full((*inputs.shape, size), 3.0)

    text = text_of([i % size for i in range(100)])
    for stride in (4, 16):
        cell = TextCell("digest", 16, stride)
        scored = score_text(Uniform(), vocabulary_of(size), text, cell, 5)
        assert scored["perplexity"] == pytest.approx(size, rel=1e-5)
        assert scored["loss"] == pytest.approx(math.log(size), rel=1e-6)


class ByToken:
    """A model whose chances are the same everywhere: they tell which targets were counted."""

    def __init__(self, logits):
        self.logits = mx.array(logits)

    def make_cache(self):
        return []

    def __call__(self, inputs, cache):
        return mx.broadcast_to(self.logits, (*inputs.shape, self.logits.size))


@pytest.mark.parametrize(
    ("start", "length", "stride", "windows", "counted"),
    [
        # Of 100 tokens the first has no prediction where no start token goes before it.
        ([], 10, 10, None, range(1, 91)),
        ([1], 10, 10, None, range(100)),
        ([], 10, 3, None, range(1, 98)),
        ([1], 10, 3, None, range(100)),
        ([], 99, 99, None, range(1, 100)),
        ([1], 100, 1, None, range(100)),
        ([], 10, 10, 2, range(1, 21)),
        ([], 10, 1, 4, range(1, 14)),
    ],
)
def test_each_token_counts_once(start, length, stride, windows, counted):
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=100), rng.permutation(100).tolist()
    losses = np.log(np.exp(logits).sum()) - logits[tokens]
    cell = TextCell("digest", length, stride, windows)
    scored = score_text(
        ByToken(logits.tolist()), vocabulary_of(100), text_of(tokens, start), cell, 4
    )
    assert scored["tokens"] == len(counted)
    assert scored["loss"] == pytest.approx(losses[counted].mean(), rel=1e-6)


@pytest.mark.parametrize("step", [1, 6, 512])
@pytest.mark.parametrize("stride", [24, 9])
def test_perplexity_of_a_random_model_is_numpys(step, stride):
    tokens = tiny.tokens(120)[0].tolist()
    for model in (tiny.model(), dense_model()):
        cell = TextCell("digest", 24, stride)
        vocabulary = vocabulary_of(tiny.VOCABULARY)
        scored = score_text(model, vocabulary, text_of(tokens), cell, step)
        expected = numpy_loss(model, tokens, 24, stride)
        assert scored["loss"] == pytest.approx(expected, rel=2e-6)
        assert scored["perplexity"] == pytest.approx(math.exp(expected), rel=2e-5)


def dense_model():
    mx.random.seed(0)
    settings = tiny.config(model_type="qwen3", hidden_size=32)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(settings))
    model.lm_head.weight *= 8
    return model


def numpy_loss(model, tokens, length, stride) -> float:
    losses = []
    for start in range(0, len(tokens) - length, stride):
        window = tokens[start : start + length + 1]
        logits = np.array(model(mx.array([window[:-1]])))[0].astype(np.float64)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        of_window = -np.log(chances[np.arange(length), window[1:]])
        losses += list(of_window if start == 0 else of_window[-stride:])
    return float(np.mean(losses))


def test_a_step_has_no_more_logits_than_it_may(monkeypatch):
    model = Fake(lambda tokens: 0, vocabulary=100)
    monkeypatch.setattr(perplexity, "MAX_LOGITS", 1000)
    cell = TextCell("digest", 32, 8)
    read = []
    score_text(model, vocabulary_of(100), text_of(range(64)), cell, 512, read.append)
    assert max(math.prod(shape) for shape in model.shapes) <= 10
    assert sum(read) == 4 * 32


def test_logits_that_are_no_numbers_are_told():
    with pytest.raises(ValueError, match="logits that are not finite at length 4"):
        score_text(
            ByToken([float("nan")] * 5),
            vocabulary_of(5),
            text_of([1] * 9),
            TextCell("digest", 4, 4),
            8,
        )


def test_a_perplexity_beyond_floats_is_none():
    cell = TextCell("digest", 4, 4)
    scored = score_text(ByToken([0.0, 9000.0]), vocabulary_of(2), text_of([0] * 9), cell, 8)
    assert scored["loss"] == pytest.approx(9000) and scored["perplexity"] is None
