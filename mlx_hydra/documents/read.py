"""Documents as text, from files or standard input."""

import codecs
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"

# Over this share of undecodable bytes a file is not text with a slip or in an old encoding.
BINARY_SHARE = 0.3


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by."""

    name: str
    text: str


def read_documents(names: Sequence[str]) -> list[Document]:
    """Read each file as UTF-8, ``-`` for standard input; space around a text is dropped.

    Raises:
        ValueError: a document that is empty, binary or not UTF-8, or standard input named twice.
        OSError: a file that cannot be read.
    """
    if names.count(STDIN) > 1:
        raise ValueError("--document - is given twice: standard input can be read only once.")
    return [_read(name) for name in names]


def _read(name: str) -> Document:
    label = "stdin" if name == STDIN else name
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except IsADirectoryError as error:
        raise OSError(
            f"--document {name} is a directory; give each file with its own --document."
        ) from error
    except OSError as error:
        raise OSError(f"--document {name} cannot be read: {error.strerror}.") from error
    text = _decode(data, label).strip()
    if not text:
        raise ValueError(f"--document {label} is empty: there is nothing to read in it.")
    return Document(label, text)


def _decode(data: bytes, label: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"--document {label} is UTF-16; save it as UTF-8 (iconv -f UTF-16).")
    if (offset := data.find(0)) >= 0:
        raise ValueError(
            f"--document {label} is a binary document (a zero byte at offset {offset}); "
            "give its text as UTF-8."
        )
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
    undecodable = data.decode("utf-8", errors="replace").count("\ufffd")
    if undecodable > BINARY_SHARE * len(data):
        raise ValueError(
            f"--document {label} is a binary document, or not in UTF-8 (first undecodable byte "
            f"at offset {offset}); give its text as UTF-8."
        )
    raise ValueError(
        f"--document {label} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}; "
        "convert it, for instance with iconv -f LATIN1 -t UTF-8."
    )
