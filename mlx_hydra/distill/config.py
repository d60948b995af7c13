"""What a distillation does: its models, its data and its stages, from a YAML file or a preset."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.optimizers as optim
import yaml
from mlx_lm.lora import yaml_loader

from ..config import expect, from_known_fields, is_number

OBJECTIVES = ("attention", "logits", "next_token")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("bfloat16", "float32")
OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "lion": optim.Lion,
    "muon": optim.Muon,
    "sgd": optim.SGD,
}

PRESETS = resources.files(__package__) / "presets"


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def expect_choice(name: str, value: Any, choices) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(str(value).lower(), choices, 1, 0)[0]
        raise ValueError(
            f"{name}={value!r}: expected one of {', '.join(choices)}; did you mean {nearest!r}?"
        )


@dataclass(frozen=True)
class Source:
    """Where text comes from: a file, or a data set that the package ``datasets`` loads.

    file: a path; ``.jsonl`` and ``.ndjson`` hold one JSON object a line, any other one document.
    dataset, name, split: what ``datasets.load_dataset`` takes.
    field: where an object or a row holds its text.
    """

    file: Optional[str] = None
    dataset: Optional[str] = None
    name: Optional[str] = None
    split: str = "train"
    field: str = "text"

    def __post_init__(self):
        if (self.file is None) == (self.dataset is None):
            raise ValueError("data: expected either file or dataset in each entry.")
        for name in ("file", "dataset", "name", "split", "field"):
            value = getattr(self, name)
            expect(value is None or (isinstance(value, str) and value), name, value, "a name")

    def __str__(self) -> str:
        return self.file or f"dataset {self.dataset}"


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    objective: ``attention`` (the hybrid layers' attention outputs against the teacher's, all else
        frozen), ``logits`` (KL to the teacher's and cross-entropy), ``next_token``.
    tokens: how many are trained on, rounded up to whole steps.
    length: tokens of a sequence.
    batch_size: sequences of an optimizer step, over all processes together.
    micro_batch: sequences that a process holds at a time; the rest is gradient accumulation.
    learning_rate, schedule, warmup, final_learning_rate: the peak, its decay, the share of the
        steps that it rises in, and where it ends.
    optimizer, optimizer_config: a class of mlx.optimizers and its options.
    clip: the largest norm of the gradient; None for no clipping.
    kl_weight, ce_weight: of the two parts of ``logits``.
    data: text for this stage instead of the whole run's.
    """

    objective: str
    tokens: int
    length: int
    batch_size: int
    learning_rate: float
    micro_batch: int = 1
    schedule: str = "cosine"
    warmup: float = 0.02
    final_learning_rate: float = 0.0
    optimizer: str = "adamw"
    optimizer_config: dict = field(default_factory=dict)
    clip: Optional[float] = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    data: Any = None

    def __post_init__(self):
        expect_choice("objective", self.objective, OBJECTIVES)
        expect_choice("schedule", self.schedule, SCHEDULES)
        expect_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("tokens", "length", "batch_size", "micro_batch"):
            value = getattr(self, name)
            expect(is_count(value), name, value, "an integer from 1 up")
        for name in ("learning_rate", "final_learning_rate", "kl_weight", "ce_weight"):
            value = getattr(self, name)
            expect(is_number(value) and value >= 0, name, value, "a number from 0 up")
        holds = is_number(self.warmup) and 0 <= self.warmup <= 1
        expect(holds, "warmup", self.warmup, "a share of the steps, from 0 to 1")
        holds = self.clip is None or (is_number(self.clip) and self.clip > 0)
        expect(holds, "clip", self.clip, "a number over 0, or null for none")
        if self.objective != "logits" and (self.kl_weight, self.ce_weight) != (1.0, 1.0):
            raise ValueError(f"kl_weight and ce_weight do not apply to {self.objective!r}.")
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch={self.micro_batch}."
            )
        holds = isinstance(self.optimizer_config, dict)
        expect(holds, "optimizer_config", self.optimizer_config, "options and their values")
        options = list(inspect.signature(OPTIMIZERS[self.optimizer]).parameters)
        options.remove("learning_rate")
        for name in self.optimizer_config:
            expect_choice("optimizer_config", name, options)
        self._try_optimizer()
        if self.data is not None:
            object.__setattr__(self, "data", read_sources(self.data))

    def _try_optimizer(self) -> None:
        # mlx.optimizers does not look at the options before the first update.
        try:
            optimizer = OPTIMIZERS[self.optimizer](1e-3, **self.optimizer_config)
            found = optimizer.apply_gradients({"w": mx.ones((2, 2))}, {"w": mx.ones((2, 2))})
            holds, reason = mx.isfinite(found["w"]).all().item(), "its update is not finite"
        except (TypeError, ValueError, AttributeError) as error:
            holds, reason = False, str(error).split("\n")[0]
        if not holds:
            raise ValueError(
                f"optimizer_config={self.optimizer_config!r} does not fit {self.optimizer!r}: "
                f"{reason}."
            )

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.batch_size * self.length))

    def schedule_of_steps(self) -> Callable[[mx.array], mx.array]:
        """The learning rate of each step, counted from 0."""
        peak, last = self.learning_rate, self.final_learning_rate
        warmup = round(self.warmup * self.steps)
        left = max(1, self.steps - warmup)
        decay = {
            "constant": lambda step: mx.array(peak),
            "linear": optim.linear_schedule(peak, last, left),
            "cosine": optim.cosine_decay(peak, left, last),
        }[self.schedule]
        if not warmup:
            return decay
        # Not from 0: the first step is to train, too.
        rise = optim.linear_schedule(peak / (warmup + 1), peak, warmup)
        return optim.join_schedules([rise, decay], [warmup])

    def make_optimizer(self) -> optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.schedule_of_steps(), **self.optimizer_config)


