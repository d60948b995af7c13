"""What the commands share: how an error reaches the user."""

import functools
import sys
from collections.abc import Callable


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that what the user can mend ends in one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except (ValueError, OSError, MemoryError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
