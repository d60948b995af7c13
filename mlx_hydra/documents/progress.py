"""A progress bar for the reading of a long prompt."""

from contextlib import contextmanager

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..plan import in_bytes


@contextmanager
def reading_progress(total: int):
    """Yield a function that takes the number of tokens read so far.

    The bar is on standard error, and only where that is a terminal: tokens, tokens a second, time
    left, memory.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, speed="", memory="")

        def show(done: int) -> None:
            elapsed = progress.tasks[0].elapsed
            progress.update(
                task,
                completed=done,
                speed=f"{done / elapsed:,.0f} tok/s" if done and elapsed else "",
                memory=f"{in_bytes(mx.get_active_memory())}, peak {in_bytes(mx.get_peak_memory())}",
            )

        yield show
