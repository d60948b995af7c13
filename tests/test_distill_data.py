"""Text to sequences: every token once a pass, in an order that follows from the seed alone."""

import json
import sys
import types

import numpy as np
import pytest
from tiny import VOCABULARY, write_tokenizer

from mlx_hydra.distill import data
from mlx_hydra.distill.config import Source
from mlx_hydra.distill.data import DTYPE, Sequences, documents, tokenise, tokens_file
from mlx_hydra.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder, {"model_type": "hydrahead", "eos_token_id": 1})


def tokens(sources, tokenizer, limit=10**9) -> list[int]:
    parts = list(tokenise(sources, tokenizer, VOCABULARY, limit))
    return np.concatenate(parts).tolist()


def test_a_text_is_one_document_whatever_its_pieces(tmp_path, tokenizer, monkeypatch):
    words = [f"w{n % 50}" for n in range(300)]
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + "\n".join(words), encoding="utf-8")
    expected = [*tokenizer.encode(" ".join(words), add_special_tokens=False), 1]
    assert tokens([Source(str(path))], tokenizer) == expected
    monkeypatch.setattr(data, "PIECE_BYTES", 40)
    assert len(list(next(documents(Source(str(path)))))) > 10
    assert tokens([Source(str(path))], tokenizer) == expected
    assert tokens([Source(str(path))], tokenizer, limit=17) == expected[:17]


def test_each_line_of_jsonl_is_a_document(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "w1 w2", "note": "w3"}, {"text": "w4\nw5", "note": "w6"}]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert tokens([Source(str(path))], tokenizer) == [7, 8, 1, 10, 11, 1]
    assert tokens([Source(str(path), field="note")] * 2, tokenizer) == [9, 1, 12, 1] * 2


