"""The command from end to end on the hand-built model, and what it refuses."""

import csv
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import QWEN3, convert, leftovers, read_config, write_checkpoint, write_qwen3
from selection_models import BYSTANDER, PREVIOUS, RETRIEVAL, built_weights, write_built
from tiny import write_tokenizer

from mlx_hydra.config import load_heads
from mlx_hydra.needles import Needles
from mlx_hydra.select import command, main, measure
from mlx_hydra.select import probes as probes_module

CONTEXT = ("--context", 60, "--pairs", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_built(tmp_path_factory.mktemp("models") / "built")


def select(model, output, *options) -> dict:
    main(["--model", str(model), "-o", str(output), *map(str, options)])
    return json.loads(output.read_text())


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_causal_selection(model, tmp_path, capsys):
    content = select(model, tmp_path / "heads.json", *CONTEXT)
    assert load_heads(tmp_path / "heads.json", 2, 4) == [[PREVIOUS[1]], [RETRIEVAL[1]]]
    assert content["method"] == "causal"
    scores = np.array(content["scores"])
    assert scores[RETRIEVAL] == scores.max() == 1
    assert scores[BYSTANDER] < 0.01
    assert content["spearman_of_halves"] > 0.9
    assert content["made_by"]["context"] == 60
    assert content["made_by"]["full_ratio"] == 0.25
    assert set(content["capabilities"]) == {"single", "multi_key"}
    told = capsys.readouterr().out
    assert "single: 2 of 2 probes are answered" in told
    assert "Spearman correlation of the scores from two halves of the probes: " in told
    assert "2 of 8 heads stay full (25.0%); the KV cache keeps 2 of 4 KV heads" in told
    cost = content["forward_passes_per_pair"]
    assert cost["clean"] == 1
    assert cost["clean"] + cost["counterfactual"] + cost["receivers"] < 3
    # No trace of the unfinished run.
    assert leftovers(tmp_path, "heads.json") == set()


def test_the_converter_takes_the_heads(model, tmp_path):
    select(model, tmp_path / "heads.json", *CONTEXT)
    out = convert(model, tmp_path / "out", "--heads", tmp_path / "heads.json")
    assert read_config(out)["full_attention_heads"] == [[PREVIOUS[1]], [RETRIEVAL[1]]]


def test_attention_selection_and_groups(model, tmp_path):
    content = select(
        model, tmp_path / "a.json", "--method", "attention", *CONTEXT, "--min-per-layer", 0
    )
    assert content["full_attention_heads"] == [[], sorted([RETRIEVAL[1], BYSTANDER[1]])]
    grouped = select(
        model, tmp_path / "g.json", *CONTEXT, "--granularity", "group", "--full-ratio", 0.5
    )
    assert grouped["full_attention_heads"] == [[0, 1], [2, 3]]


def test_baselines_measure_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "random"
    write_qwen3(folder, num_hidden_layers=4)
    # No tokenizer is there, and no weight is read.
    monkeypatch.setattr(command, "load", None)
    fixed = select(folder, tmp_path / "f.json", "--method", "fixed", "--full-ratio", 0.33)
    assert fixed["full_attention_heads"] == [[0, 3]] * 4
    assert fixed["scores"] is None
    layers = select(folder, tmp_path / "l.json", "--method", "layerwise")
    assert layers["full_attention_heads"] == [[], [], [], [0, 1, 2, 3, 4, 5]]
    random = [
        select(folder, tmp_path / f"r{i}.json", "--method", "random", "--seed", seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    heads = [content["full_attention_heads"] for content in random]
    assert heads[0] == heads[1] != heads[2]
    assert sum(map(len, heads[0])) == 6 and all(heads[0])


def test_scores_of_an_earlier_run_choose_again(model, tmp_path, monkeypatch):
    first = select(model, tmp_path / "a.json", *CONTEXT)
    monkeypatch.setattr(command, "load", None)
    again = select(model, tmp_path / "b.json", "--scores", tmp_path / "a.json", "--full-ratio", 0.5)
    assert again["scores"] == first["scores"]
    assert again["capabilities"] == first["capabilities"]
    assert again["method"] == "causal"
    assert again["made_by"]["full_ratio"] == 0.5
    assert again["made_by"]["context"] == 60
    assert again["made_by"]["seed"] == 0
    assert sum(map(len, again["full_attention_heads"])) == 4


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch, capsys):
    expected = select(model, tmp_path / "whole.json", *CONTEXT)
    scored, score = [], measure.score_pair

    def interrupted(*arguments):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(arguments)
        return score(*arguments)

    monkeypatch.setattr(measure, "score_pair", interrupted)
    with pytest.raises(SystemExit) as stop:
        select(model, tmp_path / "heads.json", *CONTEXT)
    assert stop.value.code == 130
    unfinished = tmp_path / ".heads.json.mlx_hydra-partial"
    assert unfinished.exists() and not (tmp_path / "heads.json").exists()

    capsys.readouterr()
    arguments = ("--model", model, "-o", tmp_path / "heads.json")
    error = refusal(capsys, *arguments, "--context", 61)
    assert "holds an unfinished run with other settings: context was 60, now 61" in error
    error = refusal(capsys, *arguments, *CONTEXT, "--method", "attention")
    assert "method was 'causal', now 'attention'" in error

    scored.clear()
    monkeypatch.setattr(measure, "score_pair", lambda *a: scored.append(a) or score(*a))
    content = select(model, tmp_path / "heads.json", *CONTEXT)
    assert len(scored) == 2
    assert content["scores"] == expected["scores"]
    assert "2 of 4 probes are done" in capsys.readouterr().out
    assert not unfinished.exists()


def test_another_model_does_not_go_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "mean_of", None)
    with pytest.raises(TypeError):
        select(model, tmp_path / "heads.json", *CONTEXT)
    other = write_built(tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = 1.5 * weights["model.norm.weight"]
    write_checkpoint(other, read_config(other), weights)
    error = refusal(capsys, "--model", other, "-o", tmp_path / "heads.json", *CONTEXT)
    assert "other settings: model was" in error


def test_an_unfinished_run_that_is_none(model, tmp_path, capsys):
    unfinished = tmp_path / ".heads.json.mlx_hydra-partial"
    for text in ("{", "[]", "{}", '{"settings": {}, "results": []}'):
        unfinished.write_text(text)
        error = refusal(capsys, "--model", model, "-o", tmp_path / "heads.json", *CONTEXT)
        assert "is not an unfinished run: remove it" in error


def test_pictures_and_knockout(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    outputs = ("--plot", tmp_path / "h.png", "--knockout-plot", tmp_path / "k.pdf")
    select(model, tmp_path / "h.json", *CONTEXT, *outputs, "--knockout", tmp_path / "k.csv")
    assert "Answers' tokens right: 100%; with 2 heads silenced 0% in score" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "k.pdf").read_bytes().startswith(b"%PDF")
    with open(tmp_path / "k.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] | {"readout": ""} == {
        "order": "scores",
        "heads": "1",
        "readout": "",
        "accuracy": "0.0",
    }
    # A choice without scores has a picture, too.
    select(model, tmp_path / "f.json", "--method", "fixed", "--plot", tmp_path / "f.png")
    assert (tmp_path / "f.png").exists()
    names = ("h.png", "k.pdf", "k.csv", "h.json", "f.json", "f.png")
    assert leftovers(tmp_path, *names) == set()


def test_knockout_of_earlier_scores_as_json(model, tmp_path):
    select(model, tmp_path / "a.json", *CONTEXT)
    options = ("--scores", tmp_path / "a.json", *CONTEXT, "--knockout", tmp_path / "k.json")
    select(model, tmp_path / "b.json", *options)
    points = json.loads((tmp_path / "k.json").read_text())
    assert [point["heads"] for point in points if point["order"] == "scores"] == [0, 1, 2]


def write_probes(path, folder, count=4):
    """Probes as text, from the generator's needles."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    needles, lines = Needles(tokenizer, 5), []
    for i in range(count):
        needle = needles.sample("single", 50, 0.3)
        parts = {
            "prompt": needle.prompt,
            "answer": needle.answer,
            "counterfactual_prompt": needle.with_answer(needle.distractor),
            "distractor": needle.distractor,
        }
        entry = {name: tokenizer.decode(tokens) for name, tokens in parts.items()}
        lines.append(json.dumps(entry | {"capability": f"kind {i % 2}"}))
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_probes_from_a_file(model, tmp_path):
    probes = write_probes(tmp_path / "p.jsonl", model)
    content = select(model, tmp_path / "heads.json", "--probes", probes)
    assert content["full_attention_heads"] == [[PREVIOUS[1]], [RETRIEVAL[1]]]
    assert {n: c["pairs"] for n, c in content["capabilities"].items()} == {"kind 0": 2, "kind 1": 2}
    one = select(
        model, tmp_path / "one.json", "--probes", probes, "--pairs", 1, "--knockout",
        tmp_path / "k.csv",
    )  # fmt: skip
    assert {n: c["pairs"] for n, c in one["capabilities"].items()} == {"kind 0": 1, "kind 1": 1}
    assert one["spearman_of_halves"] is None


def test_builtin_probes_go_on_as_they_began(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    few, more = (probes_module.builtin_pairs(tokenizer, 60, n, 3) for n in (1, 4))
    assert more[: len(few)] == few
    assert {len(pair.prompt) for pair in more} == {60}
    depths = sorted(pair.changed[0] for pair in more if pair.capability == "single")
    assert depths[-1] - depths[0] > 20


PROBE = {
    "prompt": "w1 w2 w3 w1",
    "answer": "w2 w3",
    "counterfactual_prompt": "w1 w4 w5 w1",
    "distractor": "w4 w5",
}


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "it holds no scores"),
        ('{"scores": null}', "it holds no scores"),
        ('{"scores": [["a"]]}', "its scores are no table of numbers"),
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


def test_as_a_module(model, tmp_path):
    arguments = ["--model", model, "--method", "layerwise", "-o", tmp_path / "h.json"]
    run = [sys.executable, "-m", "mlx_hydra.select", *map(str, arguments)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.endswith(
        "4 of 8 heads stay full (50.0%); the KV cache keeps 2 of 4 KV heads.\n"
    )
