"""Run the reproduction: select, convert, distil and evaluate every student of the recipe.

    python examples/reproduction/run.py --teacher TEACHER --work WORK --minutes 15

The same command goes on where it was stopped; on another machine, with that results.json in WORK.
WORK/results.json grows with every job, and is what table.py reads; WORK/jobs/NAME holds a job's
models, losses and log.txt. A second run on the same WORK is refused while the first goes on.
"""

import argparse
import csv
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
import yaml
from jobs import Job, Plan
from prepare import RECIPE

from mlx_hydra.cli import command
from mlx_hydra.locks import locked

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What an interrupted command has to clean up in.
PATIENCE = 20.0
# Steps behind a stage's last loss.
LAST_STEPS = 10


class Worker:
    """A process that runs one job after the other.

    job: the one that it runs, begun at ``started``; None while it has none.
    """

    def __init__(self, command: list[str]):
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # What stops this program stops the jobs its own way.
            start_new_session=True,
        )
        self.job: Job | None = None
        self.started = 0.0

    def fileno(self) -> int:
        return self.process.stdout.fileno()

    def give(self, job: Job, path: Path) -> None:
        self.job, self.started = job, time.monotonic()
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Runner:
    """Runs jobs side by side, in as many processes as it may have."""

    command = (sys.executable, str(HERE / "chain.py"))

    def __init__(self, plan: Plan, jobs: list[Job], processes: int, seconds: float):
        self.plan, self.processes = plan, processes
        self.deadline = time.monotonic() + seconds
        known = read_results(plan)["runs"]
        self.done = {job.name for job in jobs if job.name in known or plan.done_file(job).exists()}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.workers: list[Worker] = []
        self.failed: list[str] = []

    @property
    def running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def run(self) -> None:
        try:
            while (self.waiting or self.running) and time.monotonic() < self.deadline:
                self.start_what_can()
                if not self.running:
                    break
                self.collect(0.1)
        finally:
            self.collect(0.0)
            self.stop()

    def start_what_can(self) -> None:
        for job in list(self.waiting):
            if len(self.running) >= self.processes:
                return
            if self.done.issuperset(job.needs):
                self.waiting.remove(job)
                self.start(job)

    def start(self, job: Job) -> None:
        """Give a job to a process that has none."""
        path = self.plan.set_up(job)
        (path.parent / "log.txt").touch()
        free = [w for w in self.workers if w.job is None and w.process.poll() is None]
        if not free:
            free = [Worker(list(self.command))]
            self.workers += free
        free[0].give(job, path)

    def collect(self, seconds: float) -> None:
        """Take down what has ended, having waited so long at most."""
        for worker in select.select(self.running, [], [], seconds)[0]:
            answer = worker.process.stdout.readline().strip()
            job, worker.job = worker.job, None
            if not answer:
                # It is gone, the job with it; the next gets a new one.
                self.workers.remove(worker)
                answer = f"exit status {worker.process.wait()}"
            if answer == "done":
                self.done.add(job.name)
                self.note(f"{job.name}: done in {time.monotonic() - worker.started:.0f} s")
                if job.about is not None:
                    add_result(self.plan, job)
                    tidy(self.plan, job)
            else:
                self.failed.append(job.name)
                log = (self.plan.folder(job.name) / "log.txt").read_text().strip().split("\n")
                self.note(f"{job.name}: {answer}: {log[-1]}")

    def stop(self) -> None:
        """Interrupt what still runs; it goes on from its last checkpoint another time."""
        for worker in self.workers:
            worker.signal(signal.SIGINT)
        until = time.monotonic() + PATIENCE
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.signal(signal.SIGKILL)
                worker.process.wait()
            if worker.job is not None:
                self.note(f"{worker.job.name}: stopped")

    def note(self, text: str) -> None:
        counts = f"{len(self.done)} done, {len(self.running)} running, {len(self.waiting)} waiting"
        print(f"{text} ({counts})", flush=True)


def results_file(plan: Plan) -> Path:
    return plan.work / "results.json"


def read_results(plan: Plan) -> dict:
    path = results_file(plan)
    if path.exists():
        return json.loads(path.read_text())
    return {"device": device(), "mlx": mx.__version__, "selection": {}, "runs": {}}


def device() -> str:
    return mx.device_info().get("device_name", str(mx.default_device()))


def add_result(plan: Plan, job: Job) -> None:
    """Bring what a job found into results.json."""
    folder = plan.folder(job.name)
    content = read_results(plan)
    found = dict(job.about)
    found["accuracy"] = json.loads((folder / "evaluation.json").read_text())
    found["seconds"] = json.loads(plan.done_file(job).read_text())["seconds"]
    if (losses := folder / "run" / "losses.csv").exists():
        found |= losses_of(losses)
        heads = json.loads((folder / "heads.json").read_text())
        found["full_attention_heads"] = heads["full_attention_heads"]
        if heads["method"] not in content["selection"] and heads.get("scores"):
            names = ("spearman_of_halves", "forward_passes_per_pair", "capabilities", "scores")
            kept = {name: heads.get(name) for name in names}
            kept["capabilities"] = {
                name: {k: v for k, v in values.items() if not isinstance(v, list)}
                for name, values in kept["capabilities"].items()
            }
            content["selection"][heads["method"]] = kept
    content["runs"][job.name] = found
    partial = results_file(plan).with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.rename(results_file(plan))


