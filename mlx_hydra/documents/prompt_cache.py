"""What a model digested of a document, kept in a file.

The file is mlx-lm's prompt cache with a record of what it was made from: the tokens, the model
and how keys are quantised. A recurrent state cannot be rolled back to an earlier token, so a file
serves exactly the document that it was made from, not one that merely starts alike.
"""

import json
import os
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from ..checkpoints.reader import read_header

FORMAT = "mlx_hydra 2"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Origin:
    """What a cache is made from.

    tokens: the document's, all that the cache has seen.
    model: the fingerprint of the model.
    kv_bits: bits of the quantised keys and values; None for plain ones.
    """

    tokens: Sequence[int]
    model: str
    kv_bits: Optional[int]


def cache_path(name: str) -> Path:
    """The file of ``--prompt-cache``, which ends in .safetensors.

    Raises:
        ValueError: it is a directory, or would be in one that is not there.
    """
    path = Path(name).expanduser()
    if path.name not in ("", "..") and path.suffix != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    if path.is_dir():
        raise ValueError(f"--prompt-cache {name!r} is a directory; name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"--prompt-cache {name}: there is no directory {path.parent}.")
    return path


def save_cache(path: Path, cache: list[Any], origin: Origin) -> None:
    """Write a cache beside its place and move it there when it is whole.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    metadata = {
        "format": FORMAT,
        "tokens": json.dumps(list(origin.tokens)),
        "model": origin.model,
        "kv_bits": json.dumps(origin.kv_bits),
        "checksum": _checksum(cache),
    }
    # Not the name of another run that saves to the same file.
    partial = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{SUFFIX}")
    try:
        save_prompt_cache(str(partial), cache, metadata)
        read_header(partial)
        os.replace(partial, path)
    except (RuntimeError, ValueError, OSError) as error:
        raise OSError(f"--prompt-cache {path} cannot be written: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def load_cache(path: Path, origin: Origin) -> list[Any]:
    """Read a cache back; it must have been made from just this.

    Raises:
        ValueError: it is damaged, no such cache, or made from something else.
    """
    where = f"--prompt-cache {path}"
    read_header(path)
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        saved_format = metadata["format"]
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where} is not a prompt cache of mlx_hydra.") from error
    if saved_format != FORMAT:
        raise ValueError(
            f"{where} has the format {saved_format!r}, this version reads {FORMAT!r}; remove it "
            "to have it made anew."
        )
    if metadata["model"] != origin.model:
        raise ValueError(f"{where} was made by another model; name another file, or remove it.")
    kv_bits = json.loads(metadata["kv_bits"])
    if kv_bits != origin.kv_bits:
        made = "without --kv-bits" if kv_bits is None else f"with --kv-bits {kv_bits}"
        raise ValueError(f"{where} was made {made}; run it so, or name another file.")
    _check_tokens(where, json.loads(metadata["tokens"]), list(origin.tokens))
    if metadata["checksum"] != _checksum(cache):
        raise ValueError(f"{where} is damaged: its checksum does not fit; remove it.")
    return cache


def _check_tokens(where: str, saved: list[int], tokens: list[int]) -> None:
    if saved == tokens:
        return
    alike = next(
        (i for i, (a, b) in enumerate(zip(saved, tokens)) if a != b), min(len(saved), len(tokens))
    )
    raise ValueError(
        f"{where} was made from another document: {len(saved)} tokens there, {len(tokens)} here, "
        f"alike up to token {alike}; name another file, or remove it."
    )


def _checksum(cache: list[Any]) -> str:
    value = 0
    for name, part in tree_flatten([(c.state, getattr(c, "meta_state", None)) for c in cache]):
        value = zlib.crc32(name.encode(), value)
        if not isinstance(part, mx.array):
            value = zlib.crc32(repr(part).encode(), value)
        elif part.size:
            value = zlib.crc32(memoryview(mx.contiguous(part).reshape(-1).view(mx.uint8)), value)
    return f"{value:08x}"
