"""The distill command: a run from its YAML file, its options and whatever it had done before."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Optional

import mlx.core as mx
import yaml

from ..cli import ArgumentParser, command
from .config import Config, load_config, presets
from .report import import_pyplot, plot_losses, read_losses
from .trainer import LOSSES, Run

PICTURE = "losses.png"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_hydra.distill",
        description="Distil a Qwen3 teacher into a HydraHead model that convert.py made. The same "
        "command goes on where a run was stopped.",
    )
    add = parser.add_argument
    add(
        "--config",
        required=True,
        metavar="FILE",
        help=f"YAML file, or a preset: {', '.join(presets())}",
    )
    add("--student", help="folder of the converted model")
    add("--teacher", help="folder or repository of the Qwen3 model")
    add(
        "--data",
        action="append",
        metavar="FILE",
        help="text or JSONL, UTF-8; may be given several times",
    )
    add("--out", metavar="DIR", help="folder of checkpoints, loss curves and the trained model")
    add("--plot", action="store_true", help=f"draw the losses into {PICTURE} in the end")
    add("--dry-run", action="store_true", help="print the whole config and the steps, and stop")
    return parser


@command
def main(argv: Optional[list[str]] = None) -> None:
    options = build_parser().parse_args(argv)
    names = ("student", "teacher", "data", "out")
    config = load_config(options.config, {name: getattr(options, name) for name in names})
    if options.dry_run:
        print_plan(config)
        return
    if options.plot:
        import_pyplot()
    first = mx.distributed.init().rank() == 0
    run = Run(config, lambda text: print(text, file=sys.stderr) if first else None)
    model = run.train()
    if first:
        report(model, options.plot)


def print_plan(config: Config) -> None:
    print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
    for number, stage in enumerate(config.stages, start=1):
        tokens = stage.batch_size * stage.length
        print(
            f"# stage {number}, {stage.objective}: {stage.steps:,} steps of {tokens:,} tokens, "
            f"{stage.steps * tokens:,} in all."
        )


def report(model: Path, plot: bool) -> None:
    """Print how the loss of each stage went and where the model is; draw the losses."""
    by_stage: dict[str, list[dict]] = {}
    for row in read_losses(model.parent / LOSSES):
        by_stage.setdefault(row["stage"], []).append(row)
    for number, rows in by_stage.items():
        start, end = (float(row["loss"]) for row in (rows[0], rows[-1]))
        print(f"stage {number} ({rows[0]['objective']}): loss {start:.4f} to {end:.4f}.")
    if plot:
        plot_losses(model.parent / LOSSES, model.parent / PICTURE)
        print(f"The losses are drawn in {model.parent / PICTURE}.")
    print(f"The model is in {model}.")
