"""Tiny distillations: a teacher, a student and a text on disk, and runs of the command on them."""

import csv
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import convert, heads_file, write_qwen3
from tiny import write_tokenizer

from mlx_hydra.distill.command import main

# Two hybrid layers; the one between them keeps all of its heads.
HEADS = [[0], [0, 1, 2, 3], [1, 2]]
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2}

LENGTH = 16


def write_models(folder: Path, *, recipe: str = "paper", dtype=mx.float32, **changes) -> None:
    """``teacher`` and ``student`` in a folder."""
    teacher = folder / "teacher"
    write_qwen3(teacher, dtype=dtype, **{**SIZES, **changes})
    write_tokenizer(teacher)
    heads = heads_file(folder / "heads.json", HEADS, 4)
    convert(teacher, folder / "student", "--heads", heads, "--recipe", recipe)


def write_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """Random words of which each second one follows from the one before it."""
    first = np.random.default_rng(seed).integers(0, 50, words // 2)
    path.write_text("".join(f"w{n} w{(7 * n + 1) % 50}\n" for n in first))
    return path


def write_folder(folder: Path) -> Path:
    """Models and text, where :func:`write_config` has them."""
    write_models(folder)
    write_text(folder / "text.txt")
    return folder


def stage(objective: str, steps: int = 4, **changes) -> dict:
    values = {"objective": objective, "length": LENGTH, "batch_size": 4, "learning_rate": 0.003}
    values |= {"micro_batch": 2, **changes}
    return {**values, "tokens": steps * values["batch_size"] * values["length"]}


def write_config(path: Path, stages: list[dict], **changes) -> Path:
    """A YAML file (JSON is YAML) of a run on what stands beside it."""
    folder = path.parent
    content = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": str(folder / "text.txt"),
        "out": str(path.with_suffix("")),
        "dtype": "float32",
        "stages": stages,
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def distill(path: Path, *options) -> Path:
    """Run the command; the folder of the run."""
    main(["--config", str(path), *map(str, options)])
    return Path(json.loads(path.read_text())["out"])


def refusal(capfd, path: Path, *options) -> str:
    """The one line that the command ends in."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as error:
        distill(path, *options)
    assert error.value.code == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def figures(out: Path, *names: str) -> list[tuple[str, ...]]:
    """Columns of losses.csv, as they are written there."""
    with open(out / "losses.csv", newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def losses(out: Path, stage: int) -> list[float]:
    return [float(loss) for n, loss in figures(out, "stage", "loss") if int(n) == stage]
