"""What a run keeps on the disk: its last good checkpoint, and the model in the end."""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.optimizers as optim

from ..checkpoints.names import SHIM
from ..checkpoints.writer import (
    DTYPE_NAMES,
    SHARD_BYTES,
    ShardWriter,
    TensorSpec,
    staged_folder,
    write_json,
)
from ..convert import CARRIED, SHIM_TEXT
from .config import Config
from .models import Student
from .report import naming

Weights = dict[str, mx.array]

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

STATE = "state.json"
NAME = re.compile(r"step-(\d{8})")
WEIGHT, SLOT = "weight", "optimizer"

# What a run must not change on its way, as the steps that are done would not be the same.
FIXED = ("student", "teacher", "dtype", "seed")
FIXED_IN_STAGE = ("objective", "length", "batch_size", "optimizer", "optimizer_config")

# What makes no other model.
FREE = ("out", "save_every", "grad_checkpoint", "micro_batch")


@dataclass
class State:
    """Where a run is, after a step of its optimizer.

    stage, step: the stage, and its steps that are done.
    steps: those of all stages.
    checksum: of the stage's tokens.
    config: of the run, as it was.
    models: fingerprints of the student, its tokenizer and the teacher.
    weights: float32, all that have been trained so far.
    slots: the optimizer's arrays of each weight, as a checkpoint had them.
    """

    stage: int = 0
    step: int = 0
    steps: int = 0
    checksum: Optional[int] = None
    config: dict = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)
    slots: dict[str, Weights] = field(default_factory=dict)

    @property
    def position(self) -> dict[str, Any]:
        names = ("stage", "step", "steps", "checksum", "config", "models")
        return {name: getattr(self, name) for name in names}

    def is_finished(self, stages: int) -> bool:
        """Whether the run that left this had no step left, and no other stage is asked for."""
        before = self.config.get("stages", [])
        if not len(before) == self.stage + 1 == stages:
            return False
        last = before[-1]
        return self.step >= -(-last["tokens"] // (last["batch_size"] * last["length"]))

    def hand_to(self, optimizer: optim.Optimizer) -> None:
        """Give an optimizer its arrays and its step, and keep none: they will change."""
        step = mx.array(self.step, mx.uint64)
        optimizer.state = {**optimizer.state, **self.slots, "step": step}
        self.slots = {}


class Checkpoints:
    """The newest checkpoint of a run and, until that one is proven, the one before it.

    It is proven when the step after it found a finite loss and gradient with its weights.
    """

    def __init__(self, out: Path):
        self.folder = out / "checkpoints"
        self._proven: Optional[Path] = None

    def newest(self) -> Optional[Path]:
        return max(self._all(), default=None)

    def save(self, state: State, optimizer: optim.Optimizer) -> None:
        """Write a checkpoint, whole or not at all; the one before stays.

        Raises:
            OSError: the disk is full.
        """
        arrays = {f"{WEIGHT}/{name}": w for name, w in state.weights.items()}
        for name, slots in optimizer.state.items():
            if isinstance(slots, dict):
                arrays |= {f"{SLOT}/{slot}/{name}": value for slot, value in slots.items()}
        with staged_folder(self.place(state)) as folder:
            write_arrays(folder, arrays)
            write_json(folder / STATE, state.position)

    def keep_newest(self) -> None:
        """Take the newest checkpoint as proven, and remove all else."""
        self._proven = self.newest()
        for path in self._all():
            if path != self._proven:
                discard(path)
        # What a killed run was about to write, or to remove.
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)

    def drop_ruined(self, state: State) -> None:
        """Remove the checkpoint of this very step, unless it is proven."""
        path = self.place(state)
        if path.exists() and path != self._proven:
            discard(path)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]

    def place(self, state: State) -> Path:
        return self.folder / f"step-{state.steps:08d}"

    def record(self, state: State) -> None:
        """Have the newest checkpoint say which run it is of in the end."""
        path = self.newest() / STATE
        partial = path.with_name(f".{STATE}")
        with naming(path):
            write_json(partial, state.position)
            os.replace(partial, path)

    def load(self, arrays: bool = True) -> State:
        """The newest checkpoint, or the start of a run; without weights where none are asked for.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.newest()
        if path is None:
            return State()
        if self._all() == [path]:
            self._proven = path
        try:
            state = State(**json.loads((path / STATE).read_text(encoding="utf-8")))
            for shard in sorted(path.glob("*.safetensors")) if arrays else ():
                for key, value in mx.load(str(shard)).items():
                    kind, _, name = key.partition("/")
                    if kind == WEIGHT:
                        state.weights[name] = value
                    else:
                        slot, _, name = name.partition("/")
                        state.slots.setdefault(name, {})[slot] = value
            mx.eval(state.weights, state.slots)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{path} cannot be read ({reason}): remove it to begin anew."
            ) from error
        return state


def check_same_run(
    state: State, config: Config, models: dict[str, str], out: Path
) -> dict[str, Any]:
    """The fields that differ from those of the run that left this state, and what they were.

    What an older state does not tell is taken to be the same.

    Raises:
        ValueError: one whose change would make another run of it, or another model at its place.
    """
    before, now = state.config, asdict(config)
    stages = before.get("stages", now["stages"])
    changed = {name: before[name] for name in differing(before, now) if name != "stages"}
    refused = [(name, before[name], now[name]) for name in FIXED if name in changed]
    if len(now["stages"]) != len(stages):
        changed["stages"] = stages
    if len(now["stages"]) <= state.stage:
        refused.append(("stages", f"{len(stages)} stages", len(now["stages"])))
    for number, (old, new) in enumerate(zip(stages, now["stages"])):
        names = differing(old, new)
        changed |= {f"stages[{number}].{name}": old[name] for name in names}
        if number == state.stage:
            refused += [
                (f"stages[{number}].{name}", old[name], new[name])
                for name in names
                if name in FIXED_IN_STAGE
            ]
    for name, old, new in refused:
        raise ValueError(
            f"{out} holds a run with {name}={old!r}, not {new!r}: give that again, or another out."
        )
    for name in differing(state.models, models):
        raise ValueError(
            f"{out} holds a run with another {name}: its files in "
            f"{config.teacher if name == 'teacher' else config.student} have changed since. Bring "
            "them back, or choose another out."
        )
    return changed


def check_finished(
    state: State, config: Config, models: dict[str, str], out: Path
) -> dict[str, Any]:
    """:func:`check_same_run` of a run without a step left.

    Raises:
        ValueError: the run would have made another model of this config.
    """
    changed = check_same_run(state, config, models, out)
    other = [name for name in changed if name.rpartition(".")[2] not in FREE]
    if other:
        raise ValueError(
            f"{out} holds a finished run with other {', '.join(other)}: give those again, or "
            "another out."
        )
    return changed


def differing(before: dict, now: dict) -> list[str]:
    return [name for name in now if now[name] != before.get(name, now[name])]


def discard(path: Path) -> None:
    """Remove a checkpoint so that no part of it is ever taken for one."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def write_arrays(folder: Path, arrays: Weights) -> None:
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in arrays.items()]
    with ShardWriter(folder, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def save_model(path: Path, student: Student, weights: Weights) -> None:
    """Write the trained model as convert.py writes one, in the dtypes that the student had.

    What was not trained is copied from the student to the bit.

    Raises:
        ValueError: there is something at ``path``, or a weight is not finite in its dtype.
        OSError: the disk is full; nothing is left behind.
    """
    reader = student.reader
    specs = [
        TensorSpec(name, info.shape, DTYPES[info.dtype]) for name, info in reader.tensors.items()
    ]
    parameters = sum(reader.read(spec.name).size for spec in specs)
    with staged_folder(path) as folder:
        writer = ShardWriter(folder, specs, shard_bytes=SHARD_BYTES, total_parameters=parameters)
        with writer:
            for spec in specs:
                trained = weights.get(spec.name)
                array = reader.read(spec.name) if trained is None else trained.astype(spec.dtype)
                if trained is not None and not mx.isfinite(array).all():
                    raise ValueError(
                        f"{path} is not written: {spec.name} is not finite in "
                        f"{DTYPE_NAMES[spec.dtype]}. Lower learning_rate, and choose another out."
                    )
                writer.write(spec.name, array)
                del array
        for pattern in ("config.json", *CARRIED):
            for file in reader.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        (folder / SHIM).write_text(SHIM_TEXT, encoding="utf-8")
