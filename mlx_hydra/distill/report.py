"""What a run shows: the figures of each step as CSV, a progress bar, the losses as a picture."""

import csv
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..plan import in_bytes

COLUMNS = (
    "stage",
    "objective",
    "step",
    "tokens",
    "loss",
    "kl",
    "ce",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "peak_memory_bytes",
)

# Where there is no terminal, a line is printed this often.
SECONDS_BETWEEN_LINES = 30


class LossFile:
    """losses.csv: a line for each step, the numbers in full.

    Lines from after a checkpoint, which a killed run leaves there, are dropped.
    """

    def __init__(self, path: Path, stage: int, step: int):
        self._path = path
        done = [
            row
            for row in read_losses(path)
            if (int(row["stage"]), int(row["step"])) <= (stage + 1, step)
        ]
        partial = path.with_name(f".{path.name}.partial")
        try:
            with naming(path), open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(done)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def add(self, row: dict) -> None:
        with naming(self._path), open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the disk say which file it is about."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}.") from error


def read_losses(path: Path) -> list[dict[str, str]]:
    """The whole lines of a losses.csv; none where there is no such file.

    Raises:
        ValueError: it is a file of something else.
    """
    if not path.exists():
        return []
    try:
        with naming(path), open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or COLUMNS) == COLUMNS:
                return [row for row in reader if row["peak_memory_bytes"]]
    except (UnicodeDecodeError, csv.Error):
        pass
    raise ValueError(f"{path} is not of a distillation: move it away, or choose another out.")


@contextmanager
def training_progress(title: str, total: int, done: int) -> Iterator[Callable[[int, dict], None]]:
    """Yield a function that takes the tokens trained on and the figures of a step.

    A bar on standard error where that is a terminal, a line now and then elsewhere.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done, figures="")
        shown = float("-inf")

        def show(tokens: int, row: dict) -> None:
            nonlocal shown
            memory = f"{in_bytes(mx.get_active_memory())}, peak {in_bytes(mx.get_peak_memory())}"
            speed = row["tokens_per_second"]
            figures = f"loss {row['loss']:.4f} | {speed:,.0f} tok/s | {memory}"
            progress.update(task, completed=tokens, figures=figures)
            now = time.monotonic()
            late = now - shown > SECONDS_BETWEEN_LINES or tokens >= total
            if not console.is_terminal and late:
                shown = now
                left = max(0, total - tokens) / speed
                line = f"{title}: {tokens:,}/{total:,} tokens | {figures} | {in_time(left)} left"
                print(line, file=sys.stderr, flush=True)

        yield show


def in_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def import_pyplot():
    """matplotlib's pyplot, without a window.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'mlx-hydra[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_losses(source: Path, picture: Path) -> None:
    """Draw the losses of a losses.csv over the tokens, a panel for each stage.

    Raises:
        ValueError: there are none.
    """
    pyplot = import_pyplot()
    rows = read_losses(source)
    if not rows:
        raise ValueError(f"{source}: there are no losses to draw.")
    stages = sorted({int(row["stage"]) for row in rows})
    figure, panels = pyplot.subplots(
        1, len(stages), figsize=(4 * len(stages), 3), squeeze=False, layout="constrained"
    )
    for stage, panel in zip(stages, panels[0]):
        own = [row for row in rows if int(row["stage"]) == stage]
        tokens = [int(row["tokens"]) for row in own]
        parts = ("kl", "ce") if own[0]["kl"] else ()
        for name in ("loss", *parts):
            panel.plot(tokens, [float(row[name]) for row in own], label=name, linewidth=1)
        panel.set(title=f"stage {stage}: {own[0]['objective']}", xlabel="tokens", yscale="log")
        panel.legend()
    partial = picture.with_name(f".{picture.name}")
    try:
        with naming(picture):
            figure.savefig(partial, dpi=120, format="png")
            os.replace(partial, picture)
    finally:
        partial.unlink(missing_ok=True)
        pyplot.close(figure)
