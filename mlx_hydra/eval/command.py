"""The eval command: needle grids and perplexity of a model, as JSON, tables and a picture."""

import difflib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
from mlx_lm.generate import wired_limit
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..cli import ArgumentParser, command
from ..config import expect
from ..documents.progress import reading_progress
from ..generate import backend_name
from ..loading import (
    find_model,
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    tokenizer_fingerprint,
    weight_sizes,
)
from ..locks import locked_output
from ..needles import KINDS
from ..plan import Planner, default_step, in_bytes, machine_memory
from .needle_grid import NeedleCell, score_needles
from .perplexity import Text, TextCell, score_text
from .plot import check_plot, draw
from .results import Results

LENGTHS = (1024, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 10


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # What is whole can be shown from where nothing may be written.
    writes = args.output is not None and os.access(args.output.parent, os.W_OK)
    with locked_output(args.output) if writes else nullcontext():
        run(args)


def run(args: Namespace) -> None:
    """Evaluate the cells that are missing, then show all that are asked for."""
    path = find_model(args.model)
    config = read_config(path)
    tokenizer = load_tokenizer(path, config)
    text = None if args.perplexity is None else Text.load(args.perplexity, tokenizer)
    cells = plan_cells(args, text)
    check_cells(cells, tokenizer, text, config)
    check_memory(args, path, config)

    about = {
        "model": args.model,
        "adapter_path": args.adapter_path,
        "fingerprint": fingerprint(path, args.adapter_path),
        "tokenizer": tokenizer_fingerprint(path),
        "backend": backend_name(config),
        "mlx": mx.__version__,
        "mlx_hydra": __version__,
    }
    results = Results(about, args.output)
    missing = [cell for cell in cells if not results.of(section(cell), [asdict(cell)])]
    if len(missing) < len(cells):
        note(f"{len(cells) - len(missing)} of {len(cells)} cells are in {args.output} already.")
    if missing:
        model, _ = load_model(path, args.adapter_path)
        with wired_limit(model):
            evaluate(model, tokenizer, text, missing, results, args.prefill_step_size)

    wanted = {
        name: results.of(name, [asdict(cell) for cell in cells if section(cell) == name])
        for name in ("needles", "perplexity")
    }
    show(wanted)
    if args.plot is not None:
        draw(wanted, args.plot)
    if args.json:
        print(json.dumps({**results.content, **wanted}))


def parse_args(argv: Optional[Sequence[str]]) -> Namespace:
    parser = ArgumentParser(
        description="Evaluate a model: needles hidden in a text at several lengths and depths, "
        "and the perplexity of a text in windows of several lengths."
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder or hub repository")
    add("--adapter-path", help="folder of trained adapters")
    add("--needles", nargs="+", metavar="KIND", default=[], help=f"of {', '.join(KINDS)}")
    add("--perplexity", metavar="FILE", help="text, UTF-8")
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="N",
        default=LENGTHS,
        help="tokens of the prompts, and of the windows of perplexity (1024 4096)",
    )
    add(
        "--depths",
        nargs="+",
        type=float,
        metavar="F",
        default=DEPTHS,
        help="where the needle stands in the text, from 0 to 1 (0 0.25 0.5 0.75 1)",
    )
    add("--samples", type=int, default=SAMPLES, help="prompts of a cell (%(default)s)")
    add("--seed", type=int, default=0, help="of the needles (%(default)s)")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the starts of perplexity's windows; of all but the first, so many "
        "tokens count (default: the length, so that windows do not overlap)",
    )
    add("--windows", type=int, metavar="N", help="most windows of a length (default: all)")
    add(
        "--prefill-step-size",
        type=int,
        default=default_step(),
        help="tokens read at a time; fewer need less memory (%(default)s)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON, written after each cell; cells that are in it are not evaluated again",
    )
    add("--plot", type=Path, metavar="FILE", help="draw heat maps: .png, .pdf or .svg")
    add("--json", action="store_true", help="print the results as a last line of JSON")
    args = parser.parse_args(argv)
    check_options(args)
    return args


def check_options(args: Namespace) -> None:
    """Raise a ValueError for what cannot be evaluated, before anything is loaded."""
    if not args.needles and args.perplexity is None:
        raise ValueError(f"Nothing to do: give --needles ({', '.join(KINDS)}), --perplexity FILE.")
    for kind in args.needles:
        if kind not in KINDS:
            nearest = difflib.get_close_matches(kind, KINDS, 1, 0)[0]
            raise ValueError(f"--needles {kind}: not a kind; the nearest is {nearest!r}.")
    for length in args.lengths:
        expect(length > 0, "--lengths", length, "1 or more")
    for depth in args.depths:
        expect(0 <= depth <= 1, "--depths", depth, "a number from 0 to 1")
    for name in ("samples", "windows", "prefill_step_size", "stride"):
        value = getattr(args, name)
        expect(value is None or value > 0, f"--{name.replace('_', '-')}", value, "1 or more")
    if args.stride is not None and args.stride > min(args.lengths):
        raise ValueError(
            f"--stride {args.stride}: over --lengths {min(args.lengths)}; text would be left out."
        )
    for option, path in (("-o", args.output), ("--plot", args.plot)):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ValueError(f"{option} {path}: expected a file in a folder that is there.")
    if args.plot is not None:
        check_plot(args.plot)


