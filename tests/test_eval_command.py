"""The eval command: results that are kept and taken up again, tables, pictures, refusals."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from checkpoint_files import write_qwen3
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_hydra.eval import command, main, needle_grid
from mlx_hydra.eval import plot as plots
from mlx_hydra.plan import in_bytes

NEEDLES = ["--needles", "single", "multi_query", "--lengths", 40, 64, "--depths", 0, 1]
SAMPLES = ["--samples", 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tiny.model(), tiny.config(), tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """100 words of a token each."""
    words = np.random.default_rng(0).integers(0, 50, 100)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"w{i}" for i in words))
    return file


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(needle_grid, "EXTRA_TOKENS", 2)


def run(capsys, *options) -> dict:
    capsys.readouterr()
    main([*map(str, options), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys, *options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, options)])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert error.startswith("error: ") and "\n" not in error
    return error


def timeless(results: dict) -> dict:
    for name in ("needles", "perplexity"):
        for cell in results[name]:
            assert cell.pop("seconds") >= 0
    return results


def test_the_grid_is_whole_and_the_same_each_time(model, text, capsys, tmp_path):
    file = tmp_path / "results.json"
    options = ["--model", model, *NEEDLES, *SAMPLES, "--perplexity", text]
    results = run(capsys, *options, "-o", file)
    assert json.loads(file.read_text()) == results
    places = [(c["kind"], c["length"], c["depth"]) for c in results["needles"]]
    assert places == [
        (kind, length, depth)
        for kind in ("single", "multi_query")
        for length in (40, 64)
        for depth in (0, 1)
    ]
    assert [c["length"] for c in results["perplexity"]] == [40, 64]
    assert [c["tokens"] for c in results["perplexity"]] == [80, 64]
    assert timeless(run(capsys, *options)) == timeless(results)

    other = timeless(run(capsys, *options, "--seed", 1))
    assert other["perplexity"] == results["perplexity"]
    for one, another in zip(results["needles"], other["needles"]):
        assert one["example"]["expected"] != another["example"]["expected"]


def test_tables_hold_the_scores(model, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    scores = iter([(0.5, 0.25), (1, 1), (0, 0), (0.75, 0.5)])

    def score(model, tokenizer, cell, step, advance):
        found, exact = next(scores)
        return {**vars(cell), "found": found, "exact": exact, "example": {}}

    monkeypatch.setattr(command, "score_needles", score)
    options = ["--needles", "single", "--lengths", "40", "64", "--depths", "0", "1"]
    main(["--model", str(model), *options, "--perplexity", str(text)])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert "single: values found / exact answers" in out
    assert ["0", "50% / 25%", "0% / 0%"] in rows and ["1", "100% / 100%", "75% / 50%"] in rows
    assert "40 tokens" in out and "64 tokens" in out
    assert any(row[:3] == ["40", "40", "80"] for row in rows)


def test_an_interrupted_run_goes_on_where_it_was(model, text, capsys, monkeypatch, tmp_path):
    options = ["--model", model, *NEEDLES, *SAMPLES, "--perplexity", text]
    whole = timeless(run(capsys, *options))
    file = tmp_path / "results.json"
    score, scored = command.score_needles, []

    def interrupted(model, tokenizer, cell, *rest):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(cell)
        return score(model, tokenizer, cell, *rest)

    monkeypatch.setattr(command, "score_needles", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([*map(str, options), "-o", str(file)])
    assert ended.value.code == 130
    assert len(json.loads(file.read_text())["needles"]) == 3

    monkeypatch.setattr(command, "score_needles", lambda *a: scored.append(a[2]) or score(*a))
    assert timeless(run(capsys, *options, "-o", file)) == whole
    assert len(scored) == len(set(scored)) == 8
    capsys.readouterr()

    def unexpected(*args):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(command, "load_model", unexpected)
    assert timeless(run(capsys, *options, "-o", file)) == whole
    (tmp_path / "results.json").rename(tmp_path / "copy.json")
    main([*map(str, options[:-2]), "-o", str(tmp_path / "copy.json")])
    out, error = capsys.readouterr()
    assert "8 of 8 cells are in" in error and "perplexity" not in out


def test_more_cells_join_a_file(model, capsys, tmp_path):
    file = tmp_path / "results.json"
    few = ["--model", model, "--needles", "single", "--depths", 0.5, "-o", file]
    assert len(run(capsys, *few, "--lengths", 40, *SAMPLES)["needles"]) == 1
    more = run(capsys, *few, "--lengths", 30, 30, 40, *SAMPLES)
    assert [c["length"] for c in more["needles"]] == [40, 30]
    assert len(run(capsys, *few, "--lengths", 40, "--samples", 3)["needles"]) == 1
    assert len(json.loads(file.read_text())["needles"]) == 3


def test_two_runs_of_a_file_at_once_are_refused(model, capsys, monkeypatch, tmp_path):
    file, refused = tmp_path / "results.json", []
    options = ["--model", model, "--needles", "single", "--lengths", 40, "--depths", 0, *SAMPLES]
    score = command.score_needles

    def run_again(*args):
        monkeypatch.setattr(command, "score_needles", score)
        refused.append(refusal(capsys, *options, "-o", file))
        run(capsys, *options, "-o", tmp_path / "other.json")
        return score(*args)

    monkeypatch.setattr(command, "score_needles", run_again)
    results = run(capsys, *options, "-o", file)
    assert refused == [f"error: {file} is being written by another run: wait for it."]
    assert json.loads(file.read_text()) == results
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "other.json"}
    # What a killed run leaves stops nobody.
    (tmp_path / ".results.json.mlx_hydra-lock").touch()
    assert run(capsys, *options, "-o", file) == results
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "other.json"}


def test_results_of_another_model_are_not_mixed(model, capsys, tmp_path):
    file = tmp_path / "results.json"
    options = ["--needles", "single", "--lengths", 40, "--depths", 0, *SAMPLES, "-o", file]
    run(capsys, "--model", model, *options)
    before = file.read_bytes()
    other = tiny.save(tiny.model(1), tiny.config(), tmp_path / "other")
    assert "is of another model" in refusal(capsys, "--model", other, *options)
    assert file.read_bytes() == before

    def damaged(**changes) -> bytes:
        return json.dumps({**json.loads(before), **changes}).encode()

    for content, message in (
        (b"{", "is there and not JSON"),
        (b"[]", "has the format None"),
        (b'{"format": "mlx_hydra.eval 0"}', "has the format 'mlx_hydra.eval 0'"),
        (b'{"format": "mlx_hydra.eval 1"}', "its 'fingerprint' is missing or damaged"),
        (damaged(needles=None), "its 'needles' is missing or damaged"),
        (damaged(needles=["x"]), "its 'needles' is missing or damaged"),
        (damaged(needles=[{"kind": "single"}]), "its 'needles' is missing or damaged"),
        (damaged(perplexity={}), "its 'perplexity' is missing or damaged"),
    ):
        file.write_bytes(content)
        assert message in refusal(capsys, "--model", model, *options)
        assert file.read_bytes() == content


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_results_of_another_tokenizer_are_not_mixed(model, capsys, tmp_path, name):
    folder, file = shutil.copytree(model, tmp_path / "copy"), tmp_path / "results.json"
    options = ["--needles", "single", "--lengths", 40, "--depths", 0, *SAMPLES, "-o", file]
    results = run(capsys, "--model", model, *options)
    assert run(capsys, "--model", folder, *options)["needles"] == results["needles"]
    text = (folder / name).read_text()
    if name == "tokenizer.json":
        text += "\n"
    else:
        content = json.loads(text)
        # It pads nothing here, and changes no token.
        (folder / name).write_text(json.dumps({**content, "padding_side": "left"}))
        run(capsys, "--model", folder, *options)
        text = json.dumps({**content, "add_prefix_space": True})
    (folder / name).write_text(text)
    assert "is of another tokenizer; name" in refusal(capsys, "--model", folder, *options)


def test_whole_results_are_shown_from_where_nothing_may_be_written(
    model, capsys, monkeypatch, tmp_path
):
    file = tmp_path / "results.json"
    options = ["--needles", "single", "--lengths", 40, "--depths", 0, *SAMPLES, "-o", file]
    results = run(capsys, "--model", model, *options)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Path, "touch", lambda path: pytest.fail("written"))
    assert run(capsys, "--model", model, *options) == results


def test_a_model_that_is_not_finite_is_refused(capsys, tmp_path):
    model = tiny.model()
    model.model.norm.weight = model.model.norm.weight * mx.nan
    folder = tiny.save(model, tiny.config(), tmp_path / "model")
    options = ["--model", folder, "--needles", "single", "--lengths", 40, "--depths", 0, *SAMPLES]
    message = refusal(capsys, *options, "-o", tmp_path / "results.json")
    assert "--needles: the model gives logits that are not finite at length 40." in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(model, capsys, monkeypatch, tmp_path, call):
    file = tmp_path / "results.json"
    options = ["--model", model, "--needles", "single", "--depths", 0, *SAMPLES, "-o", file]
    run(capsys, *options, "--lengths", 40)
    before = file.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    message = refusal(capsys, *options, "--lengths", 50)
    assert message == f"error: {file} cannot be written: No space left on device."
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_dense_models_and_adapters(capsys, tmp_path):
    folder = tmp_path / "dense"
    write_qwen3(folder)
    tiny.write_tokenizer(folder)
    options = ["--model", folder, "--needles", "single", "--lengths", 40, "--depths", 0, *SAMPLES]
    results = run(capsys, *options)
    assert results["backend"].startswith("mlx_lm on ")

    model = tiny.model()
    folder = tiny.save(model, tiny.config(), tmp_path / "hydra")
    lora = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.linear.v_proj"]}
    linear_to_lora_layers(model, -1, lora)
    weights = {
        name: mx.random.normal(x.shape)
        for name, x in tree_flatten(model.parameters())
        if "lora" in name
    }
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    mx.save_safetensors(str(adapters / "adapters.safetensors"), weights)
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora}
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    options[1] = folder
    plain, adapted = run(capsys, *options), run(capsys, *options, "--adapter-path", adapters)
    assert plain["fingerprint"] != adapted["fingerprint"]
    texts = [found["needles"][0]["example"]["text"] for found in (plain, adapted)]
    assert texts[0] != texts[1]


def test_the_picture_shows_every_cell(model, text, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "grid.png"
    options = ["--model", model, *NEEDLES, *SAMPLES, "--perplexity", text, "--plot", file]
    run(capsys, *options)
    assert file.read_bytes().startswith(b"\x89PNG")
    run(capsys, *options[:-1], tmp_path / "grid.svg")
    assert b"<svg" in (tmp_path / "grid.svg").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "grid.svg"}


def test_squares_of_the_heat_map_are_the_scores():
    figures = pytest.importorskip("matplotlib.figure")
    axes = figures.Figure().subplots()
    places = [(0, 40, 0.5, 0.5), (0, 80, 1, 0.25), (1, 80, 0.25, 0.25)]
    cells = [
        {"depth": depth, "length": length, "found": found, "exact": exact}
        for depth, length, found, exact in places
    ]
    plots.draw_grid(axes, "single", cells)
    shown = np.array(axes.images[0].get_array().filled(np.nan))
    assert np.array_equal(shown, [[0.5, 1], [np.nan, 0.25]], equal_nan=True)
    texts = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}
    assert texts == {(0, 0): "50%", (1, 0): "100%\nexact 25%", (1, 1): "25%"}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["40", "80"]


def test_the_curve_is_the_perplexities():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    cells = [
        {"length": length, "perplexity": value, "file": "book.txt"}
        for length, value in ((80, None), (40, 3.5), (60, 2.5))
    ]
    plots.draw_perplexity(axes, cells)
    x, y = axes.lines[0].get_data()
    assert list(x) == [40, 60, 80] and list(y)[:2] == [3.5, 2.5]
    assert axes.get_title() == "perplexity of book.txt"


def test_wrong_options_are_told_in_a_line(model, text, capsys, tmp_path, monkeypatch):
    def options(**changes):
        given = {"model": model, "needles": "single", "lengths": 40, "samples": 2, **changes}
        pairs = ((f"--{name}", value) for name, value in given.items() if value is not None)
        return [word for pair in pairs for word in pair]

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("sch\xf6n".encode("latin-1"))
    for changes, message in (
        ({"model": tmp_path / "none"}, "none: no such folder"),
        ({"model": tmp_path}, "is not a model folder: it has no config.json"),
        ({"needles": None}, "Nothing to do: give --needles (single, multi_key"),
        ({"needles": "multikey"}, "--needles multikey: not a kind; the nearest is 'multi_key'"),
        ({"lengths": 0}, "--lengths=0: expected 1 or more"),
        ({"lengths": 2}, "length=2: too short for single needles, which need 4 tokens"),
        ({"depths": 1.5}, "--depths=1.5: expected a number from 0 to 1"),
        ({"depths": "nan"}, "--depths=nan: expected a number from 0 to 1"),
        ({"samples": 0}, "--samples=0: expected 1 or more"),
        ({"windows": -1}, "--windows=-1: expected 1 or more"),
        ({"stride": 41}, "--stride 41: over --lengths 40"),
        ({"perplexity": tmp_path / "no.txt"}, "no.txt: No such file"),
        ({"perplexity": tmp_path / "empty.txt"}, "empty.txt: it is empty"),
        ({"perplexity": tmp_path / "latin.txt"}, "not UTF-8 text (byte 3 is 0xf6)"),
        ({"perplexity": text, "lengths": 100}, "has 100 tokens, a window of --lengths 100 needs"),
        ({"output": tmp_path}, "expected a file in a folder that is there"),
        ({"output": tmp_path / "no" / "r.json"}, "expected a file in a folder that is there"),
        ({"plot": tmp_path / "grid.gif"}, "expected a name that ends in .pdf, .png, .svg"),
    ):
        assert message in refusal(capsys, *options(**changes))
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    message = refusal(capsys, *options(plot=tmp_path / "grid.png"))
    assert "pip install 'mlx-hydra[plots]'" in message


def test_what_does_not_fit_is_told_before_it_starts(model, capsys, monkeypatch):
    monkeypatch.setattr(command, "machine_memory", lambda: 2_000_000)
    options = ["--model", model, "--needles", "single", "--depths", 0, "--samples", 1]
    message = refusal(capsys, *options, "--lengths", 40, 30_000)
    assert "--lengths 30000: " in message and f"{in_bytes(2_000_000)} are there" in message
    assert "the largest length that fits is " in message


def test_lengths_beyond_the_model_are_noted(model, capsys, monkeypatch):
    monkeypatch.setattr(command, "evaluate", lambda *args: None)
    options = ["--model", model, "--needles", "single", "--depths", 0, "--samples", 1]
    main([*map(str, options), "--lengths", "5000"])
    message = "5,000 tokens are more than the 4,096 that this model is made for."
    assert message in capsys.readouterr().err


def test_tokenizers_that_cannot_write_needles_are_refused(capsys, tmp_path, monkeypatch):
    folder = tiny.save(tiny.model(), tiny.config(), tmp_path / "model")
    options = ["--model", folder, "--needles", "single", "--lengths", 40]
    monkeypatch.setattr(tiny, "VOCABULARY", 20)
    tiny.write_tokenizer(folder)
    assert "The tokenizer cannot write needles" in refusal(capsys, *options)
    monkeypatch.setattr(tiny, "VOCABULARY", 500)
    tiny.write_tokenizer(folder)
    message = refusal(capsys, *options)
    assert "the model knows 61: it is another model's" in message


def test_it_runs_as_a_module(model):
    command = [sys.executable, "-m", "mlx_hydra.eval", "--model", str(model), "--needles", "x"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --needles x: not a kind; the nearest is ")
