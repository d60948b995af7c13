"""examples/reproduction: its texts, its exact match, its jobs and its tables."""

# Its modules are found after the path is set.
# ruff: noqa: E402

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten, tree_map
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
from jobs import command as jobs_command
from reports import WORDS

from mlx_hydra.distill.config import Source
from mlx_hydra.distill.data import Sequences, tokens_file
from mlx_hydra.loading import load, load_tokenizer, read_config
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


def test_people_may_be_called_by_their_last_name(writer):
    def names(share):
        rng = texts.drawn_for("names", 320, 0)
        found = [writer.document(rng, 320, share) for _ in range(30)]
        assert {len(document.ids) for document in found} == {320}
        for document in found:
            report = writer.encode.pieces.decode(document.ids[1 : document.report])
            for start, count in document.answers:
                answer = writer.encode.pieces.decode(document.ids[start : start + count - 1])
                words = answer.split()
                if words[-1] in WORDS["last_names"]:
                    assert f" {' '.join(words)}." in report
                    yield len(words)

    assert set(names(0.0)) == {2}
    some = list(names(0.5))
    assert 0.3 < some.count(1) / len(some) < 0.7 and set(some) == {1, 2}


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
        document = writer.document(rng, LENGTH, teacher.LAST_NAMES)
        assert row.tolist() == [*document.ids, writer.encode.bos]
        expected = [t for start, n in document.answers for t in document.ids[start : start + n]]
        assert row[1:][asked].tolist() == expected


def teacher_arguments(out, **changes):
    names = {
        "out": out,
        "minutes": 1.0,
        "total_minutes": None,
        "workers": 1,
        "tokens_a_step": 320,
        "no_compile": True,
    }
    return SimpleNamespace(**names | changes)


