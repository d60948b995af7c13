"""Training that comes to NaN stops, and adapters that were good stay."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.lora
import pytest
from lora_runs import PAIRS, refusal, run, training, with_option, write_place

from mlx_hydra import lora


@pytest.fixture(autouse=True)
def uncompiled():
    """For a few steps that would cost more than it gains."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("lora"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("rank, left", [(0, "before"), (1, "another's")])
def test_the_first_process_alone_puts_the_config_back(rank, left, place, tmp_path, monkeypatch):
    options = training(place / "model", place / "data", tmp_path / "a", 1)
    (tmp_path / "a").mkdir()
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text("before")

    def fails(*_):
        config.write_text("another's")
        raise ValueError("no")

    monkeypatch.setattr(mlx_lm.lora, "train_model", fails)
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(rank=lambda: rank))
    with pytest.raises(SystemExit):
        lora.main([*map(str, options)])
    assert config.read_text() == left


def test_adapters_of_before_survive_a_rate_too_high(place, capsys, tmp_path):
    options = training(place / "model", place / "data", tmp_path / "a", 2, "1e-3")
    run(*options)
    before = contents(tmp_path / "a")
    (tmp_path / "s.yaml").write_text("lora_parameters: {rank: 4}")
    for iterations, what in ((2, "the adapters are ruined"), (3, "the validation loss is nan")):
        high = with_option(options, "--learning-rate", "1e30")
        high = [*with_option(high, "--iters", iterations), "-c", tmp_path / "s.yaml"]
        message = refusal(capsys, *high)
        assert f"{what} by iteration" in message and "/a is as it was. Lower --learning" in message
        assert contents(tmp_path / "a") == before
        refusal(capsys, *with_option(high, "--adapter-path", tmp_path / "none"))
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("iterations", "message"),
    [
        # The third step's loss is finite, and what it leaves is not.
        (3, "the adapters are ruined by iteration 3"),
        (5, "the training loss is nan by iteration 4"),
    ],
)
def test_the_last_good_adapters_are_kept(place, capsys, tmp_path, iterations, message):
    (tmp_path / "s.yaml").write_text(
        "lr_schedule: {name: step_decay, arguments: [1.0e-3, 1.0e+30, 2]}"
    )
    (tmp_path / "data").mkdir()
    shutil.copy(place / "data" / "train.jsonl", tmp_path / "data")
    options = training(place / "model", tmp_path / "data", tmp_path / "a", iterations)
    error = refusal(capsys, *options, "--save-every", 2, "-c", tmp_path / "s.yaml")
    assert f"{message}; {tmp_path / 'a'} holds the adapters of iteration 2" in error
    kept = contents(tmp_path / "a")
    numbered = kept.pop("0000002_adapters.safetensors")
    assert kept.keys() == {"adapter_config.json", "adapters.safetensors"}
    assert kept["adapters.safetensors"] == numbered
    saved = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert all(mx.isfinite(x).all() for x in saved.values())


def test_a_prompt_that_fills_the_length_is_told(place, capsys, tmp_path):
    options = training(place / "model", place / "data", tmp_path / "a", 1)
    error = refusal(capsys, *options, "--max-seq-length", 2)
    assert "the training loss is nan by iteration 1" in error
    assert error.endswith("or raise --max-seq-length if prompts fill it.")


def test_a_prompt_that_fills_the_length_in_validation_alone_stops_nothing(place, tmp_path):
    data = shutil.copytree(place / "data", tmp_path / "data")
    prompt = " ".join([PAIRS[0][0]] * 100)
    line = json.dumps({"prompt": prompt, "completion": PAIRS[0][1]}) + "\n"
    (data / "valid.jsonl").write_text(line * 5)
    options = training(place / "model", data, tmp_path / "a", 2)
    assert "nan" in run(*options, "--max-seq-length", 64)
    weights = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert all(mx.isfinite(w).all() for w in weights.values())


def test_adapters_without_an_effect_on_the_logits_are_looked_at():
    class Deaf(nn.Module):
        def __init__(self, last: float):
            super().__init__()
            self.weight = mx.array([1.0, last])

        def __call__(self, tokens):
            return mx.zeros(tokens.shape)

    for last in (2.0, float("inf")):
        guard = lora.Guard(None, Deaf(last), mx.array([[1]]), None)
        assert guard.adapters_are_fit() == (last == 2.0)


def test_saving_does_not_change_training(place, tmp_path):
    (tmp_path / "s.yaml").write_text("lora_parameters: {dropout: 0.5}")
    found = []
    for every in (1, 100):
        folder = tmp_path / str(every)
        options = training(place / "model", place / "data", folder, 3)
        run(*options, "--save-every", every, "-c", tmp_path / "s.yaml")
        found.append((folder / "adapters.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_callback_is_told_of_the_losses_too(place, monkeypatch, tmp_path):
    told = []

    class Callback(lora.TrainingCallback):
        def on_train_loss_report(self, info):
            told.append(("train", info["iteration"]))

        def on_val_loss_report(self, info):
            told.append(("val", info["iteration"]))

    monkeypatch.setattr(lora, "get_reporting_callbacks", lambda *_, **__: Callback())
    run(*training(place / "model", place / "data", tmp_path / "a", 2))
    assert told == [("val", 0), ("val", 1), ("train", 2)]
