"""The command from end to end on the hand-built model."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from checkpoint_files import convert, leftovers, read_config, write_qwen3
from select_runs import CONTEXT, PROBE, refusal, select
from selection_models import BYSTANDER, PREVIOUS, RETRIEVAL, write_built

from mlx_hydra.config import load_heads
from mlx_hydra.needles import Needles
from mlx_hydra.select import command, measure
from mlx_hydra.select import probes as probes_module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_built(tmp_path_factory.mktemp("models") / "built")


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


@pytest.fixture
def told_apart(monkeypatch) -> tuple[list, list]:
    """The probes that are scored, and those on which heads are silenced, as they come."""
    scored, silenced = [], []
    score, curve = measure.score_pair, command.knockout_curve

    def score_pair(model, pair):
        scored.append(pair)
        return score(model, pair)

    def knockout_curve(model, pairs, *others):
        silenced.append(pairs)
        return curve(model, pairs, *others)

    monkeypatch.setattr(measure, "score_pair", score_pair)
    monkeypatch.setattr(command, "knockout_curve", knockout_curve)
    return scored, silenced


def test_knockout_is_on_probes_that_were_not_scored(model, tmp_path, capsys, told_apart):
    scored, silenced = told_apart
    outputs = [("--knockout", tmp_path / f"k{i}.csv") for i in range(4)]
    scores = ("--scores", tmp_path / "a.json")
    select(model, tmp_path / "a.json", *CONTEXT, "--seed", 1, *outputs[0])
    again = select(model, tmp_path / "b.json", *scores, *outputs[1])
    assert again["made_by"]["seed"] == 1
    assert silenced[0] == silenced[1] and len(silenced[0]) == 4
    assert (tmp_path / "k0.csv").read_bytes() == (tmp_path / "k1.csv").read_bytes()
    assert not any(pair in scored for pair in silenced[0])
    tokens = sum(len(pair.answer) for pair in silenced[0])
    told = f"silenced on 4 probes ({tokens} tokens of answers) that were not scored."
    assert capsys.readouterr().out.count(told) == 2
    # At another length, if that is asked for.
    select(model, tmp_path / "c.json", *scores, "--context", 70, "--pairs", 1, *outputs[2])
    assert [len(pair.prompt) for pair in silenced[2]] == [70, 70]
    # Scores that do not say what they were made by.
    content = json.loads((tmp_path / "a.json").read_text())
    del content["made_by"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    select(model, tmp_path / "d.json", *scores, *CONTEXT, *outputs[3])
    assert "of which it is not known whether they were scored" in capsys.readouterr().out


def test_the_random_orders_follow_from_the_seed_of_the_scores(model, tmp_path, monkeypatch):
    seeds, curve = [], command.knockout_curve

    def knockout_curve(model, pairs, order, seed, *others):
        seeds.append(seed)
        return curve(model, pairs, order, seed, *others)

    monkeypatch.setattr(command, "knockout_curve", knockout_curve)
    knockout = [*CONTEXT, "--knockout"]
    select(model, tmp_path / "a.json", "--seed", 1, *knockout, tmp_path / "a.csv")
    scores = ("--scores", tmp_path / "a.json")
    select(model, tmp_path / "b.json", *scores, *knockout, tmp_path / "b.csv")
    select(model, tmp_path / "c.json", "--seed", 2, *knockout, tmp_path / "c.csv")
    assert seeds[0] == seeds[1] != seeds[2]


def test_knockout_on_a_file_takes_what_was_not_scored(model, tmp_path, capsys, told_apart):
    scored, silenced = told_apart
    probes = ("--probes", write_probes(tmp_path / "p.jsonl", model, 8))
    outputs = [("--knockout", tmp_path / f"k{i}.csv") for i in range(4)]
    select(model, tmp_path / "a.json", *probes, "--pairs", 2, *outputs[0])
    select(model, tmp_path / "b.json", "--scores", tmp_path / "a.json", *probes, *outputs[1])
    assert silenced[0] == silenced[1]
    assert [pair.capability for pair in silenced[0]] == ["kind 0", "kind 1"] * 2
    assert len(scored) == 4 and not any(pair in scored for pair in silenced[0])
    assert capsys.readouterr().out.count("that were not scored.") == 2

    select(model, tmp_path / "all.json", *probes, *outputs[2])
    assert len(scored) == 12 and silenced[2] == scored[4:8]
    assert "that were scored, too, as " in capsys.readouterr().out
    other = ("--probes", write_probes(tmp_path / "q.jsonl", model, 4))
    select(model, tmp_path / "c.json", "--scores", tmp_path / "all.json", *other, *outputs[3])
    assert "of which it is not known whether they were scored" in capsys.readouterr().out


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


def test_a_line_of_probes_ends_where_json_says(model, tmp_path):
    texts = {name: f"{text} \u2028" for name, text in PROBE.items() if "prompt" in name}
    entry = json.dumps(PROBE | texts, ensure_ascii=False)
    probes = tmp_path / "p.jsonl"
    probes.write_bytes(f"{entry}\r\n{entry}\r\n".encode())
    content = select(model, tmp_path / "h.json", "--method", "attention", "--probes", probes)
    assert content["capabilities"]["probes"]["pairs"] == 2


def test_builtin_probes_go_on_as_they_began(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    few, more = (probes_module.builtin_pairs(tokenizer, 60, n, 3) for n in (1, 4))
    assert more[: len(few)] == few
    assert {len(pair.prompt) for pair in more} == {60}
    depths = sorted(pair.changed[0] for pair in more if pair.capability == "single")
    assert depths[-1] - depths[0] > 20


def test_as_a_module(model, tmp_path):
    arguments = ["--model", model, "--method", "layerwise", "-o", tmp_path / "h.json"]
    run = [sys.executable, "-m", "mlx_hydra.select", *map(str, arguments)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.endswith(
        "4 of 8 heads stay full (50.0%); the KV cache keeps 2 of 4 KV heads.\n"
    )
