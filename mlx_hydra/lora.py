"""The lora command: mlx_lm.lora with everything frozen but LoRA on the linear heads."""

import difflib
import hashlib
import math
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.lora
import numpy as np
import yaml
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.utils import load_adapters

from .checkpoints.reader import read_header
from .cli import ArgumentParser, as_option, command
from .config import MODEL_TYPE, ModelArgs, expect
from .loading import find_model, load, read_config
from .lora_data import check_data

# The projections of the linear heads, by their names in a layer, which are mlx-lm's keys.
KEYS = tuple(f"self_attn.linear.{part}_proj" for part in "qkvabg")

DEFAULTS = {**mlx_lm.lora.CONFIG_DEFAULTS, "model": None, "data": None, "num_layers": -1}

# Tokens of the first example, on which adapters are tried before they are saved.
PROBE = 64

COUNTS = (
    "iters",
    "batch_size",
    "max_seq_length",
    "grad_accumulation_steps",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
)

ADAPTER = re.compile(r"model\.layers\.\d+\.self_attn\.linear\.[qkvabg]_proj\.(lora_a|lora_b|m)")


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    check_data(args)
    path = find_model(args.model)
    check_model(read_config(path, args.trust_remote_code), path, args)
    if args.resume_adapter_file is not None:
        check_resumed(args)

    np.random.seed(args.seed)
    callback = get_reporting_callbacks(
        args.report_to,
        project_name=args.project_name,
        log_dir=args.adapter_path,
        config=vars(args),
    )
    options = {"trust_remote_code": True} if args.trust_remote_code else None
    model, tokenizer, _ = load(
        str(path), tokenizer_config=options, trust_remote_code=args.trust_remote_code
    )
    train_set, valid_set, test_set = load_dataset(args, tokenizer)
    if args.train:
        before = digests(model)
        train(args, model, train_set, valid_set, callback)
    elif args.adapter_path:
        load_adapters(model, args.adapter_path)
    if args.test:
        mlx_lm.lora.evaluate_model(args, model, test_set)
    if args.train and mx.distributed.init().rank() == 0:
        report = Report.of(model, before, Path(args.adapter_path) / "adapters.safetensors")
        report.show(args)
        if report.faults:
            sys.exit(1)


def parse_args(argv: Optional[Sequence[str]]) -> Namespace:
    """mlx_lm.lora's options: from the command line, then a YAML file, then the defaults.

    Raises:
        ValueError: an option that is missing or wrong, or keys beyond the linear heads.
    """
    parser = ArgumentParser(
        description="mlx_lm.lora with everything frozen but LoRA on the linear heads. It takes "
        "mlx_lm.lora's options; --num-layers is all layers unless told otherwise.",
        parents=[mlx_lm.lora.build_parser()],
        conflict_handler="resolve",
    )
    given = vars(parser.parse_args(argv))
    for settings in (read_settings(given["config"]), DEFAULTS):
        given |= {name: value for name, value in settings.items() if given.get(name) is None}
    given.setdefault("trust_remote_code", False)
    args = Namespace(**given)

    if args.model is None:
        raise ValueError("--model is missing: expected a HydraHead model's folder or repository.")
    if not args.train and not args.test:
        raise ValueError("Nothing to do: give --train, --test or both.")
    if args.fine_tune_type not in ("lora", "dora"):
        raise ValueError(
            f"--fine-tune-type {args.fine_tune_type}: expected lora or dora; everything but the "
            "adapters stays frozen here."
        )
    for name in COUNTS:
        value = getattr(args, name)
        expect(isinstance(value, int) and value > 0, as_option(name), value, "1 or more")
    for name in ("val_batches", "test_batches"):
        value = getattr(args, name)
        holds = isinstance(value, int) and (value > 0 or value == -1)
        expect(holds, as_option(name), value, "1 or more, or -1 for the whole set")
    expect(args.max_seq_length > 1, "--max-seq-length", args.max_seq_length, "2 or more")
    if args.save_every <= args.iters:
        # mlx-lm saves right after a report, which is where Guard can keep it from it.
        args.steps_per_report = math.gcd(args.steps_per_report, args.save_every)
    args.lora_parameters = lora_parameters(args.lora_parameters)
    return args


def read_settings(path: Optional[str]) -> dict[str, Any]:
    """What a YAML file for ``mlx_lm.lora -c`` sets."""
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.load(text, mlx_lm.lora.yaml_loader)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: expected options, a name and a value each.")
    return settings


