"""Runs of the select command, as the tests of it make them."""

import json

import pytest

from mlx_hydra.select import main

CONTEXT = ("--context", 60, "--pairs", 2)
PROBE = {
    "prompt": "w1 w2 w3 w1",
    "answer": "w2 w3",
    "counterfactual_prompt": "w1 w4 w5 w1",
    "distractor": "w4 w5",
}


def select(model, output, *options) -> dict:
    main(["--model", str(model), "-o", str(output), *map(str, options)])
    return json.loads(output.read_text())


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error