def test_a_data_set_is_streamed(tokenizer, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"body": "w1 w2"}, {"body": "w3"}])

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = Source(dataset="owner/set", name="en", split="test", field="body")
    assert tokens([source], tokenizer) == [7, 8, 1, 9, 1]
    assert calls == [(("owner/set", "en"), {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match=r"row 0 has no text in 'text'; it has body: set field"):
        tokens([Source(dataset="owner/set")], tokenizer)

    def fail(*args, **options):
        raise ValueError("no such split\nand more")

    fake.load_dataset = fail
    with pytest.raises(ValueError, match=r"dataset owner/set cannot be loaded: no such split$"):
        tokens([source], tokenizer)


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError("connection lost"), "connection lost"),
        (KeyError("validation"), "KeyError 'validation'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_data_set_that_fails_is_named(error, reason, tmp_path, tokenizer, monkeypatch):
    def rows():
        yield {"text": "w1 w2"}
        raise error

    def fail(*args, **options):
        raise error

    fake = types.SimpleNamespace(load_dataset=lambda *args, **options: rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    known = tmp_path / "data", [Source(dataset="owner/set")], tokenizer, VOCABULARY, 100, "x"
    with pytest.raises(ValueError) as told:
        tokens_file(*known)
    assert str(told.value) == f"data: dataset owner/set breaks off at row 1: {reason}"
    fake.load_dataset = fail
    with pytest.raises(ValueError) as told:
        tokens_file(*known)
    assert str(told.value) == f"data: dataset owner/set cannot be loaded: {reason}"
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_is_no_text(tmp_path, tokenizer):
    for name in ("text", "text.jsonl"):
        (tmp_path / name).mkdir()
        source = Source(str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"^data .*/{name}: Is a directory\.$"):
            tokens_file(tmp_path / "data", [source], tokenizer, VOCABULARY, 100, "x")


def test_a_data_set_needs_its_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets: pip install datasets"):
        tokens([Source(dataset="owner/set")], tokenizer)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt: it is empty."),
        ("a.txt", b" \n\n ", "a.txt: it is empty."),
        ("a.jsonl", b"\n\n", "a.jsonl: it is empty."),
        ("a.txt", b"w1\nw2 \xe9 w3", "a.txt: not UTF-8 text (byte 6 is 0xe9)"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": "\xff"}', "not UTF-8 text (byte 25 is 0xff)"),
        ("a.jsonl", b'{"text": "w1"}\n{"text', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"body": "w1", "id": 1}', "line 1 has no text in 'text'; it has body, id"),
        ("a.jsonl", b'{"text": 5}', "line 1 has no text in 'text'"),
        ("a.jsonl", b"[1]", "line 1 has no text in 'text': set field"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "w1"}\n{"text": "w1 \\ud800"}',
            "line 2: character 3 of 'text' is half a surrogate pair (U+D800), which is no text",
        ),
        (None, None, "a.txt: No such file or directory."),
    ],
)
def test_text_that_cannot_be_read_is_named(name, content, message, tmp_path, tokenizer):
    path = tmp_path / (name or "a.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        tokens([Source(str(path))], tokenizer)
    assert message in str(error.value)


def test_another_models_tokenizer_is_told(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("w1 w50")
    with pytest.raises(ValueError, match="gives token 56, the model knows 40: it is another"):
        list(tokenise([Source(str(path))], tokenizer, 40, 100))


def test_tokens_are_made_once(tmp_path, tokenizer, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("w1 w2 w3")
    known = tmp_path / "data", [Source(str(text))], tokenizer, VOCABULARY
    path = tokens_file(*known, 100, "x")
    assert np.fromfile(path, DTYPE).tolist() == [7, 8, 9, 1]
    monkeypatch.setattr(data, "tokenise", lambda *_: pytest.fail("made again"))
    assert tokens_file(*known, 100, "x") == path
    monkeypatch.undo()
    others = {path, tokens_file(*known, 2, "x"), tokens_file(*known, 100, "y")}
    text.write_text("w1 w2 w3 w4")
    others.add(tokens_file(*known, 100, "x"))
    assert len(others) == 4
    assert set((tmp_path / "data").iterdir()) == others


def test_two_runs_make_the_same_tokens_at_once(tmp_path, tokenizer, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("w1 w2 w3")
    known = tmp_path / "data", [Source(str(text))], tokenizer, VOCABULARY, 100, "x"

    def meanwhile(*arguments):
        monkeypatch.undo()
        path = tokens_file(*known)
        assert np.fromfile(path, DTYPE).tolist() == [7, 8, 9, 1]
        yield from tokenise(*arguments)

    monkeypatch.setattr(data, "tokenise", meanwhile)
    path = tokens_file(*known)
    assert np.fromfile(path, DTYPE).tolist() == [7, 8, 9, 1]
    assert list((tmp_path / "data").iterdir()) == [path]


def test_a_disk_that_fills_up_leaves_no_tokens(tmp_path, tokenizer, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("w1 w2 w3")

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device; what was written is removed"):
        tokens_file(tmp_path / "data", [Source(str(text))], tokenizer, VOCABULARY, 100, "x")
    assert list((tmp_path / "data").iterdir()) == []


def sequences(tmp_path, count, length, seed=0) -> Sequences:
    path = tmp_path / f"{count}.tokens"
    np.arange(count, dtype=DTYPE).tofile(path)
    return Sequences(path, length, seed)


def test_a_pass_has_every_token_once_and_the_next_another_order(tmp_path):
    packed = sequences(tmp_path, 103, 10)
    assert packed.count == 10
    rows = np.array(packed.rows(range(30))).reshape(3, 10, 11)
    assert (np.diff(rows, axis=-1) == 1).all()
    orders = [turn[:, 0].tolist() for turn in rows]
    for order in orders:
        assert sorted(order) == list(range(0, 100, 10))
    assert len(set(map(tuple, orders))) == 3


def test_any_part_can_be_had_without_what_was_before(tmp_path):
    whole = np.array(sequences(tmp_path, 103, 10).rows(range(25)))
    part = np.array(sequences(tmp_path, 103, 10).rows(range(7, 13)))
    assert (whole[7:13] == part).all()
    other = np.array(sequences(tmp_path, 103, 10, seed=1).rows(range(25)))
    assert not (whole == other).all()


def test_too_little_text_is_told(tmp_path):
    with pytest.raises(ValueError, match="10 tokens in all, a sequence of length 10 needs 11"):
        sequences(tmp_path, 10, 10)
    assert sequences(tmp_path, 11, 10).count == 1
