"""Text to sequences of tokens, all of one length, whose order follows from a seed."""

import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .config import Source

JSONL = (".jsonl", ".ndjson")
DTYPE = np.dtype("<u4")

# A text file is tokenised in pieces of about this size, which end where a line ends.
PIECE_BYTES = 1 << 20


def documents(source: Source) -> Iterator[Iterator[str]]:
    """The documents of a source, each in pieces.

    Raises:
        ValueError: it is empty, not UTF-8, or not of the form that it should have.
    """
    if source.dataset is not None:
        yield from of_dataset(source)
        return
    path = Path(source.file).expanduser()
    if path.suffix in JSONL:
        yield from of_jsonl(path, source.field)
    else:
        yield pieces_of_text(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A text file, and its name in an error of the disk."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise ValueError(f"data {path}: {error.strerror}.") from error


def pieces_of_text(path: Path) -> Iterator[str]:
    with opened(path) as file:
        start, empty = 0, True
        while lines := file.readlines(PIECE_BYTES):
            raw = b"".join(lines)
            text = decode(raw, start, path)
            start += len(raw)
            empty = empty and not text.strip()
            yield text
    if empty:
        raise ValueError(f"data {path}: it is empty.")


def of_jsonl(path: Path, field: str) -> Iterator[Iterator[str]]:
    start, empty = 0, True
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            line = decode(raw, start, path)
            start += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"data {path}: line {number} is not JSON ({error}).") from error
            empty = False
            yield iter([text_of(row, field, f"data {path}: line {number}")])
    if empty:
        raise ValueError(f"data {path}: it is empty.")


def of_dataset(source: Source) -> Iterator[Iterator[str]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data: {source} needs the package datasets: pip install datasets."
        ) from error
    with failing_as(f"data: {source} cannot be loaded"):
        rows = iter(
            datasets.load_dataset(source.dataset, source.name, split=source.split, streaming=True)
        )
    for number in itertools.count():
        with failing_as(f"data: {source} breaks off at row {number}"):
            row = next(rows, None)
        if row is None:
            return
        yield iter([text_of(row, source.field, f"data: {source}, row {number}")])


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Make any error of a data set, whose loader may raise all kinds of them, one of the text."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if not reason or not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__} {reason}".strip()
        raise ValueError(f"{what}: {reason}") from error


def decode(raw: bytes, start: int, path: Path) -> str:
    if start == 0:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data {path}: not UTF-8 text (byte {start + error.start} is "
            f"0x{raw[error.start]:02x}); convert it, for instance with iconv -t UTF-8."
        ) from error


def text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(text := row.get(field), str):
        there = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        raise ValueError(f"{where} has no text in {field!r}{there}: set field in data.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} of {field!r} is half a surrogate pair "
            f"(U+{ord(text[error.start]):04X}), which is no text: mend or remove it."
        ) from error
    return text


def tokenise(
    sources: Sequence[Source], tokenizer: TokenizerWrapper, vocab_size: int, limit: int
) -> Iterator[np.ndarray]:
    """The tokens of all documents, one after the other, with an end-of-text token after each.

    Raises:
        ValueError: a source that cannot be read, or a token that the model does not know.
    """
    count, eos = 0, tokenizer.eos_token_id
    for source in sources:
        for document in documents(source):
            for text in document:
                tokens = np.array(tokenizer.encode(text, add_special_tokens=False), DTYPE)
                if len(tokens) and tokens.max() >= vocab_size:
                    raise ValueError(
                        f"data {source}: the tokenizer gives token {tokens.max()}, the model knows "
                        f"{vocab_size}: it is another model's."
                    )
                yield tokens[: limit - count]
                count += len(tokens)
                if count >= limit:
                    return
            if eos is not None:
                yield np.array([eos], DTYPE)
                count += 1


def tokens_file(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: TokenizerWrapper,
    vocab_size: int,
    limit: int,
    fingerprint: str,
) -> Path:
    """A file with at most ``limit`` tokens of the sources, uint32; made only where it is not there.

    Several programs may be at it at once, also on machines that share the folder.

    Args:
        fingerprint: what tells the tokenizer from others.

    Raises:
        ValueError: text that cannot be read or is too little.
        OSError: the disk is full; nothing is left behind.
    """
    path = folder / f"{identity(sources, fingerprint, limit)}.tokens"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{path.name}-{uuid.uuid4().hex}"
    try:
        with open(partial, "wb") as file:
            for tokens in tokenise(sources, tokenizer, vocab_size, limit):
                file.write(tokens.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; what was written is removed.") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def identity(sources: Sequence[Source], fingerprint: str, limit: int) -> str:
    known = [fingerprint, limit]
    for source in sources:
        known.append(repr(source))
        if source.file is not None and (path := Path(source.file).expanduser()).exists():
            stat = path.stat()
            known.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


class Sequences:
    """Sequences of ``length + 1`` tokens, the last of each the first of the next one.

    Number n is the same for every run with the same tokens and seed: each pass over the data has
    an order of its own, and nothing has to be remembered to go on in the middle.

    Raises:
        ValueError: not enough tokens for a single one.
    """

    def __init__(self, path: Path, length: int, seed: int):
        size = path.stat().st_size // DTYPE.itemsize
        if size <= length:
            raise ValueError(
                f"data: {size:,} tokens in all, a sequence of length {length:,} needs "
                f"{length + 1:,}: give more text or a smaller length."
            )
        self.tokens = np.memmap(path, DTYPE, mode="r")
        self.length, self.seed = length, seed
        self.count = (len(self.tokens) - 1) // length
        self._order = functools.lru_cache(maxsize=2)(self._order_of_pass)

    def checksum(self) -> int:
        return zlib.crc32(self.tokens)

    def rows(self, numbers: range) -> mx.array:
        """The sequences of these numbers, int32 ``[len(numbers), length + 1]``."""
        rows = []
        for number in numbers:
            turn, place = divmod(number, self.count)
            start = int(self._order(turn)[place]) * self.length
            rows.append(self.tokens[start : start + self.length + 1])
        return mx.array(np.stack(rows).astype(np.int32))

    def _order_of_pass(self, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, turn]).permutation(self.count)
