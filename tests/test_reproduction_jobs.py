"""examples/reproduction: its jobs and its tables."""

import json
import signal
import sys
from pathlib import Path

import chain
import mlx.core as mx
import prepare
import pytest
import receivers
import run
import table
import texts
import yaml
from jobs import Job, Plan
from jobs import command as jobs_command
from miniature import REPRODUCTION, save_tiny_teacher

RECIPE = {
    "methods": ["causal", "attention", "random", "fixed", "layerwise"],
    "ratios": [0.25, 0.5],
    "seeds": [0, 1, 2],
    "ablations": {
        "no-norm": {"config": {"fusion": {"norm": False}}, "calibrate": False},
        "free-layers": {"min_per_layer": 0},
        "no-stage-1": {"without_stage_1": True},
        "receivers": {"receivers_alone": True},
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


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


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
    assert len(whole) == 5 * 2 * 3 + 4
    assert [seed for seed, _ in whole] == [0] * 14 + [1, 1, 1, 1, 1, 2, 2, 2, 2, 2] * 2
    assert [a for _, a in whole[5:9]] == list(RECIPE["ablations"])


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
    assert "causal/heads.json" in words["whole"] and "receivers-0/scores.json" in words["receivers"]
    stages = plan._config(jobs["causal-0.25-no-stage-1-0"].about)["stages"]
    assert [(s["objective"], s["tokens"]) for s in stages] == [("logits", 640), ("next_token", 320)]


def test_receivers_are_scored_by_themselves(tmp_path):
    # Of the first capability a head is the largest receiver, of the second one is under the
    # threshold; another sends.
    capabilities = {
        "single": {"receiver": [[0.4, 0.2], [0.0, 0.0]], "sender": [[0.0, 0.0], [0.0, 0.9]]},
        "multi_key": {"receiver": [[0.5, 0.0], [0.009, 0.0]], "sender": [[0.0, 0.0], [0.0, 0.9]]},
    }
    source, out = tmp_path / "heads.json", tmp_path / "scores.json"
    source.write_text(json.dumps({"method": "causal", "capabilities": capabilities}))
    receivers.main([str(source), str(out)])
    assert json.loads(out.read_text())["scores"] == [[1.0, 0.25], [0.0, 0.0]]
    assert json.loads(out.read_text())["method"] == "causal"


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


def test_what_another_machine_has_done_is_not_done_again(runner, tmp_path):
    plan = make_plan(tmp_path)
    plan.work.mkdir()
    run.results_file(plan).write_text(json.dumps({"runs": {"draws-1": {"ratio": 0.25}}}))
    found = runner({"draws-1": (), "draws-2": ("draws-1",)}, 1)
    found.run()
    assert found.done == {"draws-1", "draws-2"}
    assert not plan.folder("draws-1").exists() and plan.folder("draws-2").exists()


def test_a_second_run_on_one_folder_is_refused(tmp_path, monkeypatch, capsys):
    make_plan(tmp_path)
    places = {"teacher": "teacher", "work": "work", "recipe": "recipe.yaml", "results": "copy"}
    options = [x for name, to in places.items() for x in (f"--{name}", str(tmp_path / to))]
    runs = []

    def run_another(runner):
        runs.append(runner)
        with pytest.raises(SystemExit) as ended:
            run.main(options)
        assert ended.value.code == 2
        run.main([*options, "--list"])

    monkeypatch.setattr(run.Runner, "run", run_another)
    for count in (1, 2):
        # The lock goes with the run that had it.
        run.main(options)
        assert len(runs) == count
        out, error = capsys.readouterr()
        assert (
            error == f"error: {tmp_path / 'work'} is being written by another run: wait for it.\n"
        )
        assert "causal-0.25-whole-0" in out


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

    results["runs"]["of-another-machine"] = found | {"accuracy": [{"right": 1, "questions": 1}]}
    run.results_file(plan).write_text(json.dumps(results))
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
