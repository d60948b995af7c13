"""Needles with tokenizers of every kind: the demo's, Qwen's way, GPT-2's way, made-up words."""

import random

import pytest
from tiny import write_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_hydra.documents.demo import MODEL
from mlx_hydra.loading import load_tokenizer
from mlx_hydra.needles import KINDS, Needles, encode

# Qwen's: every digit is a token.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's: digits merge, also with the space before them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXT = [
    "The quiet farmer found the magic number 4821937 for the old house.",
    *(f" is: {random.Random(n).randrange(10**6, 10**7)}" for n in range(600)),
]


def byte_level(pattern: str, bos: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>"] if bos else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>" if bos else None)


def made_up_words(folder):
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "demo": load_tokenizer(MODEL, {"model_type": "hydrahead"}),
        "qwen": byte_level(QWEN),
        "gpt2": byte_level(GPT2),
        "bos": byte_level(QWEN, bos=True),
        "words": made_up_words(tmp_path_factory.mktemp("words")),
    }


NAMES = ("demo", "qwen", "gpt2", "bos", "words")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_needle_is_as_its_fields_say(tokenizers, name, kind):
    needles = Needles(tokenizers[name], seed=3)
    for depth, length in ((0, 1200), (0.4, 1201), (1, 1333)):
        needle = needles.sample(kind, length, depth)
        assert len(needle.prompt) == length
        assert len(needle.answers) == (4 if kind in ("multi_value", "multi_query") else 1)
        for tokens, (start, end), part, text in zip(
            needle.answers, needle.spans, needle.parts, needle.texts, strict=True
        ):
            assert needle.prompt[start:end] == tokens
            assert needle.answer[slice(*part)] == tokens
            assert tokenizers[name].decode(tokens).strip() == text
            wrong = needle.distractor[slice(*part)]
            assert len(wrong) == len(tokens)
            assert all(a != b for a, b in zip(tokens, wrong))
        other = needle.with_answer(needle.distractor)
        inside = {i for start, end in needle.spans for i in range(start, end)}
        assert {i for i in range(length) if other[i] != needle.prompt[i]} == inside
        assert needle.with_answer(needle.answer) == needle.prompt
        # The answer stands nowhere but in its needle.
        window = len(needle.answers[0])
        places = [i for i in range(length) if needle.prompt[i : i + window] == needle.answers[0]]
        assert places == [needle.spans[0][0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["demo", "qwen", "gpt2"])
def test_tokens_are_those_of_the_text(tokenizers, name, kind):
    """What is put together from pieces is what the tokenizer makes of the whole."""
    tokenizer = tokenizers[name]
    needle = Needles(tokenizer).sample(kind, 900, 0.5)
    tokens = needle.prompt + needle.answer
    text = tokenizer.decode(tokens)
    assert tokenizer.encode(text, add_special_tokens=False) == tokens
    assert text.endswith(
        f"provided text {'is' if len(needle.texts) == 1 else 'are'} " + ", ".join(needle.texts)
    )
    assert all(f" is: {value}." in text for value in needle.texts)
    assert "  " not in text


def test_the_asked_needle_stands_where_it_should(tokenizers):
    for name in ("qwen", "words"):
        needles = Needles(tokenizers[name])
        for kind in ("single", "multi_key"):
            starts = [needles.sample(kind, 2000, d).spans[0][0] for d in (0, 0.25, 0.5, 0.75, 1)]
            room = starts[-1] - starts[0]
            assert room > 1600
            for start, depth in zip(starts, (0, 0.25, 0.5, 0.75, 1)):
                assert abs(start - starts[0] - depth * room) < 150


def test_kinds_ask_what_they_say(tokenizers):
    tokenizer = tokenizers["qwen"]
    needles = Needles(tokenizer, 1)
    count = lambda needle: tokenizer.decode(needle.prompt).count("One of the special")  # noqa: E731
    single, multi_key, multi_value, multi_query = (needles.sample(k, 900, 0.5) for k in KINDS)
    assert [count(n) for n in (single, multi_key, multi_value, multi_query)] == [1, 4, 4, 4]
    # Values of one key come in the order of the text.
    assert multi_value.spans == sorted(multi_value.spans)
    asked = tokenizer.decode(multi_query.prompt).rpartition("numbers for ")[2]
    text = tokenizer.decode(multi_query.prompt)
    keys = asked.removesuffix(" mentioned in the provided text are ").replace(" and ", ", ")
    for key, value in zip(keys.split(", "), multi_query.texts, strict=True):
        assert f"for {key} is: {value}." in text


def test_made_up_words_end_with_the_key(tokenizers):
    needles = Needles(tokenizers["words"])
    needle = needles.sample("multi_key", 60, 0.5)
    start = needle.spans[0][0]
    assert needle.prompt[-1] == needle.prompt[start - 1]
    assert needle.prompt.count(needle.prompt[-1]) == 2


def test_seeds(tokenizers):
    def prompts(seed):
        needles = Needles(tokenizers["demo"], seed)
        return [needles.sample(kind, 700, 0.3).prompt for kind in KINDS]

    assert prompts(1) == prompts(1) != prompts(2)
    needles = Needles(tokenizers["demo"])
    assert needles.sample("single", 700, 0.3) != needles.sample("single", 700, 0.3)


def test_a_text_starts_as_the_tokenizer_starts_it(tokenizers):
    assert Needles(tokenizers["bos"]).sample("single", 600, 0).prompt[0] == 0
    qwen = tokenizers["qwen"]
    assert qwen.decode(Needles(qwen).sample("single", 600, 0).prompt).startswith("Some special")


@pytest.mark.parametrize("name", ["qwen", "words"])
def test_the_shortest_prompt_is_told_and_works(tokenizers, name):
    needles = Needles(tokenizers[name])
    with pytest.raises(ValueError, match="length=1: too short for single needles, which need") as e:
        needles.sample("single", 1, 0.5)
    least = int(str(e.value).split()[-2])
    for extra in range(60):
        needle = None
        try:
            needle = needles.sample("single", least + extra, 0.5)
        except ValueError:
            continue  # Another key, of more tokens.
        assert len(needle.prompt) == least + extra
    assert needle is not None


def test_what_is_refused(tokenizers):
    needles = Needles(tokenizers["words"])
    with pytest.raises(ValueError, match=r"kind='none': expected one of single, multi_key"):
        needles.sample("none", 60, 0.5)
    with pytest.raises(ValueError, match=r"depth=1\.1: expected a number from 0 to 1"):
        needles.sample("single", 60, 1.1)
    needle = needles.sample("single", 60, 0.5)
    with pytest.raises(ValueError, match="3 tokens: expected 2, as the answer"):
        needle.with_answer([1, 2, 3])


def test_a_tokenizer_without_words_is_refused():
    words = {w: i for i, w in enumerate(["<unk>", "<eos>", "[pad]", "a", "b", "c"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(ValueError, match=r"cannot write needles: .* and 3 plain words .* least 24"):
        Needles(tokenizer)


def test_a_tokenizer_that_drops_what_it_does_not_know_has_no_english():
    words = {f"v{i}": i for i in range(30)}
    inner = Tokenizer(models.WordLevel(words, unk_token="v0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    needle = Needles(PreTrainedTokenizerFast(tokenizer_object=inner)).sample("single", 40, 0.5)
    assert len(needle.prompt) == 40 and len(needle.answer) == 2


def test_a_line_break_that_is_no_token_of_its_own():
    class Merging:
        def encode(self, text, add_special_tokens):
            return [text[i : i + 2] for i in range(0, len(text), 2)]

    assert encode(Merging(), "abcd") == ["ab", "cd"]


def test_numbers_split_unevenly_are_refused(tokenizers, monkeypatch):
    needles = Needles(tokenizers["qwen"])
    monkeypatch.setattr(needles._writer, "_value_length", 30)
    with pytest.raises(ValueError, match="splits numbers of 7 digits too unevenly"):
        needles.sample("single", 900, 0.5)