@dataclass(frozen=True)
class Config:
    """A whole run.

    student: folder of a HydraHead model as convert.py writes it; its tokenizer is used.
    teacher: folder or repository of a Qwen3 model; not needed for ``next_token`` alone.
    data: a file, or a list of files and :class:`Source` entries.
    out: folder of the checkpoints, the loss curves and, in the end, the model.
    dtype: of the computation; the weights that train are float32.
    seed: of the order of the sequences, the only thing that is drawn.
    save_every: steps between checkpoints.
    grad_checkpoint: recompute each layer in the backward pass: less memory, more time.
    """

    student: str
    out: str
    data: Any
    stages: Any
    teacher: Optional[str] = None
    dtype: str = "bfloat16"
    seed: int = 0
    save_every: int = 200
    grad_checkpoint: bool = True

    def __post_init__(self):
        for name in ("student", "out", "teacher"):
            value = getattr(self, name)
            holds = (isinstance(value, str) and value) or (name == "teacher" and value is None)
            expect(holds, name, value, "a path")
        expect_choice("dtype", self.dtype, DTYPES)
        holds = isinstance(self.seed, int) and self.seed >= 0
        expect(holds, "seed", self.seed, "an integer from 0 up")
        expect(is_count(self.save_every), "save_every", self.save_every, "an integer from 1 up")
        holds = isinstance(self.grad_checkpoint, bool)
        expect(holds, "grad_checkpoint", self.grad_checkpoint, "true or false")
        object.__setattr__(self, "data", read_sources(self.data))
        holds = isinstance(self.stages, list) and self.stages
        expect(holds, "stages", self.stages, "a list of at least one stage")
        stages = [build(Stage, s, f"stages[{i}]") for i, s in enumerate(self.stages)]
        object.__setattr__(self, "stages", stages)
        if self.teacher is None and any(s.objective != "next_token" for s in stages):
            raise ValueError("teacher is missing: only next_token does without one.")


def build(cls, values: Any, where: str):
    """Make a dataclass from YAML; a ValueError names the place, the field and what it should be."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected fields and their values.")
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise ValueError(f"{where}: {f.name} is missing.")
    try:
        return from_known_fields(cls, values, where)
    except ValueError as error:
        if str(error).startswith(f"{where}."):
            raise
        raise ValueError(f"{where}: {error}") from error


def read_sources(data: Any) -> list[Source]:
    entries = data if isinstance(data, list) else [data]
    expect(entries, "data", data, "a file or a list of them")
    return [
        build(Source, {"file": entry} if isinstance(entry, str) else entry, f"data[{i}]")
        for i, entry in enumerate(entries)
    ]


def presets() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir())


def load_config(source: str, changes: dict[str, Any]) -> Config:
    """Read a run from a YAML file or the name of a preset; ``changes`` go before what it says.

    A file may name a preset to start from (``preset: laptop``); its own fields replace the
    preset's, ``stages`` as a whole.

    Raises:
        ValueError: no such file, not YAML, a field that is unknown, missing or of a wrong kind.
    """
    values = read_yaml(source)
    if (name := values.pop("preset", None)) is not None:
        expect_choice(f"{source}: preset", name, presets())
        values = {**read_yaml(name), **values}
    values |= {name: value for name, value in changes.items() if value is not None}
    return build(Config, values, source)


def read_yaml(source: str) -> dict:
    known = presets()
    path = PRESETS / f"{source}.yaml" if source in known else Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"--config {source}: no such file, and no preset; the presets are {', '.join(known)}."
        ) from None
    except OSError as error:
        raise ValueError(f"--config {source}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {source}: not UTF-8 (byte {error.start}).") from error
    try:
        values = yaml.load(text, yaml_loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {source}: not YAML: {error}.") from error
    expect(isinstance(values, dict), f"--config {source}", values, "fields and their values")
    return values