def plan_cells(args: Namespace, text: Optional[Text]) -> list[Any]:
    """The cells that are asked for, each once."""
    cells: list[Any] = [
        NeedleCell(kind, length, depth, args.samples, args.seed)
        for kind in args.needles
        for length in args.lengths
        for depth in args.depths
    ]
    if text is not None:
        cells += [
            TextCell(text.digest, length, args.stride or length, args.windows)
            for length in args.lengths
        ]
    return list(dict.fromkeys(cells))


def section(cell: Any) -> str:
    """Where in the results a cell stands."""
    return "needles" if isinstance(cell, NeedleCell) else "perplexity"


def check_cells(cells: Sequence[Any], tokenizer, text: Optional[Text], config: dict) -> None:
    """Raise a ValueError for the first cell that this tokenizer or text cannot fill.

    Prompts of a kind differ by a few tokens in what they need: a length that is just enough for
    some of them is told only when it is met.
    """
    shortest: dict[str, NeedleCell] = {}
    for cell in cells:
        if isinstance(cell, TextCell):
            text.windows(cell)
        elif cell.kind not in shortest or cell.length < shortest[cell.kind].length:
            shortest[cell.kind] = cell
    samples = [token for cell in shortest.values() for token in cell.needles(tokenizer)[0].prompt]
    tokens = samples if text is None else [*samples, *text.tokens]
    vocabulary = config.get("vocab_size")
    if vocabulary is not None and max(tokens) >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {max(tokens)}, the model knows {vocabulary}: it is another "
            "model's."
        )


def check_memory(args: Namespace, path: Path, config: dict) -> None:
    """Raise a ValueError if the longest prompt does not fit, where its memory is known."""
    length = max(args.lengths)
    sizes = weight_sizes(path, args.adapter_path)
    planner = Planner.for_model(config, *sizes, args.prefill_step_size)
    memory = machine_memory()
    if planner is not None and (need := planner.plan(length).total) > memory:
        raise ValueError(
            f"--lengths {length}: {in_bytes(need)} are needed, {in_bytes(memory)} are there; the "
            f"largest length that fits is {planner.largest_context(memory):,}."
        )
    positions = config.get("max_position_embeddings") or length
    if length > positions:
        note(f"{length:,} tokens are more than the {positions:,} that this model is made for.")


def evaluate(
    model, tokenizer, text: Optional[Text], cells: Sequence[Any], results: Results, step: int
) -> None:
    """Score the cells one by one into the results."""
    sizes = [
        cell.tokens if isinstance(cell, NeedleCell) else len(text.windows(cell)) * cell.length
        for cell in cells
    ]
    read = 0
    with reading_progress(sum(sizes)) as progress:

        def advance(tokens: int) -> None:
            nonlocal read
            read += tokens
            progress(read)

        for cell in cells:
            start = time.perf_counter()
            if isinstance(cell, NeedleCell):
                scored = score_needles(model, tokenizer, cell, step, advance)
            else:
                scored = score_text(model, tokenizer, text, cell, step, advance)
            seconds = round(time.perf_counter() - start, 3)
            results.add(section(cell), {**scored, "seconds": seconds})


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table for each kind of needles, and one of perplexity."""
    console = Console()
    for kind in KINDS:
        cells = {(c["depth"], c["length"]): c for c in results["needles"] if c["kind"] == kind}
        if not cells:
            continue
        depths, lengths = (sorted({place[i] for place in cells}) for i in (0, 1))
        table = Table("depth")
        for length in lengths:
            table.add_column(f"{length:,} tokens", justify="right")
        for depth in depths:
            row = [cells[depth, length] for length in lengths]
            table.add_row(f"{depth:g}", *(f"{c['found']:.0%} / {c['exact']:.0%}" for c in row))
        console.print(f"{kind}: values found / exact answers", table, sep="\n")
    if results["perplexity"]:
        table = Table("length", "stride", "tokens scored", "loss (nats)", "perplexity")
        for c in results["perplexity"]:
            perplexity = "-" if c["perplexity"] is None else f"{c['perplexity']:,.3f}"
            table.add_row(
                f"{c['length']:,}",
                f"{c['stride']:,}",
                f"{c['tokens']:,}",
                f"{c['loss']:.4f}",
                perplexity,
            )
        console.print(table)


def note(text: str) -> None:
    print(text, file=sys.stderr)
