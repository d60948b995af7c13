"""What the command refuses, and what it leaves behind then."""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import QWEN3, leftovers, read_config, write_checkpoint, write_qwen3
from select_runs import CONTEXT, PROBE, refusal, select
from selection_models import built_weights, write_built
from tiny import write_tokenizer

from mlx_hydra.select import measure


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_built(tmp_path_factory.mktemp("models") / "built")


def leave_unfinished(model, tmp_path, monkeypatch, *options) -> Path:
    """The file of a run that ended when all was scored."""
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(measure, "halves_agree", lambda *_: 1 / 0)
        select(model, tmp_path / "heads.json", *CONTEXT, *options)
    return tmp_path / ".heads.json.mlx_hydra-partial"


def test_another_model_does_not_go_on(model, tmp_path, monkeypatch, capsys):
    leave_unfinished(model, tmp_path, monkeypatch)
    other = write_built(tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = 1.5 * weights["model.norm.weight"]
    write_checkpoint(other, read_config(other), weights)
    error = refusal(capsys, "--model", other, "-o", tmp_path / "heads.json", *CONTEXT)
    assert "other settings: model was" in error


def test_another_tokenizer_does_not_go_on(model, tmp_path, monkeypatch, capsys):
    leave_unfinished(model, tmp_path, monkeypatch)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    with open(other / "tokenizer.json", "a") as file:
        file.write("\n")
    error = refusal(capsys, "--model", other, "-o", tmp_path / "heads.json", *CONTEXT)
    assert "other settings: tokenizer was" in error
    # A copy that is the same goes on.
    shutil.copy(model / "tokenizer.json", other)
    monkeypatch.setattr(measure, "score_pair", None)
    select(other, tmp_path / "heads.json", *CONTEXT)


@pytest.mark.parametrize("method", ["causal", "attention"])
def test_a_damaged_unfinished_run_is_told(model, tmp_path, monkeypatch, capsys, method):
    unfinished = leave_unfinished(model, tmp_path, monkeypatch, "--method", method)
    content = json.loads(unfinished.read_text())
    whole = content["results"]["1"]
    table = "receiver" if method == "causal" else "scores"
    tables = [[1]], "x", None, [[np.nan] * 4] * 2
    damaged = [{}, [], None, *(whole | {table: value} for value in tables)]
    if method == "causal":
        changes = {"clean": "1"}, {"macs": []}, {"more": 1}
        damaged += [{table: whole[table]}, *(whole | change for change in changes)]
    for result in damaged:
        content["results"]["1"] = result
        unfinished.write_text(json.dumps(content))
        arguments = ("--model", model, "-o", tmp_path / "heads.json", *CONTEXT, "--method", method)
        assert "what it has of probe 1 is damaged: remove it" in refusal(capsys, *arguments)


def test_an_unfinished_run_that_is_none(model, tmp_path, capsys):
    unfinished = tmp_path / ".heads.json.mlx_hydra-partial"
    wrong = '{"settings": {}, "results": []}', '{"settings": 5, "results": {}}'
    for text in ("{", "[]", "{}", *wrong):
        unfinished.write_text(text)
        error = refusal(capsys, "--model", model, "-o", tmp_path / "heads.json", *CONTEXT)
        assert "is not an unfinished run: remove it" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distractor": "w4"}, "line 2: answer has 2 tokens and distractor 1: expected as many"),
        ({"prompt": "w1"}, "line 2: prompt has 1 tokens and counterfactual_prompt 4: expected as"),
        ({"answer": None}, "line 2: answer=None: expected a text"),
        ({"answer": ""}, "line 2: answer='': expected a text"),
        ({"distractor": "w2 w3"}, "line 2: answer and distractor are the same"),
        ({"counterfactual_prompt": "w1 w2 w3 w1"}, "prompt and counterfactual_prompt are the same"),
        ({"capability": 3}, "line 2: capability=3: expected a text"),
        ({"prompt": "w1 \ud800 w3"}, r"line 2: prompt has '\ud800', half of a character, at 3: "),
        ({"capability": "\udfff"}, r"line 2: capability has '\udfff', half of a character, at 0: "),
    ],
)
def test_probes_that_are_refused(model, tmp_path, capsys, change, message):
    probes = tmp_path / "p.jsonl"
    probes.write_text(f"{json.dumps(PROBE)}\n{json.dumps(PROBE | change)}\n")
    error = refusal(capsys, "--model", model, "-o", tmp_path / "heads.json", "--probes", probes)
    assert message in error
    assert leftovers(tmp_path, "p.jsonl") == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it holds no probe"),
        (b"\n \n", "it holds no probe"),
        (b"\xff\xfe", "not UTF-8 text (byte 0)"),
        (b"{", "line 1: not JSON"),
        (b"[1]", "line 1: expected an object with prompt, answer, counterfactual_prompt, distr"),
        (None, "No such file"),
    ],
)
def test_files_of_probes_that_are_refused(model, tmp_path, capsys, content, message):
    probes = tmp_path / "p.jsonl"
    if content is not None:
        probes.write_bytes(content)
    arguments = ("--model", model, "-o", tmp_path / "heads.json", "--probes", probes)
    assert message in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "best"], "invalid choice: 'best'"),
        (["--full-ratio", 0], "--full-ratio 0.0: expected a number over 0 and up to 1"),
        (["--full-ratio", 1.5], "--full-ratio 1.5: expected a number over 0 and up to 1"),
        (["--min-per-layer", 9], "--min-per-layer 9: expected a number from 0 to 4"),
        (["--min-per-layer", 2], "2 layers need 4 heads in all, --full-ratio 0.25 keeps 2"),
        (["--pairs", 0], "--pairs 0: expected a number from 1 up"),
        (["--seed", -1, "--method", "random"], "--seed -1: expected a number from 0 up"),
        (["--seed", -2, "--knockout", "k.csv"], "--seed -2: expected a number from 0 up"),
        (["--scores", "a", "--seed", 3], "--seed does not go with --scores, whose method and seed"),
        (["--context", -1], "--context -1: expected a number from 1 up"),
        (["--context", 9], "--context 9: too short for multi_key needles, which need 13 tokens"),
        (["--context", 9000], "A probe has 9001 tokens with its answer, the model takes 4096"),
        (["--method", "fixed", "--pairs", 3], "--pairs does not go with --method fixed"),
        (["--method", "random", "--knockout", "k.csv"], "--knockout does not go with --method ra"),
        (["--method", "layerwise", "--min-per-layer", 1], "does not go with --method layerwise"),
        (["--probes", "p.jsonl", "--context", 9], "--context does not go with --probes of a file"),
        (["--scores", "a", "--method", "causal"], "--method does not go with --scores"),
        (["--scores", "a", "--pairs", 3], "--pairs does not go with --scores"),
        (["--knockout", "k.txt"], "--knockout k.txt: expected a name in .csv or .json"),
        (["--plot", "nowhere/a.png"], "--plot nowhere/a.png: no such folder: nowhere"),
        (["--scores", "missing.json"], "--scores missing.json: No such file"),
    ],
)
def test_options_that_are_refused(model, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "--model", model, *options)
    assert leftovers(tmp_path) == set()