def lora_parameters(given: Any) -> dict[str, Any]:
    """mlx-lm's ``lora_parameters`` with the keys of linear heads: all, or the ones given."""
    known = {**mlx_lm.lora.CONFIG_DEFAULTS["lora_parameters"], "keys": list(KEYS)}
    expect(isinstance(given, dict), "lora_parameters", given, "an object")
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, 1, 0)[0]
            raise ValueError(f"lora_parameters.{name} is not known; did you mean {nearest!r}?")
    parameters = {**known, **given}
    rank = parameters["rank"]
    expect(isinstance(rank, int) and rank > 0, "lora_parameters.rank", rank, "1 or more")
    keys = parameters["keys"]
    expect(isinstance(keys, list) and keys, "lora_parameters.keys", keys, "a list of names")
    for key in keys:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, 1, 0)[0]
            raise ValueError(
                f"lora_parameters.keys: {key!r} is no projection of the linear heads, and all "
                f"else stays frozen here; the nearest is {nearest!r}."
            )
    return parameters


def check_model(config: dict, path: Path, args: Namespace) -> None:
    """Raise a ValueError unless the layers that are to be trained have linear heads."""
    if config["model_type"] != MODEL_TYPE:
        raise ValueError(
            f"{path} has no linear heads (model_type {config['model_type']!r}): expected a "
            "HydraHead model; mlx_hydra.convert makes one of a Qwen3 checkpoint."
        )
    model = ModelArgs.from_dict(config)
    layers, count = model.num_hidden_layers, args.num_layers
    holds = isinstance(count, int) and (count == -1 or 1 <= count <= layers)
    expect(holds, "--num-layers", count, f"1 to {layers}, or -1 for all")
    trained = range(layers)[-max(count, 0) :]
    if not any(model.layer_heads(layer).linear for layer in trained):
        with_linear = [layer for layer in range(layers) if model.layer_heads(layer).linear]
        where = f"the last layer that has some is {with_linear[-1]}" if with_linear else "none has"
        raise ValueError(
            f"{path} has no linear heads in its last {len(trained)} of {layers} layers: {where}."
        )


def check_resumed(args: Namespace) -> None:
    """Raise a ValueError unless --resume-adapter-file holds adapters such as these."""
    file = Path(args.resume_adapter_file)
    where = f"--resume-adapter-file {file}"
    if not file.is_file():
        raise ValueError(f"{where}: no such file.")
    rank = args.lora_parameters["rank"]
    for name, tensor in read_header(file).items():
        if not ADAPTER.fullmatch(name):
            raise ValueError(f"{where} holds {name}, which is no adapter of linear heads.")
        if name.endswith("lora_a") and tensor.shape[1] != rank:
            raise ValueError(f"{where} is of rank {tensor.shape[1]}, this run of rank {rank}.")


def train(
    args: Namespace,
    model: nn.Module,
    train_set: Any,
    valid_set: Any,
    callback: Optional[TrainingCallback],
) -> None:
    """mlx-lm's training under a guard; where no adapters get saved, their config is put back."""
    tokens, _ = train_set.process(train_set[0])
    guard = Guard(args, model, mx.array(tokens[:PROBE])[None], callback)
    config = Path(args.adapter_path) / "adapter_config.json"
    before = config.read_bytes() if config.exists() else None
    try:
        mlx_lm.lora.train_model(args, model, train_set, valid_set, guard)
    except BaseException:
        # Of several processes the first alone: another may have found what that had written.
        if not guard.saved and mx.distributed.init().rank() == 0:
            put_back(config, before)
        raise


def put_back(config: Path, before: Optional[bytes]) -> None:
    """Leave adapter_config.json as it was; where there was none, remove the folder with it."""
    if before is not None:
        config.write_bytes(before)
        return
    with suppress(OSError):
        config.unlink()
        config.parent.rmdir()


