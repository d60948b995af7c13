"""The reproduction as a list of jobs, in the order in which they are worth most."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from prepare import data_file, without_first

MEASURED = ("causal", "attention")
# What ablations change, at the recipe's first ratio and seed.
ABLATED = "causal"


@dataclass(frozen=True)
class Job:
    """Commands in a process of their own.

    needs: names of the jobs that must be done before.
    about: what results.json says of it; None for what is only a step towards the others.
    """

    name: str
    commands: list[dict]
    needs: tuple[str, ...] = ()
    about: dict | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs of a recipe.

    work: folder of everything that they write.
    """

    recipe: dict
    recipe_file: Path
    teacher: Path
    work: Path
    shared: Path = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "shared", self.work / "shared")

    def folder(self, name: str) -> Path:
        return self.work / "jobs" / name

    def jobs(self) -> list[Job]:
        prepare = [self._prepare("probes"), self._prepare("data")]
        scores = [self._scores(method) for method in MEASURED if method in self.recipe["methods"]]
        teacher = Job(
            "teacher",
            [self._evaluate("teacher", self.teacher)],
            ("data",),
            {"method": "teacher", "ratio": 1.0, "seed": 0, "ablation": None},
        )
        runs = [self._run(*key) for key in self._order()]
        return [*prepare, *scores, runs[0], teacher, *runs[1:]]

    def _order(self) -> Iterator[tuple]:
        """An early end still leaves a whole table: seed 0 everywhere, before any other seed."""
        recipe = self.recipe
        ratios, (first, *others) = recipe["ratios"], recipe["seeds"]
        for ratio in ratios:
            yield from ((method, ratio, first, None) for method in recipe["methods"])
            if ratio == ratios[0]:
                yield from ((ABLATED, ratio, first, name) for name in recipe["ablations"])
        for ratio in ratios:
            for seed in others:
                yield from ((method, ratio, seed, None) for method in recipe["methods"])

    def _prepare(self, part: str) -> Job:
        arguments = ["--teacher", self.teacher, "--out", self.shared, "--recipe", self.recipe_file]
        return Job(part, [command("prepare.py", *arguments, "--only", part)])

    def _scores(self, method: str) -> Job:
        out = self._scores_file(method)
        arguments = ["--model", self.teacher, "--method", method, "-o", out]
        probes = ["--probes", self.shared / "probes.jsonl"]
        return Job(
            f"scores-{method}",
            [command("mlx_hydra.select", *arguments, *probes, makes=out)],
            ("probes",),
        )

    def _scores_file(self, method: str) -> Path:
        return self.folder(f"scores-{method}") / "heads.json"

    def _run(self, method: str, ratio: float, seed: int, ablation: str | None) -> Job:
        change = self.recipe["ablations"][ablation] if ablation else {}
        about = {"method": method, "ratio": ratio, "seed": seed, "ablation": ablation}
        name = f"{method}-{ratio}-{ablation or 'whole'}-{seed}"
        folder = self.folder(name)
        heads, student, run = folder / "heads.json", folder / "student", folder / "run"

        select = ["--model", self.teacher, "--full-ratio", ratio, "-o", heads]
        needs, commands = ("data",), []
        if method in MEASURED:
            needs, scores = ("data", f"scores-{method}"), self._scores_file(method)
            if change.get("receivers_alone"):
                scores = folder / "scores.json"
                arguments = [self._scores_file(method), scores]
                commands = [command("receivers.py", *arguments, makes=scores)]
            select += ["--scores", scores]
        else:
            # The seed of what is random; the others do not heed it.
            select += ["--method", method, "--seed", seed]
        if "min_per_layer" in change:
            select += ["--min-per-layer", change["min_per_layer"]]
        convert = ["--hf-path", self.teacher, "--mlx-path", student, "--heads", heads]
        if change.get("calibrate", True):
            convert += ["--calibrate", self.shared / "calibration.txt"]
        commands += [
            command("mlx_hydra.select", *select, makes=heads),
            command("mlx_hydra.convert", *convert, makes=student),
        ]
        if "config" in change:
            commands.append(command("change_config.py", student, json.dumps(change["config"])))
        distill = ["--config", folder / "distill.yaml", "--teacher", self.teacher]
        distill += ["--student", student, "--out", run]
        commands += [
            command("mlx_hydra.distill", *distill, makes=run / "model"),
            self._evaluate(name, run / "model"),
        ]
        return Job(name, commands, needs, about)

    def _evaluate(self, name: str, model: Path) -> dict:
        evaluation, out = self.recipe["evaluate"], self.folder(name) / "evaluation.json"
        arguments = ["--model", model, "--out", out, "--exams", self.shared / "exams"]
        arguments += ["--questions", evaluation["questions"], "--lengths", *evaluation["lengths"]]
        return command("evaluate.py", *arguments, makes=out)

    def set_up(self, job: Job) -> Path:
        """Write what a job starts from, and return the file for chain.py."""
        folder = self.folder(job.name)
        folder.mkdir(parents=True, exist_ok=True)
        if job.about is not None and job.name != "teacher":
            (folder / "distill.yaml").write_text(yaml.safe_dump(self._config(job.about)))
            data = folder / "run" / "data"
            if not data.exists():
                # Read by all runs, made once.
                data.parent.mkdir(exist_ok=True)
                data.symlink_to((self.shared / "tokens").resolve())
        path = folder / "job.json"
        content = {
            "commands": job.commands,
            "gigabytes": self.recipe["gigabytes"],
            "done": str(self.done_file(job)),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def _config(self, about: dict) -> dict:
        distill = self.recipe["distill"]
        stages = distill["stages"]
        if about["ablation"] and self.recipe["ablations"][about["ablation"]].get("without_stage_1"):
            stages = without_first(stages)
        stages = [{**s, "data": str(data_file(self.shared, s["length"]))} for s in stages]
        return {**distill, "seed": about["seed"], "data": stages[0]["data"], "stages": stages}

    def done_file(self, job: Job) -> Path:
        return self.folder(job.name) / "done.json"


def command(*words, makes: Path | None = None) -> dict:
    return {"command": [str(word) for word in words], "makes": makes and str(makes)}