def losses_of(path: Path) -> dict:
    """The first loss of each stage, the mean of its last steps, and the most memory of all."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = []
    for stage in sorted({row["stage"] for row in rows}):
        own = [row for row in rows if row["stage"] == stage]
        last = [float(row["loss"]) for row in own[-LAST_STEPS:]]
        losses.append(
            {
                "objective": own[0]["objective"],
                "steps": len(own),
                "first": float(own[0]["loss"]),
                "last": sum(last) / len(last),
            }
        )
    peak = max(int(row["peak_memory_bytes"]) for row in rows)
    return {"losses": losses, "peak_gigabytes": round(peak / 1e9, 2)}


def tidy(plan: Plan, job: Job) -> None:
    """Remove what a finished job does not need any more; its model stays."""
    for name in ("student", "run/checkpoints"):
        shutil.rmtree(plan.folder(job.name) / name, ignore_errors=True)


def keep_best(plan: Plan, out: Path) -> None:
    """Copy the best student of the recipe's first ratio, in bfloat16."""
    from mlx_hydra.models.hydrahead import may_cast

    def score(name: str) -> float:
        accuracy = runs[name]["accuracy"]
        return sum(entry["right"] / entry["questions"] for entry in accuracy) / len(accuracy)

    ratio = plan.recipe["ratios"][0]
    runs = {
        name: run
        for name, run in read_results(plan)["runs"].items()
        if run["ratio"] == ratio
        and run["ablation"] is None
        # Those of another machine have left their models there.
        and (plan.folder(name) / "run" / "model").exists()
    }
    if not runs:
        return
    best = max(runs, key=score)
    model = plan.folder(best) / "run" / "model"
    out.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.suffix not in (".safetensors", ".json") or path.name.startswith(
            ("config", "token")
        ):
            shutil.copyfile(path, out / path.name)
    weights = {}
    for path in model.glob("*.safetensors"):
        for name, array in mx.load(str(path)).items():
            weights[name] = array.astype(mx.bfloat16) if may_cast(name) else array
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    size = (out / "model.safetensors").stat().st_size
    print(f"The best at {ratio} is {best} ({score(best):.1%}): {out}, {size / 2**20:.1f} MiB.")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="--out of teacher.py")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reproduction")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--processes", type=int, default=5, help="jobs at a time (5)")
    parser.add_argument("--minutes", type=float, default=60, help="then all is stopped (60)")
    parser.add_argument("--only", metavar="PATTERN", help="jobs of such names, as 'causal-0.125-*'")
    parser.add_argument("--list", action="store_true", help="print the jobs, and run none")
    parser.add_argument("--results", type=Path, help="copy results.json and the logs here, too")
    parser.add_argument("--keep-best", type=Path, metavar="DIR", help="copy the best 7:1 model")
    args = parser.parse_args(argv)
    recipe = yaml.safe_load(args.recipe.read_text())
    work, teacher = args.work.resolve(), args.teacher.resolve()
    plan = Plan(recipe, args.recipe.resolve(), teacher, work)
    jobs = plan.jobs()
    if args.only:
        jobs = chosen(jobs, args.only)
    if args.list:
        for job in jobs:
            print(job.name, "(done)" if plan.done_file(job).exists() else "")
        return
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, work):
        failed = run_jobs(plan, jobs, args)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run_jobs(plan: Plan, jobs: list[Job], args: argparse.Namespace) -> list[str]:
    """Run what is left of the jobs; the names of those that failed."""
    known = read_results(plan)["runs"]
    for job in jobs:
        # Those that ended when nobody was there to take it down.
        if job.about is not None and job.name not in known and plan.done_file(job).exists():
            add_result(plan, job)
    runner = Runner(plan, jobs, args.processes, 60 * args.minutes)
    try:
        runner.run()
    finally:
        if args.results is not None:
            copy_results(plan, args.results)
    if args.keep_best is not None:
        keep_best(plan, args.keep_best)
    return runner.failed


def chosen(jobs: list[Job], pattern: str) -> list[Job]:
    """The jobs whose names fit, and those that they need."""
    names = {job.name for job in jobs if fnmatch(job.name, pattern)}
    while more := {need for job in jobs if job.name in names for need in job.needs} - names:
        names |= more
    return [job for job in jobs if job.name in names]


def copy_results(plan: Plan, out: Path) -> None:
    """What is worth keeping of a machine that will be gone: figures, losses and logs."""
    out.mkdir(parents=True, exist_ok=True)
    if results_file(plan).exists():
        shutil.copy(results_file(plan), out)
    for folder in (plan.work / "jobs").glob("*"):
        for name in ("log.txt", "heads.json", "run/losses.csv"):
            if (folder / name).exists():
                target = out / folder.name / Path(name).name
                target.parent.mkdir(exist_ok=True)
                shutil.copy(folder / name, target)


if __name__ == "__main__":
    main()
