"""examples/reproduction: its texts, its exact match, its jobs and its tables."""

# Its modules are found after the path is set.
# ruff: noqa: E402

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

REPRODUCTION = Path(__file__).parents[1] / "examples" / "reproduction"
sys.path.insert(0, str(REPRODUCTION))

import chain
import evaluate
import prepare
import run
import table
import teacher
import texts
from jobs import Job, Plan

from mlx_hydra.distill.config import Source
from mlx_hydra.distill.data import Sequences, tokens_file
from mlx_hydra.loading import load_tokenizer, read_config
from mlx_hydra.models.hydrahead import Model, ModelArgs
from mlx_hydra.select.probes import pairs_from_file

LENGTH = 160
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def writer():
    return texts.Writer()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(texts.TOKENIZER, read_config(texts.TOKENIZER))


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory):
    """A random model whose logits are far enough apart to have answers and scores."""
    model = teacher.new_model(SIZES)
    model.update(tree_map(lambda a: 4 * a if a.ndim == 2 else a, model.parameters()))
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_model(folder, model, SIZES)
    return folder


def documents(writer, count, length=LENGTH, purpose="distill"):
    return [writer.document(texts.drawn_for(purpose, length, n), length) for n in range(count)]


# Texts


@pytest.mark.parametrize("length", [160, 512, 1024])
def test_documents_have_their_length_and_end_with_an_answer(writer, length):
    for document in documents(writer, 40, length):
        assert len(document.ids) == length
        assert sum(document.answers[-1]) == length
        for start, count in document.answers:
            assert document.ids[start + count - 1] == writer.encode.eos
            assert document.ids[:start].count(writer.encode.eos) < len(document.answers)


def test_every_answer_is_stated_once_in_its_report(writer):
    for document in documents(writer, 20, 512):
        report = writer.encode.pieces.decode(document.ids[1 : document.report])
        for start, count in document.answers:
            value = writer.encode.pieces.decode(document.ids[start : start + count - 1])
            assert value.strip() in report


def test_any_length_can_be_filled(writer):
    rng = texts.drawn_for("test", 0, 0)
    for tokens in range(60):
        pieces = writer.report(rng, 200, 0.3)
        before = texts.size(pieces)
        writer.fill(rng, pieces, tokens)
        assert texts.size(pieces) == before + tokens


def test_the_tokenizer_reads_the_text_as_the_encoder_does(writer, tokenizer):
    exams = [d for task in texts.TASKS for d in texts.exams(writer, task, 320, range(4))]
    for document in documents(writer, 40) + exams:
        ids = tokenizer.encode(document.text, add_special_tokens=False)
        assert [*ids, writer.encode.eos] == document.ids


def test_documents_line_up_with_the_sequences_of_distill(writer, tokenizer, tmp_path):
    found = documents(writer, 12)
    path = tmp_path / "text.jsonl"
    prepare.write_lines(path, [prepare.as_line({"text": d.text}) for d in found])
    limit = 11 * LENGTH + 1
    tokens = tokens_file(tmp_path, [Source(file=str(path))], tokenizer, 2048, limit, "any")
    sequences = Sequences(tokens, LENGTH, seed=0)
    rows = np.array(sequences.rows(range(11)))
    expected = {tuple(document.ids) for document in found[:11]}
    assert {tuple(row[:-1]) for row in rows.tolist()} == expected
    assert (rows[:, -1] == writer.encode.bos).all()


def test_a_teachers_batch_marks_the_answers(writer, monkeypatch):
    monkeypatch.setattr(teacher, "_writer", writer)
    tokens, answers = teacher.make_batch((3, 4, LENGTH))
    rng = texts.drawn_for("teacher", LENGTH, 3)
    for row, asked in zip(tokens, answers):
        document = writer.document(rng, LENGTH)
        assert row.tolist() == [*document.ids, writer.encode.bos]
        expected = [t for start, n in document.answers for t in document.ids[start : start + n]]
        assert row[1:][asked].tolist() == expected


def test_an_exam_states_its_needle_where_it_should(writer):
    for number, document in enumerate(texts.exams(writer, "single", 1024, range(8))):
        assert document.report == 1024
        [(start, count)] = document.answers
        answer = document.ids[start : start + count - 1]
        at = [n for n in range(1024) if document.ids[n : n + len(answer)] == answer]
        depth = (0.5 + number * texts.GOLDEN_RATIO) % 1
        assert min(abs(n - depth * 1024) for n in at) < 60


