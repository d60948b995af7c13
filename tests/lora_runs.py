"""Tiny LoRA runs: a model and questions with answers that it does not know, on disk."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import tiny

from mlx_hydra import lora

# Every layer has linear heads, the second nothing else.
SETTINGS = {"full_attention_heads": [[0], [], [1, 2]]}
PAIRS = [(f"w{i}", f"w{20 + 3 * i} w{21 + 3 * i}") for i in range(5)]


def write_place(place: Path) -> Path:
    """``model`` and ``data`` in a folder."""
    tiny.save(tiny.model(**SETTINGS), tiny.config(**SETTINGS), place / "model")
    (place / "data").mkdir()
    lines = [json.dumps({"prompt": asked, "completion": answer}) for asked, answer in PAIRS]
    for name in ("train", "valid", "test"):
        (place / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return place


def run(*options) -> str:
    """What the command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        lora.main([*map(str, options)])
    return out.getvalue()


def training(model, data, adapters, iters, rate="1e-2") -> list:
    options = {
        "model": model,
        "data": data,
        "adapter-path": adapters,
        "iters": iters,
        "learning-rate": rate,
        "batch-size": 5,
        "steps-per-report": 10,
        "steps-per-eval": 1000,
    }
    return ["--train", "--mask-prompt", *(x for k, v in options.items() for x in (f"--{k}", v))]


def with_option(options, name, value) -> list:
    """The options with one of them set to something else, or left out."""
    place = options.index(name)
    return options[:place] + ([] if value is None else [name, value]) + options[place + 2 :]


def refusal(capsys, *options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        lora.main([*map(str, options)])
    *others, error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert error.startswith("error: ")
    # mlx-lm 0.31 shows there how validation gets on.
    assert not [line for line in others if line and "Calculating loss" not in line]
    return error