@pytest.fixture
def clock(writer, monkeypatch):
    """Training on a clock of ours: a step takes a second, one that compiles a minute."""
    now, lengths = [0.0], []
    monkeypatch.setattr(teacher, "_writer", writer)
    # Batches are made here, when they are asked for.
    pool = SimpleNamespace(apply_async=lambda f, args: SimpleNamespace(get=lambda: f(*args)))
    context = SimpleNamespace(Pool=lambda *_: nullcontext(pool))
    monkeypatch.setattr(teacher.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(teacher.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(teacher, "STAGES", [(160, 0.5), (320, 1.0)])

    def loss(model, tokens, answers, others, real=teacher.loss_and_accuracy):
        length = tokens.shape[1] - 1
        now[0] += 1.0 if lengths and lengths[-1] == length else 60.0
        lengths.append(length)
        return real(model, tokens, answers, others)

    monkeypatch.setattr(teacher, "loss_and_accuracy", loss)
    return lengths


def test_steps_that_compile_are_no_training_time(clock, tmp_path):
    args = teacher_arguments(tmp_path, minutes=10.0, total_minutes=0.1)
    progress = teacher.train(args, teacher.new_model(SIZES))
    # Six seconds; a stage ends when it has had more than its share of them.
    assert clock == [160] * 5 + [320] * 3
    assert (progress["step"], progress["seconds"]) == (8, 6.0)
    assert progress["stage_seconds"] == 2.0


def test_minutes_are_those_of_the_clock(clock, tmp_path):
    args = teacher_arguments(tmp_path, minutes=1.05, total_minutes=10.0)
    assert teacher.train(args, teacher.new_model(SIZES))["step"] == 4


def test_a_teacher_goes_on_from_its_state(clock, tmp_path):
    def run_of(*minutes):
        model = teacher.new_model(SIZES)
        for part in minutes:
            clock.clear()
            args = teacher_arguments(tmp_path / str(len(minutes)), minutes=part, total_minutes=9.0)
            args.out.mkdir(exist_ok=True)
            progress = teacher.train(args, model)
            # All but what the state holds is another's.
            model = teacher.new_model(SIZES)
        optimizer = teacher.optim.AdamW(1.0)
        restored = teacher.restore(args.out, model, optimizer)
        assert restored == progress
        return progress, dict(tree_flatten([model.parameters(), optimizer.state]))

    whole, resumed = run_of(63 / 60), run_of(61 / 60, 61 / 60)
    # The one has 3 steps after the one that compiles, the other 1 and 1.
    assert (whole[0]["step"], resumed[0]["step"]) == (4, 4)
    assert (whole[0]["seconds"], resumed[0]["seconds"]) == (3.0, 2.0)
    assert whole[1].keys() == resumed[1].keys()
    for name in whole[1]:
        if not name.endswith("learning_rate"):
            assert np.allclose(whole[1][name], resumed[1][name], atol=1e-4), name
    files = [path.stat().st_size for path in (tmp_path / "1" / "state").glob("*.safetensors")]
    assert len(files) == teacher.PIECES and max(files) < 1.5 * min(files) + 300_000
    assert not list((tmp_path / "1").glob("state.*"))


def test_a_teachers_weights_are_read_back(tiny_teacher):
    model = teacher.new_model(SIZES)
    before = dict(tree_flatten(model.parameters()))
    model.load_weights(teacher.read_weights(tiny_teacher))
    after = dict(tree_flatten(model.parameters()))
    name = "model.embed_tokens.weight"
    assert np.allclose(np.array(after[name]), 4 * np.array(before[name]))


def test_the_teachers_files_are_small(tmp_path):
    teacher.save_model(tmp_path, teacher.new_model({}), {})
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 15 << 20
    assert load(str(tmp_path))[0].args.num_hidden_layers == 8


def test_other_tokens_count_more_in_the_end():
    weights = [teacher.weight_of_others(done) for done in (0.0, 0.3, 0.65, 0.9)]
    assert np.allclose(weights, [0.05, 0.05, 0.15, 0.25])


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


# Commands that print, fail, end their process or sleep, and where they run.
COMMANDS = """
import os, random, sys, time
import mlx.core as mx, numpy as np

def main(arguments):
    what, *rest = arguments
    print("process", os.getpid(), flush=True)
    os.system("echo from outside of Python")
    if what == "draws":
        print("drawn", mx.random.uniform().item(), np.random.rand(), random.random())
    if what == "fails":
        raise ValueError("what failed")
    if what == "exits":
        sys.exit(2)
    if what == "dies":
        os._exit(7)
    if what == "sleeps":
        open(rest[0], "w").close()
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            sys.exit(130)
"""
WORKER = """
import sys
sys.path[:0] = sys.argv[1:]
import chain
chain.COMMANDS["try"] = "commands"
chain.main()
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Makes runners of jobs of one command, that their name tells."""
    (tmp_path / "commands.py").write_text(COMMANDS)
    command = (sys.executable, "-c", WORKER, str(REPRODUCTION), str(tmp_path))
    monkeypatch.setattr(run.Runner, "command", command)
    plan = make_plan(tmp_path)

    def make(jobs, processes, seconds=30.0):
        jobs = [
            Job(name, [jobs_command("try", name.split("-")[0], tmp_path / f"{name}.begun")], needs)
            for name, needs in jobs.items()
        ]
        return run.Runner(plan, jobs, processes, seconds)

    make.log = lambda name: (plan.folder(name) / "log.txt").read_text()
    return make


def processes_of(text):
    return [line.split()[1] for line in text.split("\n") if line.startswith("process")]


def test_a_process_runs_one_job_after_the_other_and_survives_those_that_fail(runner, capfd):
    jobs = {
        "draws-1": (),
        "fails": (),
        "draws-2": ("fails",),
        "exits": (),
        "draws-3": ("draws-1",),
    }
    first = runner(jobs, 1)
    first.run()
    assert first.failed == ["fails", "exits"]
    assert first.done == {"draws-1", "draws-3"}
    logs = {name: runner.log(name) for name in jobs if name != "draws-2"}
    assert len({number for log in logs.values() for number in processes_of(log)}) == 1
    # Each log has what its own job printed, and all of it.
    assert all(log.count("from outside of Python") == 1 for log in logs.values())
    assert "ValueError: what failed" in logs["fails"] and "what failed" not in logs["draws-3"]
    out = capfd.readouterr().out
    assert "fails: failed: ValueError: what failed" in out and "process" not in out
    drawn = [line for log in logs.values() for line in log.split("\n") if line.startswith("drawn")]
    assert len(drawn) == 2 and len(set(drawn)) == 1

    again = runner(jobs, 1)
    again.run()
    # What is done is not run twice.
    assert runner.log("draws-1") == logs["draws-1"]
    assert len(processes_of(runner.log("fails"))) == 2


def test_a_process_that_dies_takes_one_job_with_it(runner, capfd):
    found = runner({"dies": (), "draws": ()}, 1)
    found.run()
    assert (found.failed, found.done) == (["dies"], {"draws"})
    assert "dies: exit status 7" in capfd.readouterr().out
    assert processes_of(runner.log("dies")) != processes_of(runner.log("draws"))


def test_at_the_time_limit_what_runs_is_stopped_and_nothing_starts(runner, tmp_path, capfd):
    found = runner({"sleeps-1": (), "sleeps-2": ()}, 1)
    collect, begun = found.collect, tmp_path / "sleeps-1.begun"

    def until_it_sleeps(seconds):
        collect(seconds)
        if begun.exists():
            found.deadline = 0.0

    found.collect = until_it_sleeps
    # As in a shell's background job.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [job.name for job in found.waiting] == ["sleeps-2"]
    [worker] = found.workers
    assert worker.process.returncode == chain.INTERRUPTED
    assert runner.log("sleeps-1").endswith("interrupted\n")
    assert "sleeps-1: stopped" in capfd.readouterr().out and not found.failed


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