def test_pictures_that_are_refused(model, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    error = refusal(capsys, "--model", model, "--plot", "a.bmp5")
    assert "--plot a.bmp5: 'bmp5' is no kind of picture; expected .png or .pdf" in error
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refusal(capsys, "--model", model, "--plot", "a.png")
    assert "--plot a.png: pictures need matplotlib: pip install 'mlx-hydra[plots]'" in error


def scores_by(made_by: str) -> str:
    return f'{{"scores": [[1, 2, 3, 4], [1, 2, 3, 4]], "made_by": {made_by}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "it holds no scores"),
        ('{"scores": null}', "it holds no scores"),
        ('{"scores": [["a"]]}', "its scores are no table of numbers"),
        (
            '{"scores": [["1", "2", "3", "4"], ["1", "2", "3", "4"]]}',
            "its scores are no table of n",
        ),
        ('{"scores": [[1, 2, 3, 4], [1, 2, 3]]}', "its scores are no table of numbers"),
        (f'{{"scores": [[0.5, 1{"0" * 400}]]}}', "its scores are no table of numbers"),
        (scores_by("5"), "made_by=5: expected an object"),
        (scores_by('{"seed": "1"}'), "its made_by has seed='1': expected a number from 0 up"),
        (scores_by('{"context": 0}'), "its made_by has context=0: expected a number from 1 up"),
        (scores_by('{"pairs": true}'), "its made_by has pairs=True: expected a number from 1 up"),
        (
            '{"scores": [[1, 2]]}',
            "made for another model: scores of shape (1, 2), this model has 2",
        ),
        ('{"scores": [[1, 2, 3, NaN], [1, 2, 3, 4]]}', "its scores are not all finite"),
    ],
)
def test_scores_that_are_refused(model, tmp_path, capsys, text, message):
    scores = tmp_path / "scores.json"
    scores.write_text(text)
    arguments = ("--model", model, "-o", tmp_path / "heads.json", "--scores", scores)
    assert message in refusal(capsys, *arguments)


