"""The results of an evaluation: kept as JSON after each cell, and taken up again from there."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

FORMAT = "mlx_hydra.eval 1"
# What must be there for a run to go on; of a section, what the tables and pictures show.
NEEDED = ("fingerprint", "tokenizer")
SCORES = {
    "needles": {"found", "exact"},
    "perplexity": {"file", "tokens", "loss", "perplexity"},
}


class Results:
    """Cells with their scores, and the model that they are of.

    Args:
        about: what the results are of; ``fingerprint`` tells the model from every other, and
            ``tokenizer`` its tokenizer.
        path: the JSON file; None to keep them in memory alone. One that is there already is gone
            on with.

    Raises:
        ValueError: the file is no such results, or of another model or tokenizer.
        OSError: it cannot be read.
    """

    def __init__(self, about: dict[str, Any], path: Optional[Path] = None):
        self._path = path
        self.content: dict[str, Any] = {"format": FORMAT, **about, "needles": [], "perplexity": []}
        if path is None or not path.exists():
            return
        content = load(path)
        for name, what in (("fingerprint", "model"), ("tokenizer", "tokenizer")):
            if content[name] != about[name]:
                raise ValueError(
                    f"-o {path} is of another {what}; name another file, or remove it."
                )
        self.content |= {name: content[name] for name in ("needles", "perplexity")}

    def of(self, section: str, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the cells that are scored, with their scores."""
        return [
            entry
            for entry in self.content[section]
            if any(all(entry.get(k) == value for k, value in cell.items()) for cell in cells)
        ]

    def add(self, section: str, scored: dict[str, Any]) -> None:
        """Take in a cell with its scores, and write the file anew.

        Raises:
            OSError: the file cannot be written; the one that was there stays.
        """
        self.content[section].append(scored)
        if self._path is not None:
            write_whole(self._path, json.dumps(self.content, indent=1).encode() + b"\n")


def load(path: Path) -> dict[str, Any]:
    """Read results back.

    Raises:
        ValueError: the file is no results of this format.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"-o {path} is there and not JSON ({error}); name another file.") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"-o {path} is there and has the format {found!r}, this version writes {FORMAT!r}; "
            "name another file, or remove it."
        )
    missing = [name for name in NEEDED if name not in content]
    missing += [name for name, scores in SCORES.items() if not are_cells(content.get(name), scores)]
    if missing:
        raise ValueError(
            f"-o {path} is there, and its {missing[0]!r} is missing or damaged; name another file, "
            "or remove it."
        )
    return content


def are_cells(entries: Any, scores: set[str]) -> bool:
    """Whether a section as it was read is a list of cells with these scores."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and scores <= entry.keys() for entry in entries
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
