"""What the commands share: how an error reaches the user."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn


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
