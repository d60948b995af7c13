"""Write a checkpoint a tensor at a time: whole at its place in the end, or not there at all."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import mlx.core as mx

from ..locks import locked
from .reader import INDEX

SHARD_BYTES = 5 << 30

DTYPE_NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@contextlib.contextmanager
def staged_folder(out: Union[str, Path]) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well, and else is removed.

    What a killed run left behind is replaced.

    Raises:
        ValueError: ``out`` is there already and is not an empty folder, or another run is at it.
        OSError: the disk is full, or no folder can be made there.
    """
    out = Path(out).expanduser().resolve()
    check_vacant(out)
    folder = out.parent / f".{out.name}.mlx_hydra-partial"
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be made: {error.strerror}.") from error
    with locked(folder, out):
        try:
            remove_contents(folder)
            yield folder
            os.rename(folder, out)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EFBIG,
            ):
                raise OSError(f"{out}: {error.strerror}; what was written is removed.") from error
            raise


def check_vacant(out: Path) -> None:
    """Raise a ValueError unless a folder can be put at ``out``."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty: remove it or choose another path.")
    elif out.exists():
        raise ValueError(f"{out} is a file: choose another path.")


def remove_contents(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class ShardWriter:
    """A context manager that writes known tensors into a folder.

    The headers follow from ``specs``, so that each tensor goes to its place as it comes and none
    is held back. Shards and index are named as mlx-lm's, in the order of the specs; a single
    tensor may be larger than ``shard_bytes``.

    Raises:
        OSError: there is not room enough.
    """

    def __init__(
        self,
        folder: Path,
        specs: Iterable[TensorSpec],
        *,
        file_format: str = "mlx",
        shard_bytes: int = SHARD_BYTES,
        total_parameters: int = 0,
    ):
        self.folder = folder
        self._total_parameters = total_parameters
        self._headers: dict[Path, bytes] = {}
        self._places: dict[str, tuple[Path, int, TensorSpec]] = {}
        shards = make_shards(specs, shard_bytes)
        for number, shard in enumerate(shards, start=1):
            path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                path = folder / "model.safetensors"
            header, offsets = make_header(shard, file_format)
            self._headers[path] = header
            self._places |= {spec.name: (path, offsets[spec.name], spec) for spec in shard}
        self._pending = set(self._places)

    @property
    def _total_size(self) -> int:
        return sum(spec.nbytes for _, _, spec in self._places.values())

    def __enter__(self) -> "ShardWriter":
        free = shutil.disk_usage(self.folder).free
        if free < self._total_size:
            raise OSError(
                f"{self.folder.parent}: {self._total_size / 1e6:,.1f} MB are needed, "
                f"{free / 1e6:,.1f} MB are free."
            )
        for path, header in self._headers.items():
            path.write_bytes(header)
        return self

    def write(self, name: str, array: mx.array) -> None:
        """Put a tensor in its place; it must be as its spec says."""
        path, offset, spec = self._places[name]
        if (array.shape, array.dtype) != (spec.shape, spec.dtype):
            raise RuntimeError(f"{name} is {array.dtype} {array.shape}, planned as {spec}.")
        with open(path, "r+b") as file:
            file.seek(offset)
            # bfloat16 has no buffer format of its own: bytes are bytes.
            file.write(memoryview(array.reshape(-1).view(mx.uint8)))
        self._pending.discard(name)

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            return
        if self._pending:
            raise RuntimeError(f"planned, but never written: {', '.join(sorted(self._pending))}")
        for path in self._headers:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_json(
            self.folder / INDEX,
            {
                "metadata": {
                    "total_size": self._total_size,
                    "total_parameters": self._total_parameters,
                },
                "weight_map": {name: place[0].name for name, place in sorted(self._places.items())},
            },
        )


def make_header(specs: list[TensorSpec], file_format: str) -> tuple[bytes, dict[str, int]]:
    """The start of a safetensors file, and where in the file each tensor goes."""
    header, end = {"__metadata__": {"format": file_format}}, 0
    # Wide elements first, so that each tensor is aligned to its own.
    for spec in sorted(specs, key=lambda spec: -spec.dtype.size):
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    offsets = {spec.name: start + header[spec.name]["data_offsets"][0] for spec in specs}
    return len(raw).to_bytes(8, "little") + raw, offsets


def make_shards(specs: Iterable[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Split the tensors, in order, into files of at most ``shard_bytes``."""
    shards, size = [], 0
    for spec in specs:
        if not shards or size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