def test_an_output_that_is_there_stays(model, tmp_path, capsys):
    output = tmp_path / "heads.json"
    output.write_text("mine")
    assert "is there: remove it or choose" in refusal(capsys, "--model", model, "-o", output)
    assert output.read_text() == "mine"


def test_two_runs_of_an_output_at_once_are_refused(model, tmp_path, capsys, monkeypatch):
    output, score, errors = tmp_path / "heads.json", measure.score_pair, []

    def run_again(*arguments):
        monkeypatch.setattr(measure, "score_pair", score)
        errors.append(refusal(capsys, "--model", model, "-o", output, "--method", "attention"))
        select(model, tmp_path / "other.json", *CONTEXT)
        return score(*arguments)

    monkeypatch.setattr(measure, "score_pair", run_again)
    assert select(model, output, *CONTEXT)["method"] == "causal"
    assert errors == [f"error: {output} is being written by another run: wait for it.\n"]
    assert leftovers(tmp_path, "heads.json", "other.json") == set()


def test_an_output_that_appears_meanwhile_stays(model, tmp_path, capsys, monkeypatch):
    output, score = tmp_path / "heads.json", measure.score_pair
    monkeypatch.setattr(measure, "score_pair", lambda *a: output.write_text("mine") and score(*a))
    arguments = ("--model", model, "-o", output, *CONTEXT, "--knockout", tmp_path / "k.csv")
    assert "is there: remove it or choose" in refusal(capsys, *arguments)
    assert output.read_text() == "mine"
    # What was scored is not lost.
    assert leftovers(tmp_path, "heads.json") == {".heads.json.mlx_hydra-partial"}
    output.unlink()
    monkeypatch.setattr(measure, "score_pair", None)
    assert select(model, output, *CONTEXT)["method"] == "causal"


def test_models_that_are_refused(tmp_path, capsys):
    def error(**changes):
        write_checkpoint(tmp_path, {**QWEN3, **changes}, {})
        return refusal(capsys, "--model", tmp_path, "--method", "fixed", "-o", tmp_path / "h.json")

    assert "model_type 'llama': expected 'qwen3'" in error(model_type="llama")
    assert "num_hidden_layers=None: expected a number over 0" in error(num_hidden_layers=None)
    assert "6 heads cannot share 4 KV heads evenly" in error(num_key_value_heads=4)
    missing = refusal(capsys, "--model", tmp_path / "no", "-o", tmp_path / "h.json")
    assert "no such folder" in missing


def test_tokenizers_that_are_refused(tmp_path, capsys):
    arguments = ("--model", tmp_path, "-o", tmp_path / "h.json", *CONTEXT)
    write_qwen3(tmp_path, vocab_size=40)
    write_tokenizer(tmp_path)
    error = refusal(capsys, *arguments)
    assert "the model knows 40: it is another model's" in error
    assert not list(tmp_path.glob("*h.json*"))
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert "The tokenizer cannot write needles" in refusal(capsys, *arguments)


def test_weights_that_are_not_numbers(tmp_path, capsys):
    weights = {n: mx.array(x.astype(np.float32)) for n, x in built_weights().items()}
    folder = write_built(tmp_path / "model")
    weights["lm_head.weight"] = weights["lm_head.weight"] * mx.nan
    write_checkpoint(folder, read_config(folder), weights)
    error = refusal(capsys, "--model", folder, "-o", tmp_path / "h.json", *CONTEXT)
    assert "is nan (nan in its counterfactual): expected finite logits" in error
    assert leftovers(tmp_path, "model") == set()


def test_a_model_that_does_not_answer(tmp_path, capsys):
    folder = write_built(tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.1.self_attn.o_proj.weight"] *= 0
    write_checkpoint(folder, read_config(folder), weights)
    error = refusal(capsys, "--model", folder, "-o", tmp_path / "h.json", *CONTEXT)
    assert "The model answers none of the 4 probes" in error


def test_a_full_disk_leaves_no_half_file(model, tmp_path, capsys, monkeypatch):
    from mlx_hydra.select import state

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "replace", full)
    arguments = ("--model", model, "-o", tmp_path / "h.json", "--method", "fixed")
    assert "h.json: No space left on device" in refusal(capsys, *arguments)
    assert leftovers(tmp_path) == set()
    if "matplotlib" in sys.modules:
        assert "a.png: No space left" in refusal(capsys, *arguments, "--plot", tmp_path / "a.png")
        assert leftovers(tmp_path) == set()
