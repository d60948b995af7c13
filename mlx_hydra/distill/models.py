"""The student and its teacher: loaded, and checked against each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.migrate import RECIPES
from ..checkpoints.reader import CheckpointReader
from ..config import MODEL_TYPE, FullAttentionArgs, ModelArgs
from ..hub import find_folder
from ..loading import (
    FETCHED,
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    tokenizer_fingerprint,
)
from ..models.hydrahead import Model, may_cast

# What the hidden states depend on, and what the logits do.
HIDDEN_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
LOGIT_SIZES = ("vocab_size",)


@dataclass
class Student:
    """A HydraHead model, its weights read from ``reader`` as they are asked for."""

    model: Model
    reader: CheckpointReader
    tokenizer: TokenizerWrapper

    @property
    def args(self) -> ModelArgs:
        return self.model.args

    def hybrid_layers(self) -> list[int]:
        """The layers whose attention is not the teacher's own."""
        exact = FullAttentionArgs(**RECIPES["exact"]["full_attention"])
        args = self.args
        if args.full_attention != exact or args.fusion.norm is True:
            return list(range(args.num_hidden_layers))
        return [n for n in range(args.num_hidden_layers) if args.layer_heads(n).linear]


def load_student(path: str) -> Student:
    """A student, whose weights stay on the disk until they are used.

    Raises:
        ValueError: not a float HydraHead model in MLX's layout, or one without a tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"student {path}: no such folder; make it with convert.py.")
    config = read_config(folder)
    if config["model_type"] != MODEL_TYPE:
        raise ValueError(
            f"student {path}: its model_type is {config['model_type']!r}; expected "
            f"{MODEL_TYPE!r}: convert it with convert.py first."
        )
    if config.get("quantization"):
        raise ValueError(f"student {path}: it is quantised; train it before it is quantised.")
    reader = CheckpointReader(folder)
    model = Model(ModelArgs.from_dict(config))
    weights = model.sanitize({name: reader.read(name) for name in reader.tensors})
    model.load_weights(list(weights.items()))
    return Student(model, reader, load_tokenizer(folder, config))


def load_teacher(path: str, student: Student, sizes: tuple[str, ...], dtype: mx.Dtype) -> nn.Module:
    """A Qwen3 model, quantised or not, that agrees with the student in ``sizes``.

    Raises:
        ValueError, OSError: another kind of model, other sizes, or none at all.
    """
    folder = find_folder("teacher", path, FETCHED)
    config = read_config(folder)
    if config["model_type"] != "qwen3":
        raise ValueError(
            f"teacher {path}: its model_type is {config['model_type']!r}; expected 'qwen3'."
        )
    for name in sizes:
        given, expected = config.get(name), getattr(student.args, name)
        if given != expected:
            raise ValueError(
                f"teacher {path} and student {student.reader.folder} do not match: {name} is "
                f"{given} and {expected}."
            )
    teacher, _ = load_model(folder)
    teacher.freeze()
    teacher.set_dtype(dtype)
    return teacher


def fingerprints(student: Student, teacher: Optional[str]) -> dict[str, str]:
    """What tells the models of a run from others, whatever their paths: hashes of their files."""
    folder = student.reader.folder
    found = {"student": fingerprint(folder), "tokenizer": tokenizer_fingerprint(folder)}
    if teacher is not None:
        found["teacher"] = fingerprint(find_folder("teacher", teacher, FETCHED))
    return found


def cast(name: str, weight: mx.array, dtype: mx.Dtype) -> mx.array:
    """A weight as it is computed with: some stay float32."""
    return weight.astype(dtype) if may_cast(name) else weight
