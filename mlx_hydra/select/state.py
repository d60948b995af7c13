"""Files that are whole or not there: the output, and what an unfinished run has found so far."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


class State:
    """The results of an unfinished run, beside its output, for a rerun to go on from.

    results: by the probe's number, whatever was found for it.

    Args:
        output: what the run will write in the end.
        settings: what the results depend on.
        is_result: whether what was read back is a result of such a run.

    Raises:
        ValueError: an unfinished run of other settings is there, or a file that is none.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        is_result: Callable[[Any], bool] = lambda _: True,
    ):
        self.path = output.parent / f".{output.name}.mlx_hydra-partial"
        self.results: dict[int, dict] = {}
        self._settings = settings
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            earlier = dict(content["settings"])
            results = {int(number): result for number, result in content["results"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is not an unfinished run: remove it.") from error
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise ValueError(
                    f"{self.path} holds an unfinished run with other settings: {name} was "
                    f"{earlier.get(name)!r}, now {value!r}. Finish it with those, or remove it."
                )
        for number, result in results.items():
            if not is_result(result):
                raise ValueError(
                    f"{self.path}: what it has of probe {number} is damaged: remove it."
                )
        self.results = results

    def add(self, number: int, result: dict) -> None:
        self.results[number] = result
        content = {"settings": self._settings, "results": self.results}
        write_whole(self.path, json.dumps(content))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the whole of it, or what was there before.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.strerror}.") from error


def object_text(content: dict[str, Any]) -> str:
    """An object as JSON with a field a line, so that tables of scores stay readable.

    Raises:
        ValueError: a number in it is not finite.
    """
    fields = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    return "{\n  " + ",\n  ".join(fields) + "\n}\n"


def table_text(path: Path, rows: Sequence) -> str:
    """Dataclasses of one kind as CSV or, where the path says so, as JSON."""
    table = [asdict(row) for row in rows]
    if path.suffix == ".json":
        return json.dumps(table, indent=1) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
