"""The convert command: a Qwen3 or HydraHead checkpoint to MLX, or a HydraHead one to PyTorch."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Optional

import mlx.core as mx
from rich.console import Console
from rich.progress import DownloadColumn, TimeRemainingColumn
from rich.table import Table

from .checkpoints import names
from .checkpoints.calibrate import Calibration
from .checkpoints.migrate import RECIPES, check_teacher, migrate, migrated_config
from .checkpoints.plan import Conversion, Quantization
from .checkpoints.reader import CheckpointReader
from .checkpoints.writer import (
    SHARD_BYTES,
    ShardWriter,
    check_vacant,
    staged_folder,
    write_json,
)
from .cli import ArgumentParser, as_option, command, progress_bar
from .config import MODEL_TYPE, ModelArgs, load_heads, spread_heads
from .hub import find_folder

DEFAULT_FULL_RATIO = 0.25
DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64
DTYPES = ("float32", "float16", "bfloat16")

# What a checkpoint brings besides its weights and config. Never its Python files.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.json",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)

FETCHED = ("config.json", "*.safetensors", "*.safetensors.index.json", *CARRIED)

# Lets mlx-lm load the model with --trust-remote-code, without an import of mlx_hydra before it.
SHIM_TEXT = '''\
"""The architecture of this model, for mlx-lm: it is in the package mlx-hydra."""

try:
    from mlx_hydra.models.hydrahead import Model, ModelArgs
except ImportError as error:
    raise ImportError("This is a HydraHead model: pip install mlx-hydra") from error

__all__ = ["Model", "ModelArgs"]
'''


@command
def main(argv: Optional[list[str]] = None) -> None:
    options = build_parser().parse_args(argv)
    check_options(options)
    reader = CheckpointReader(find_folder("--hf-path", options.hf_path, FETCHED, options.revision))
    calibration = None
    if options.calibrate is not None:
        calibration = Calibration(reader, options.calibrate)
    plan = make_plan(reader, options, calibration)
    if options.dry_run:
        print_plan(plan)
    else:
        if calibration is not None:
            calibrate(calibration, plan.args)
        carry_out(plan, reader, options.mlx_path)
    print_summary(plan, None if options.dry_run else options.mlx_path)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Convert a Hugging Face Qwen3 or HydraHead checkpoint to MLX.",
    )
    add = parser.add_argument
    add("--hf-path", required=True, help="folder of the checkpoint, or a repository on the Hub")
    add("--mlx-path", help="folder to write; it must not exist yet")
    add("--revision", help="branch, tag or commit of the repository")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--heads", metavar="FILE", help="heads.json: the heads that stay full")
    heads.add_argument(
        "--full-ratio",
        metavar="F",
        type=float,
        help=f"share of heads that stay full, spread over the layers ({DEFAULT_FULL_RATIO})",
    )
    heads.add_argument("--all-full", action="store_true", help="every head stays full")
    add("--recipe", choices=RECIPES, help="paper, or exact: full heads stay the teacher's own")
    add("--calibrate", metavar="FILE", help="text to measure the heads' scales (gamma) on")
    add("-q", "--quantize", action="store_true", help="quantise the weights")
    add("--q-bits", type=int, choices=(4, 8), help=f"bits a weight ({DEFAULT_BITS})")
    add(
        "--q-group-size",
        type=int,
        choices=(32, 64, 128),
        help=f"weights that share a scale ({DEFAULT_GROUP_SIZE})",
    )
    add("--dtype", choices=DTYPES, help="of all but what stays float32; default: the source's")
    add("--dry-run", action="store_true", help="print what becomes of each tensor, write nothing")
    add("--to-hf", action="store_true", help="from MLX's layout back to PyTorch's")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise a ValueError for options that do not go together, before anything is fetched."""
    if options.mlx_path is None and not options.dry_run:
        raise ValueError("--mlx-path is missing: expected the folder to write, or --dry-run.")
    if not options.quantize:
        for name in ("q_bits", "q_group_size"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{as_option(name)} {value}: expected -q with it.")
    if options.to_hf and options.quantize:
        raise ValueError("-q and --to-hf: PyTorch's layout has no form for MLX's packed weights.")
    if options.mlx_path is not None:
        check_vacant(Path(options.mlx_path).expanduser())


def make_plan(
    reader: CheckpointReader, options: argparse.Namespace, calibration: Optional[Calibration]
) -> Conversion:
    """What the source and the options ask for.

    Raises:
        ValueError: an option that does not apply to such a source, or a source that cannot be
            converted.
    """
    config = reader.config
    model_type, head_order = config.get("model_type"), config.get("head_order", "full_first")
    if model_type not in ("qwen3", MODEL_TYPE):
        raise ValueError(
            f"model_type={model_type!r} in {reader.folder}: expected 'qwen3' or {MODEL_TYPE!r}."
        )
    for name in ("quantization", "quantization_config"):
        if config.get(name):
            raise ValueError(
                f"{reader.folder} is quantised ({name} in its config): expected float weights."
            )
    if model_type == "qwen3":
        refuse(options, "to_hf", "a Qwen3 checkpoint; expected a HydraHead one in MLX's layout")
        plan = plan_migration(config, options, calibration)
    else:
        for name in ("heads", "full_ratio", "all_full", "recipe", "calibrate"):
            refuse(options, name, "a HydraHead checkpoint, whose heads are chosen")
        args = ModelArgs.from_dict(config)
        if options.to_hf:
            if head_order == "teacher":
                raise ValueError(f"--to-hf: {reader.folder} is in PyTorch's layout already.")
            plan = Conversion(names.pytorch_config(config), args, names.to_pytorch(args), "pt")
        elif head_order == "full_first":
            raise ValueError(
                f"{reader.folder} is in MLX's layout already: use --to-hf to bring it to PyTorch, "
                "mlx_lm.convert to quantise it."
            )
        else:
            plan = Conversion(names.mlx_config(config), args, names.to_mlx(reader, args))

    plan = plan.checked(reader)
    if options.dtype is not None:
        plan = plan.cast(getattr(mx, options.dtype))
    if options.quantize:
        bits = options.q_bits or DEFAULT_BITS
        plan = plan.quantized(Quantization(bits, options.q_group_size or DEFAULT_GROUP_SIZE))
    return plan


def plan_migration(config, options, calibration) -> Conversion:
    check_teacher(config)
    recipe = options.recipe or "paper"
    # Stand-in heads: the sizes are checked before heads are chosen by them.
    layers = config.get("num_hidden_layers")
    heads = [[0]] * (layers if isinstance(layers, int) else 1)
    args = ModelArgs.from_dict(migrated_config(config, heads, recipe))
    layers, num_heads = args.num_hidden_layers, args.num_attention_heads
    if options.heads is not None:
        heads = load_heads(options.heads, layers, num_heads)
    elif options.all_full:
        heads = [list(range(num_heads))] * layers
    else:
        ratio = DEFAULT_FULL_RATIO if options.full_ratio is None else options.full_ratio
        heads = spread_heads(ratio, layers, num_heads, args.num_key_value_heads)
    migrated = migrated_config(config, heads, recipe)
    args = ModelArgs.from_dict(migrated)
    return Conversion(migrated, args, migrate(args, calibration))


def refuse(options: argparse.Namespace, name: str, source: str) -> None:
    """Raise a ValueError if an option is given."""
    if getattr(options, name) not in (None, False):
        raise ValueError(f"{as_option(name)} does not apply to {source}.")


def calibrate(calibration: Calibration, args: ModelArgs) -> None:
    with progress_bar("calibrating", args.num_hidden_layers, TimeRemainingColumn()) as advance:
        calibration.measure(advance=lambda: advance(1))


def carry_out(plan: Conversion, reader: CheckpointReader, out: str) -> None:
    """Write the checkpoint at ``out``, whole or not at all; one tensor is in memory at a time."""
    with staged_folder(out) as folder:
        writer = ShardWriter(
            folder,
            plan.outputs,
            file_format=plan.file_format,
            shard_bytes=SHARD_BYTES,
            total_parameters=plan.parameters,
        )
        columns = (DownloadColumn(), TimeRemainingColumn())
        with writer, progress_bar("converting", plan.nbytes, *columns) as advance:
            for step in plan.steps:
                for name, array in step.run(reader):
                    writer.write(name, array)
                    advance(array.nbytes)
                    del array
                mx.clear_cache()
        write_json(folder / "config.json", dict(sorted(plan.config.items())))
        for pattern in CARRIED:
            for path in filter(Path.is_file, reader.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        if plan.file_format == "mlx":
            (folder / names.SHIM).write_text(SHIM_TEXT, encoding="utf-8")


def print_plan(plan: Conversion) -> None:
    """Print what becomes of every tensor, as a table."""
    table = Table("tensor", "from", "shape", "dtype", "how")
    for step in plan.steps:
        table.add_row(
            step.target,
            "\n".join(step.sources) or "-",
            as_text(step.shape),
            step.dtype_in_words,
            step.what,
        )
    for name, why in plan.dropped.items():
        table.add_row("-", name, "-", "-", f"left out: {why}")
    # A table in a file is not to be cut to a terminal's width.
    width = None if sys.stdout.isatty() else 220
    Console(width=width).print(table)
    print(
        f"{len(plan.outputs)} tensors from {len(plan.steps)} weights, {len(plan.dropped)} left "
        f"out; {plan.parameters:,} parameters, {plan.nbytes / 1e6:,.1f} MB."
    )


def as_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def print_summary(plan: Conversion, out: Optional[str]) -> None:
    """Print which heads are full, what the KV cache keeps, and where the model is."""
    args = plan.args
    layers = [args.layer_heads(layer) for layer in range(args.num_hidden_layers)]
    full, all_heads = sum(len(h.full) for h in layers), len(layers) * args.num_attention_heads
    cached, all_kv = sum(len(h.kv_heads) for h in layers), len(layers) * args.num_key_value_heads
    whole = full * args.num_key_value_heads == cached * args.num_attention_heads
    print(
        f"{full} of {all_heads} heads are full ({full / all_heads:.1%}); the KV cache keeps "
        f"{cached} of {all_kv} KV heads ({cached / all_kv:.1%}, "
        f"{'whole groups' if whole else 'groups in part'})."
    )
    if out is not None:
        print(f"{out}: {plan.nbytes / 1e6:,.1f} MB.")
