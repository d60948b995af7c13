"""What the commands share: how an error reaches the user, and how far they have come."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that what the user can mend ends in one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except BrokenPipeError:
            # Who reads the output has left, as head does; nothing more can be written there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped


def is_out_of_memory(error: RuntimeError) -> bool:
    """MLX raises no MemoryError: its messages tell, on Metal and elsewhere."""
    return any(part in str(error) for part in ("allocate", "Insufficient Memory"))


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with a wrong option told in one line like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help).")


def as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def progress_bar(description: str, total: int, *columns) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, nothing elsewhere; yields what moves it on."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