def test_exams_ask_of_many_facts(writer):
    for document in texts.exams(writer, "multi_key", 1024, range(4)):
        assert (document.report, len(document.answers)) == (1024, 4)


def test_what_is_asked_was_not_trained_on(writer):
    def reports(found):
        return {writer.encode.pieces.decode(d.ids[1 : d.report]) for d in found}

    trained = [*documents(writer, 50, 512), *documents(writer, 50, 512, "teacher")]
    learnt = "\n".join(reports(trained))
    assert len(reports(trained)) == 100
    for task in texts.TASKS:
        for document in texts.exams(writer, task, 512, range(8)):
            # Not even a paragraph.
            text = writer.encode.pieces.decode(document.ids[1 : document.report])
            assert not any(p in learnt for p in text.split("\n") if len(p) > 200)
    assert (
        texts.drawn_for("exam single", 512, 0).random()
        != texts.drawn_for("distill", 512, 0).random()
    )


def test_probes_differ_in_the_answer_alone(writer, tokenizer, tmp_path):
    path = tmp_path / "probes.jsonl"
    prepare.write_lines(path, map(prepare.as_line, prepare.probes(writer, 200, 3)))
    pairs = pairs_from_file(path, tokenizer)
    assert [pair.capability for pair in pairs] == ["single", "multi_key"] * 3
    for pair in pairs:
        assert len(pair.prompt) == len(pair.counterfactual) == 200
        assert pair.prompt[0] == writer.encode.bos
        clean = [pair.prompt[n] for n in pair.changed]
        other = [pair.counterfactual[n] for n in pair.changed]
        assert set(clean) <= set(pair.answer) and set(other) <= set(pair.distractor)


# Exact match


def hydra():
    mx.random.seed(1)
    switches = {
        "head_order": "full_first",
        "full_attention_heads": [[0, 3], []],
        "full_attention": {"rope": False, "log_scale_base": 512, "gate": True},
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": 4,
            "rope": True,
            "gate": True,
        },
        "fusion": {"norm": True, "eps": 1e-6},
    }
    config = teacher.CONFIG | SIZES | switches | {"model_type": "hydrahead"}
    return Model(ModelArgs.from_dict(config))


@pytest.mark.parametrize("kind", ["qwen3", "hydrahead"])
def test_exact_match_is_what_greedy_decoding_writes(writer, kind, monkeypatch):
    monkeypatch.setattr(evaluate, "STEP", 48)
    # Two documents at a time.
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 450)
    model = teacher.new_model(SIZES) if kind == "qwen3" else hydra()
    model.update(tree_map(lambda a: 4 * a if a.ndim == 2 else a, model.parameters()))
    found, expected = [], []
    for number, document in enumerate(documents(writer, 3)):
        ids, answers = document.ids[: 120 + 7 * number], []
        for turn in range(2):
            ids = ids + document.ids[5 : 12 + number]
            cache, count = make_prompt_cache(model), 3 + number
            steps = generate_step(mx.array(ids), model, max_tokens=count, prompt_cache=cache)
            said = [int(token) for token, _ in steps]
            wrong = (number + turn) % 3 == 2
            if wrong:
                said[-1] = (said[-1] + 1) % 2048
            answers.append((len(ids), count))
            expected.append(not wrong)
            ids = ids + said
        found.append(texts.Document("", ids, answers, 120))
    right = evaluate.right_answers(model, found)
    assert [answer for answers in right for answer in answers] == expected
    result = evaluate.evaluate(model, "single", 120, found)
    assert (result["questions"], result["right"]) == (6, sum(expected))


# Jobs

RECIPE = {
    "methods": ["causal", "attention", "random", "fixed", "layerwise"],
    "ratios": [0.25, 0.5],
    "seeds": [0, 1, 2],
    "ablations": {
        "no-norm": {"config": {"fusion": {"norm": False}}, "calibrate": False},
        "free-layers": {"min_per_layer": 0},
        "no-stage-1": {"without_stage_1": True},
    },
    "select": {"context": 200, "pairs": 6},
    "distill": {
        "dtype": "float32",
        "grad_checkpoint": False,
        "stages": [
            {
                "objective": objective,
                "tokens": 320,
                "length": length,
                "batch_size": 1,
                "learning_rate": 0.001,
            }
            for objective, length in [("attention", 160), ("logits", 160), ("next_token", 320)]
        ],
    },
    "evaluate": {"lengths": [160, 320], "questions": 4},
    "gigabytes": 2,
}


