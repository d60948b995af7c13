"""The prompt cache: what comes back is what was saved, and only for what it was made from."""

import json
import re
import resource
import signal
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_hydra.documents import prompt_cache
from mlx_hydra.documents.prompt_cache import Origin, cache_path, load_cache, save_cache
from mlx_hydra.generate import new_cache

TOKENS = tiny.tokens(40)[0].tolist()
ORIGIN = Origin(TOKENS, "a model", None)
WIDE = tiny.config(head_dim=32)


@pytest.fixture(scope="module")
def model():
    return tiny.model(head_dim=32)


def digested(model, kv_bits=None):
    cache = new_cache(model, WIDE, kv_bits)
    model(mx.array(TOKENS)[None], cache=cache)
    return cache


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "report.safetensors"
    save_cache(path, digested(model), ORIGIN)
    return path


@pytest.mark.parametrize("kv_bits", [None, 4, 8])
def test_a_cache_comes_back_and_goes_on(model, tmp_path, kv_bits):
    path, origin = tmp_path / "report.safetensors", Origin(TOKENS, "a model", kv_bits)
    cache = digested(model, kv_bits)
    save_cache(path, cache, origin)
    back = load_cache(path, origin)
    assert [type(c).__name__ for c in back] == [type(c).__name__ for c in cache]
    # Enough tokens for the keys to outgrow what was saved.
    new = tiny.tokens(300, seed=1)
    assert tiny.distance(model(new, cache=cache), model(new, cache=back)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.safetensors"]


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        (Origin(TOKENS, "another model", None), "made by another model"),
        (Origin(TOKENS, "a model", 8), "made without --kv-bits"),
        (Origin([*TOKENS[:7], 60], "a model", None), "alike up to token 7;"),
        (Origin(TOKENS[:-1], "a model", None), "40 tokens there, 39 here, alike up to token 39"),
        (Origin([*TOKENS, 5], "a model", None), "another document"),
    ],
)
def test_a_cache_of_something_else_is_refused(saved, origin, told):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=r"report\.safetensors") as error:
        load_cache(saved, origin)
    assert told in str(error.value)
    assert saved.read_bytes() == before


def test_other_kv_bits_are_named(model, tmp_path):
    path = tmp_path / "report.safetensors"
    save_cache(path, digested(model, 8), Origin(TOKENS, "a model", 8))
    with pytest.raises(ValueError, match="made with --kv-bits 8"):
        load_cache(path, Origin(TOKENS, "a model", 4))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_cache_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"report\.safetensors"):
        load_cache(saved, ORIGIN)


def test_a_flipped_bit_is_found(saved):
    data = bytearray(saved.read_bytes())
    data[-100] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its checksum does not fit"):
        load_cache(saved, ORIGIN)


def test_a_flipped_bit_of_a_number_is_found(model, tmp_path):
    path, origin = tmp_path / "report.safetensors", Origin(TOKENS, "a model", 8)
    save_cache(path, digested(model, 8), origin)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    # mlx-lm before 0.32 keeps them as text, in the header.
    numbers = [e["data_offsets"] for e in header.values() if e.get("shape") == []]
    texts = [(m.start(), m.end()) for m in re.finditer(rb'"40"', data[8 : 8 + size])]
    places = [8 + size + start for start, _ in numbers] + [8 + end - 2 for _, end in texts]
    assert places
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged: its checksum does not fit"):
            load_cache(path, origin)


def test_two_runs_save_to_the_same_file(model, saved, monkeypatch):
    read_header = prompt_cache.read_header

    def meanwhile(path):
        monkeypatch.undo()
        save_cache(saved, digested(model), ORIGIN)
        return read_header(path)

    monkeypatch.setattr(prompt_cache, "read_header", meanwhile)
    save_cache(saved, digested(model), ORIGIN)
    load_cache(saved, ORIGIN)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_other_files_are_refused(model, tmp_path, saved, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(weights), dict(tree_flatten(model.parameters())))
    foreign = tmp_path / "foreign.safetensors"
    save_prompt_cache(str(foreign), digested(model), {"model": "x"})
    for path in (weights, foreign):
        with pytest.raises(ValueError, match="not a prompt cache of mlx_hydra"):
            load_cache(path, ORIGIN)
    monkeypatch.setattr(prompt_cache, "FORMAT", "mlx_hydra 3")
    with pytest.raises(ValueError, match="has the format 'mlx_hydra 2'"):
        load_cache(saved, ORIGIN)


def test_the_file_records_its_tokens(saved):
    _, metadata = load_prompt_cache(str(saved), return_metadata=True)
    assert json.loads(metadata["tokens"]) == TOKENS


def test_a_full_disk_leaves_what_was_there(model, saved):
    before = saved.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            save_cache(saved, digested(model), ORIGIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_file_system_that_loses_the_end_is_noticed(model, tmp_path, monkeypatch):
    def save_half(name, *rest):
        save_prompt_cache(name, *rest)
        Path(name).write_bytes(Path(name).read_bytes()[:2000])

    monkeypatch.setattr(prompt_cache, "save_prompt_cache", save_half)
    with pytest.raises(OSError, match="cannot be written"):
        save_cache(tmp_path / "report.safetensors", digested(model), ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_the_path_is_checked_before_anything_is_read(tmp_path):
    assert cache_path(str(tmp_path / "a")) == tmp_path / "a.safetensors"
    assert cache_path(str(tmp_path / "v1.5")) == tmp_path / "v1.5.safetensors"
    with pytest.raises(ValueError, match="no directory"):
        cache_path(str(tmp_path / "missing" / "a.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        cache_path(str(tmp_path / "folder"))
    for name in ("", ".", "..", "/"):
        with pytest.raises(ValueError, match="is a directory"):
            cache_path(name)
