"""Two runs that write to one place: the second is refused."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, out: Path) -> Iterator[int]:
    """Hold ``path``, a folder or file that is there, for this process; yields its descriptor.

    The lock of a killed process is gone with it.

    Args:
        out: what is written, for the message.

    Raises:
        ValueError: another run holds it.
    """
    try:
        # On NFS a lock asks for what may be written.
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        raise held(out) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise held(out) from None
        except OSError:
            pass  # A file system without locks.
        yield handle
    finally:
        os.close(handle)


@contextmanager
def locked_output(out: Path) -> Iterator[None]:
    """Hold a file that is to be written, there or not, by a file beside it.

    Raises:
        ValueError: another run holds it.
        OSError: nothing can be written there.
    """
    lock = out.with_name(f".{out.name}.mlx_hydra-lock")
    try:
        lock.touch()
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}.") from error
    with locked(lock, out) as handle:
        # A run that has just ended may have removed it, before or after it was opened here.
        if not lock.exists() or not os.path.samestat(os.fstat(handle), lock.stat()):
            raise held(out)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def held(out: Path) -> ValueError:
    return ValueError(f"{out} is being written by another run: wait for it.")