def make_plan(folder, teacher_folder=Path("teacher")):
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(RECIPE))
    return Plan(RECIPE, recipe_file, teacher_folder, folder / "work")


def test_the_first_seed_of_everything_comes_before_the_others(tmp_path):
    jobs = make_plan(tmp_path).jobs()
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:number])
    whole = [
        (j.about["seed"], j.about["ablation"]) for j in jobs if j.name != "teacher" and j.about
    ]
    assert len(whole) == 5 * 2 * 3 + 3
    assert [seed for seed, _ in whole] == [0] * 13 + [1, 1, 1, 1, 1, 2, 2, 2, 2, 2] * 2
    assert [a for _, a in whole[5:8]] == ["no-norm", "free-layers", "no-stage-1"]


def test_random_heads_follow_the_seed_and_measured_ones_do_not(tmp_path):
    jobs = {job.name: job for job in make_plan(tmp_path).jobs()}
    select = jobs["random-0.25-whole-2"].commands[0]["command"]
    assert select[select.index("--seed") + 1] == "2"
    first, second = (
        [
            word.replace(f"whole-{seed}", "")
            for c in jobs[f"causal-0.25-whole-{seed}"].commands[:2]
            for word in c["command"]
        ]
        for seed in (0, 1)
    )
    assert first == second and "--seed" not in first


def test_ablations_change_one_thing(tmp_path):
    plan = make_plan(tmp_path)
    jobs = {job.name: job for job in plan.jobs()}
    words = {
        name: " ".join(" ".join(c["command"]) for c in jobs[f"causal-0.25-{name}-0"].commands)
        for name in ("whole", *RECIPE["ablations"])
    }
    assert "--min-per-layer 0" in words["free-layers"] and "--min-per" not in words["whole"]
    assert '"norm": false' in words["no-norm"] and "--calibrate" not in words["no-norm"]
    assert "--calibrate" in words["whole"] and "change_config" not in words["whole"]
    stages = plan._config(jobs["causal-0.25-no-stage-1-0"].about)["stages"]
    assert [(s["objective"], s["tokens"]) for s in stages] == [("logits", 640), ("next_token", 320)]


def test_chosen_jobs_bring_what_they_need(tmp_path):
    jobs = run.chosen(make_plan(tmp_path).jobs(), "attention-0.5-whole-*")
    assert [job.name for job in jobs] == [
        "probes",
        "data",
        "scores-attention",
        *(f"attention-0.5-whole-{seed}" for seed in range(3)),
    ]


class Sleeper(run.Runner):
    """Whose jobs sleep, fail or end, by their name."""

    def start(self, job):
        path = self.plan.set_up(job)
        script = {
            "ends": f"open({str(self.plan.done_file(job))!r}, 'w').write('{{}}')",
            "fails": "raise SystemExit('what failed')",
            "sleeps": "import time; time.sleep(60)",
        }[job.name.split("-")[0]]
        with (path.parent / "log.txt").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", script], stderr=log, start_new_session=True
            )
        self.running[job.name] = (job, process, 0.0)
        self.started = [*getattr(self, "started", []), job.name]


def test_jobs_wait_for_what_they_need_and_are_not_run_twice(tmp_path, capsys):
    plan = make_plan(tmp_path)
    jobs = [
        Job("ends-1", []),
        Job("fails", []),
        Job("ends-2", [], ("fails",)),
        Job("ends-3", [], ("ends-1",)),
    ]
    runner = Sleeper(plan, jobs, processes=1, seconds=20)
    runner.run()
    assert runner.started == ["ends-1", "fails", "ends-3"]
    assert runner.failed == ["fails"]
    assert "what failed" in capsys.readouterr().out
    again = Sleeper(plan, jobs, processes=2, seconds=20)
    again.run()
    assert again.started == ["fails"]


def test_at_the_time_limit_what_runs_is_stopped_and_nothing_starts(tmp_path, capsys):
    plan = make_plan(tmp_path)
    runner = Sleeper(plan, [Job("sleeps-1", []), Job("sleeps-2", [])], 1, seconds=0.5)
    runner.run()
    assert runner.started == ["sleeps-1"]
    [(_, process, _)] = runner.running.values()
    assert process.returncode is not None
    assert "sleeps-1: stopped" in capsys.readouterr().out