class Guard(TrainingCallback):
    """Stops training before mlx-lm saves adapters that are ruined.

    mlx-lm calls it with each loss that it reports. Where adapters are to be saved it looks at them
    too, and at the logits of ``tokens``, [1, L]: a step whose loss was finite may have ruined them.

    saved: the iteration whose adapters were saved last; 0 while none were.

    Raises:
        ValueError: something is not finite.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        tokens: mx.array,
        callback: Optional[TrainingCallback],
    ):
        self.args, self.model, self.tokens = args, model, tokens
        self.callback = callback or TrainingCallback()
        self.saved = 0

    def on_val_loss_report(self, val_info: dict) -> None:
        self.callback.on_val_loss_report(val_info)
        # It may be the data's fault: of a prompt that fills the length nothing is left to score.
        if not math.isfinite(val_info["val_loss"]) and not self.adapters_are_fit():
            self.stop(f"the validation loss is {val_info['val_loss']}", val_info["iteration"])

    def on_train_loss_report(self, train_info: dict) -> None:
        self.callback.on_train_loss_report(train_info)
        iteration = train_info["iteration"]
        if not math.isfinite(loss := train_info["train_loss"]):
            self.stop(f"the training loss is {loss}", iteration)
        if iteration % self.args.save_every == 0 or iteration == self.args.iters:
            if not self.adapters_are_fit():
                self.stop("the adapters are ruined", iteration)
            self.saved = iteration

    def adapters_are_fit(self) -> bool:
        # As in validation: dropout would draw numbers that are training's.
        self.model.eval()
        logits = self.model(self.tokens)
        self.model.train()
        adapters = [x for _, x in tree_flatten(self.model.trainable_parameters())]
        return all(mx.isfinite(x).all().item() for x in (logits, *adapters))

    def stop(self, what: str, iteration: int) -> NoReturn:
        when, advice = f"by iteration {iteration}", "Lower --learning-rate"
        if iteration == 0:
            when = "before the first iteration"
            advice = "Check the weights of the model, and of --resume-adapter-file"
        if self.args.mask_prompt:
            advice += ", or raise --max-seq-length if prompts fill it"
        kept = f"holds the adapters of iteration {self.saved}" if self.saved else "is as it was"
        raise ValueError(
            f"Training is stopped: {what} {when}; {self.args.adapter_path} {kept}. {advice}."
        )


def digests(model: nn.Module) -> dict[str, str]:
    """A hash of every parameter but the adapters, by its name in the model without them."""
    found = {}
    for name, x in tree_flatten(model.parameters()):
        if not ADAPTER.fullmatch(name):
            bits = memoryview(mx.contiguous(x).reshape(-1).view(mx.uint8))
            kind = f"{x.dtype} {x.shape}".encode()
            found[base_name(name)] = hashlib.sha256(kind + bits).hexdigest()
    return found


def base_name(name: str) -> str:
    """A parameter's name as it was before its projection was wrapped in an adapter."""
    return re.sub(r"(\.self_attn\.linear\.[qkvabg]_proj)\.linear\.", r"\1.", name)


@dataclass(frozen=True)
class Report:
    """What training left unchanged to the bit, and what the adapters are.

    base, full: names of the model's parameters; of those of its full heads.
    changed: base parameters that are not what they were.
    stray: tensors in the adapter file that are no adapters of linear heads.
    broken: adapters with a value that is not finite.
    adapters, trained: tensors in the adapter file, and their numbers.
    layers: layers with adapters.
    """

    base: Sequence[str]
    full: Sequence[str]
    changed: Sequence[str]
    stray: Sequence[str]
    broken: Sequence[str]
    adapters: int
    trained: int
    layers: int

    @classmethod
    def of(cls, model: nn.Module, before: dict[str, str], file: Path) -> "Report":
        """Compare a trained model with the digests from before, and read its adapter file."""
        after, saved = digests(model), mx.load(str(file))
        return cls(
            base=sorted(before),
            full=[name for name in sorted(before) if ".self_attn.full." in name],
            changed=[n for n in sorted({*before, *after}) if before.get(n) != after.get(n)],
            stray=[name for name in sorted(saved) if not ADAPTER.fullmatch(name)],
            broken=[name for name, x in sorted(saved.items()) if not mx.isfinite(x).all()],
            adapters=len(saved),
            trained=sum(x.size for x in saved.values()),
            layers=len({name.split(".self_attn.")[0] for name in saved}),
        )

    @property
    def faults(self) -> list[str]:
        return [
            f"{name} {fault}"
            for names, fault in (
                (self.changed, "is not what it was before training"),
                (self.stray, "is in the adapter file and is no adapter of linear heads"),
                (self.broken, "has values that are not finite"),
            )
            for name in names
        ]

    def show(self, args: Namespace) -> None:
        """Print the report, and on standard error what is wrong."""
        changed = set(self.changed)
        same, of_full = len(set(self.base) - changed), len(set(self.full) - changed)
        print(
            f"Unchanged to the bit: {same:,} of {len(self.base):,} tensors of the model, and of "
            f"the full heads' {of_full:,} of {len(self.full):,}.\n"
            f"{args.adapter_path}: {self.adapters:,} tensors, {self.trained:,} numbers, on the "
            f"linear heads of {self.layers} layers."
        )
        for fault in self.faults:
            print(f"error: {fault}.", file=sys.stderr)


if __name__ == "__main__":
    main()