def test_from_the_teacher_to_the_table(tiny_teacher, tmp_path, capsys):
    """All commands of a run, of an ablation and of the teacher's own evaluation."""
    plan = make_plan(tmp_path, tiny_teacher)
    jobs = {job.name: job for job in plan.jobs()}
    prepare.prepare(tiny_teacher, plan.shared, RECIPE, "probes", 1)
    prepare.prepare(tiny_teacher, plan.shared, RECIPE, "data", 1)
    made = set((plan.shared / "tokens").iterdir())
    wanted = ["scores-causal", "causal-0.25-whole-0", "causal-0.25-no-norm-0", "teacher"]
    for name in wanted:
        path = plan.set_up(jobs[name])
        content = json.loads(path.read_text())
        seconds = chain.run(content["commands"])
        Path(content["done"]).write_text(json.dumps({"seconds": seconds}))
        if jobs[name].about:
            run.add_result(plan, jobs[name])
            run.tidy(plan, jobs[name])
    assert set((plan.shared / "tokens").iterdir()) == made

    results = run.read_results(plan)
    assert set(results["runs"]) == set(wanted[1:])
    found = results["runs"]["causal-0.25-whole-0"]
    assert [(stage["objective"], stage["steps"]) for stage in found["losses"]] == [
        ("attention", 2),
        ("logits", 2),
        ("next_token", 1),
    ]
    assert sum(map(len, found["full_attention_heads"])) == 4
    assert {(e["task"], e["length"], e["questions"]) for e in found["accuracy"]} == {
        (task, length, 4) for task in texts.TASKS for length in (160, 320)
    }
    assert "causal, whole" in table.tables(results)

    model = plan.folder("causal-0.25-no-norm-0") / "run" / "model"
    assert json.loads((model / "config.json").read_text())["fusion"]["norm"] is False

    capsys.readouterr()
    again = json.loads((plan.folder("causal-0.25-whole-0") / "job.json").read_text())
    (plan.folder("causal-0.25-whole-0") / "student").mkdir()
    assert chain.run(again["commands"]) == {}

    run.keep_best(plan, tmp_path / "best")
    kept = mx.load(str(tmp_path / "best" / "model.safetensors"))
    assert kept["model.embed_tokens.weight"].dtype == mx.bfloat16
    assert kept["model.layers.0.self_attn.linear.A_log"].dtype == mx.float32
    run.copy_results(plan, tmp_path / "copy")
    assert (tmp_path / "copy" / "causal-0.25-whole-0" / "losses.csv").is_file()
    assert (tmp_path / "copy" / "results.json").is_file()


# Tables


def a_run(method, seed, right, ratio=0.125, ablation=None):
    accuracy = [
        {"task": task, "length": length, "questions": 10, "right": right}
        for task in texts.TASKS
        for length in (100, 800)
    ]
    about = {"method": method, "ratio": ratio, "seed": seed, "ablation": ablation}
    return about | {"accuracy": accuracy, "seconds": {"evaluate.py": 1.0}}


def results_of(*runs):
    return {
        "device": "a GPU",
        "mlx": "1",
        "selection": {},
        "runs": {str(number): found for number, found in enumerate(runs)},
    }


def test_tables_give_mean_and_range_over_seeds():
    runs = [a_run("teacher", 0, 10, 1.0), a_run("causal", 0, 9), a_run("causal", 1, 7)]
    runs += [a_run("random", 0, 2), a_run("random", 1, 8), a_run("layerwise", 0, 1)]
    runs += [a_run("causal", 0, 3, ablation="rope")]
    text = table.tables(results_of(*runs))
    assert "### LA:FA 7:1" in text and "| causal | 2 | 80 (70-90) | 80 (70-90) |" in text
    assert "| single | random | 80 (70-90) | 50 (20-80) | +30 | no |" in text
    assert "| multi_key | layerwise | 80 (70-90) | 10 | +70 | yes |" in text
    assert "| causal, whole | 1 | 90 | 90 |" in text and "| rope | 1 | 30 | 30 |" in text
    assert "| fixed |" not in text


def test_tables_go_between_their_marks(tmp_path):
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    results.write_text(json.dumps(results_of(a_run("causal", 0, 5))))
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        table.main([str(results), "--into", str(page), "--plot", str(tmp_path / "plot.png")])
    text = page.read_text()
    assert text.startswith(f"before\n{table.START}\n") and text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text and text.count("| causal | 1 | 50 | 50 |") == 2
    assert (tmp_path / "plot.png").stat().st_size > 1000
