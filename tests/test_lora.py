"""LoRA on the linear heads: what it trains, what it leaves alone, and what mlx-lm makes of it."""

import contextlib
import importlib
import io
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.lora
import numpy as np
import pytest
import tiny
from checkpoint_files import read_bytes, write_qwen3
from lora_runs import PAIRS, SETTINGS, refusal, run, training, with_option, write_place
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlx_hydra import lora
from mlx_hydra.models.hydrahead import TransformerBlock

TRUST = ["--trust-remote-code"] if tiny.ASKS_FOR_TRUST else []
CONFIG = Path(__file__).parents[1] / "examples/lora/linear_heads.yaml"

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")


@pytest.fixture(autouse=True)
def uncompiled(trained):
    """The one long training is compiled; for the others it would cost more than it gains."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def run_mlx_lm(monkeypatch, command: str, *options) -> str:
    """What a command of mlx-lm prints."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, options)])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(command).main()
    return out.getvalue()


def answers(model, tokenizer, count: int = 2) -> list[str]:
    texts = []
    for asked, _ in PAIRS:
        message = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        texts.append(mlx_lm.generate(model, tokenizer, prompt, max_tokens=count).strip())
    return texts


def parameters(model) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tree_flatten(model.parameters())}


def adapter_names(layers, parts=PROJECTIONS) -> set[str]:
    return {
        f"model.layers.{layer}.self_attn.linear.{part}.{leaf}"
        for layer in layers
        for part in parts
        for leaf in ("lora_a", "lora_b")
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def trained(place):
    """The model after LoRA, with what the command printed."""
    out = run(*training(place / "model", place / "data", place / "adapters", 150, "5e-3"))
    model, tokenizer = tiny.load(place / "model", adapter_path=str(place / "adapters"))
    return model, tokenizer, out


def test_a_small_task_is_learnt(place, trained):
    model, tokenizer, out = trained
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    losses = [float(x) for x in re.findall(r"(?:^ +\d+ +|Train loss )(\d+\.\d+)", plain, re.M)]
    assert len(losses) == 15
    assert losses[-1] < 0.2 * losses[0]
    expected = [answer for _, answer in PAIRS]
    assert answers(model, tokenizer) == expected
    untrained = answers(*tiny.load(place / "model"))
    assert not any(a == b for a, b in zip(untrained, expected))


def test_nothing_else_changes(place, trained):
    model, _, out = trained
    before, after = parameters(tiny.load(place / "model")[0]), parameters(model)
    adapters = {name for name in after if name.endswith(("lora_a", "lora_b"))}
    assert adapters == adapter_names([0, 1, 2])
    assert set(mx.load(str(place / "adapters" / "adapters.safetensors"))) == adapters
    rest = {name.replace("_proj.linear.", "_proj."): after[name] for name in set(after) - adapters}
    assert rest.keys() == before.keys()
    assert all(rest[name].tobytes() == before[name].tobytes() for name in before)
    assert f"Unchanged to the bit: {len(before)} of {len(before)} tensors of the model" in out
    full = sum(".full." in name for name in before)
    assert f"the full heads' {full} of {full}." in out
    numbers = sum(after[name].size for name in adapters)
    assert f"36 tensors, {numbers:,} numbers, on the linear heads of 3 layers" in out


def test_the_fused_model_gives_the_same_text(place, trained, monkeypatch, tmp_path):
    model, tokenizer, _ = trained
    options = ["--model", place / "model", "--adapter-path", place / "adapters", *TRUST]
    run_mlx_lm(monkeypatch, "mlx_lm.fuse", *options, "--save-path", tmp_path / "fused")
    fused = tiny.load(tmp_path / "fused")
    assert answers(*fused, count=12) == answers(model, tokenizer, count=12)

    before, after = read_bytes(place / "model"), read_bytes(tmp_path / "fused")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {
        f"model.layers.{layer}.self_attn.linear.{part}.weight"
        for layer in range(3)
        for part in PROJECTIONS
    }


def test_mlx_lm_generates_with_the_adapters(place, trained, monkeypatch):
    asked, answer = PAIRS[2]
    options = ["--model", place / "model", "--adapter-path", place / "adapters", *TRUST]
    options += ["--prompt", asked, "--max-tokens", 2, "--verbose", False]
    assert run_mlx_lm(monkeypatch, "mlx_lm.generate", *options).split() == answer.split()


def test_the_config_is_the_command_for_mlx_lm(place, monkeypatch, tmp_path):
    for name in ("ours", "theirs"):
        options = training(place / "model", place / "data", tmp_path / name, 3, "1e-4")
        # Adam's first steps are signs of gradients, some of which are all rounding.
        options += ["--optimizer", "sgd"]
        if name == "ours":
            run(*options)
        else:
            run_mlx_lm(monkeypatch, "mlx_lm.lora", "-c", CONFIG, *options[1:], *TRUST)
    ours, theirs = (
        mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys() == adapter_names([0, 1, 2])
    assert all(tiny.distance(ours[name], theirs[name]) < 2e-5 for name in ours)
    assert max(mx.abs(x).max().item() for name, x in ours.items() if name.endswith("_b")) > 1e-3


def test_a_quantised_model_is_trained_and_fused(place, monkeypatch, tmp_path):
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64, **SETTINGS}
    settings = tiny.config(**sizes)
    quantised, settings = quantize_model(tiny.model(**sizes), settings, 32, 4)
    folder = tiny.save(quantised, settings, tmp_path / "model")
    inner = quantised.layers[0].self_attn.linear
    assert isinstance(inner.q_proj, nn.QuantizedLinear) and type(inner.a_proj) is nn.Linear

    adapters = tmp_path / "adapters"
    out = run(*training(folder, place / "data", adapters, 10))
    count = len(read_bytes(folder))
    assert f"Unchanged to the bit: {count} of {count} tensors" in out
    assert set(mx.load(str(adapters / "adapters.safetensors"))) == adapter_names([0, 1, 2])

    options = ["--model", folder, "--adapter-path", adapters, "--dequantize", *TRUST]
    run_mlx_lm(monkeypatch, "mlx_lm.fuse", *options, "--save-path", tmp_path / "fused")
    adapted = tiny.load(folder, adapter_path=str(adapters))
    fused, inputs = tiny.load(tmp_path / "fused"), tiny.tokens(20)
    assert tiny.distance(fused[0](inputs), adapted[0](inputs)) < 1e-3
    assert tiny.distance(fused[0](inputs), tiny.load(folder)[0](inputs)) > 1e-1
    assert answers(*fused, count=8) == answers(*adapted, count=8)


def test_layers_without_linear_heads_are_passed_over(place, monkeypatch, tmp_path):
    monkeypatch.setattr(TransformerBlock, "__call__", TransformerBlock.__call__)
    folder = tiny.save(tiny.model(), tiny.config(), tmp_path / "model")
    found = []
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpoint"])):
        options = training(folder, place / "data", tmp_path / name, 3)
        out = run(*options, "--num-layers", 2, *more)
        assert "on the linear heads of 1 layers" in out
        found.append(mx.load(str(tmp_path / name / "adapters.safetensors")))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() == adapter_names([1])
    assert all(tiny.distance(plain[name], checkpointed[name]) < 1e-4 for name in plain)


def test_dora_and_chosen_projections(place, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "fine_tune_type: dora\nnum_layers: 1\nlora_parameters:\n  rank: 3\n"
        "  keys: [self_attn.linear.v_proj, self_attn.linear.b_proj]\n"
    )
    options = training(place / "model", place / "data", tmp_path / "adapters", 2)
    out = run(*options, "-c", settings)
    saved = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    parts = ("v_proj", "b_proj")
    names = {f"model.layers.2.self_attn.linear.{part}.m" for part in parts}
    assert saved.keys() == adapter_names([2], parts) | names
    assert saved["model.layers.2.self_attn.linear.v_proj.lora_a"].shape == (32, 3)
    assert "Unchanged to the bit: 80 of 80" in out


def test_training_goes_on_and_is_tested(place, trained, tmp_path):
    options = training(place / "model", place / "data", tmp_path / "more", 1, "1e-9")
    run(*options, "--resume-adapter-file", place / "adapters" / "adapters.safetensors")
    before, after = (
        mx.load(str(folder / "adapters.safetensors"))
        for folder in (place / "adapters", tmp_path / "more")
    )
    assert all(tiny.distance(before[name], after[name]) < 1e-6 for name in before)
    tests = ["--test", "--mask-prompt", "--batch-size", 5, "--data", place / "data"]
    out = run(*tests, "--model", place / "model", "--adapter-path", tmp_path / "more")
    assert "Unchanged" not in out
    loss = float(re.search(r"Test loss (\d+\.\d+)", re.sub(r"\x1b\[[\d;]*m", "", out))[1])
    assert loss < 0.5


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.2.self_attn.full.k_proj.weight", "self_attn.full.k_proj.weight"),
        ("model.layers.2.self_attn.linear.v_proj.weight", "self_attn.linear.v_proj.linear.weight"),
        ("model.layers.2.mlp.up_proj.weight", "mlp.up_proj.weight"),
        ("model.layers.2.self_attn.linear.A_log", "self_attn.linear.A_log"),
    ],
)
def test_one_changed_bit_is_found(place, monkeypatch, tmp_path, capsys, name, path):
    train = mlx_lm.lora.train_model

    def train_and_flip(args, model, *rest):
        train(args, model, *rest)
        flat = dict(tree_flatten(model.layers[2].parameters()))
        bits = np.array(flat[path]).copy()
        bits.reshape(-1).view(np.uint8)[-4] ^= 1
        model.layers[2].load_weights([(path, mx.array(bits))], strict=False)

    monkeypatch.setattr(mlx_lm.lora, "train_model", train_and_flip)
    with pytest.raises(SystemExit) as ended:
        lora.main([*map(str, training(place / "model", place / "data", tmp_path / "a", 1))])
    assert ended.value.code == 1
    out, error = capsys.readouterr()
    assert error.splitlines()[-1] == f"error: {name} is not what it was before training."
    assert "Unchanged to the bit: 79 of 80" in out
    assert ("13 of 14" in out) == (".full." in name)


def test_strange_and_broken_adapters_are_found(place, monkeypatch, tmp_path, capsys):
    file = tmp_path / "a" / "adapters.safetensors"
    train = mlx_lm.lora.train_model

    def train_and_spoil(args, *rest):
        train(args, *rest)
        weights = mx.load(str(file))
        weights["model.layers.0.self_attn.o_proj.lora_a"] = mx.zeros((2, 2))
        weights["model.layers.0.self_attn.linear.q_proj.lora_b"] *= float("nan")
        mx.save_safetensors(str(file), weights)

    monkeypatch.setattr(mlx_lm.lora, "train_model", train_and_spoil)
    with pytest.raises(SystemExit) as ended:
        lora.main([*map(str, training(place / "model", place / "data", tmp_path / "a", 1))])
    assert ended.value.code == 1
    stray, broken = capsys.readouterr().err.splitlines()[-2:]
    assert stray.startswith("error: model.layers.0.self_attn.o_proj.lora_a is in the adapter file")
    assert broken.startswith("error: model.layers.0.self_attn.linear.q_proj.lora_b has values")


def test_wrong_options_are_told_in_a_line(place, capsys, tmp_path):
    options = training(place / "model", place / "data", tmp_path / "a", 1)
    cases = [
        (options[1:], "give --train, --test or both"),
        (with_option(options, "--model", None), "--model is missing"),
        (with_option(options, "--model", tmp_path / "none"), "no such folder"),
        (with_option(options, "--data", None), "--data is missing"),
        (with_option(options, "--data", tmp_path / "none"), "none: no such folder"),
        (with_option(options, "--data", tmp_path), "expected a folder with train.jsonl in it"),
        (with_option(options, "--batch-size", 6), "5 examples are less than a batch"),
        (with_option(options, "--batch-size", 0), "--batch-size=0: expected 1 or more"),
        (with_option(options, "--steps-per-report", 0), "--steps-per-report=0: expected 1 or"),
        (with_option(options, "--steps-per-eval", 0), "--steps-per-eval=0: expected 1 or more"),
        ([*options, "--max-seq-length", 1], "--max-seq-length=1: expected 2 or more"),
        ([*options, "--val-batches", 0], "--val-batches=0: expected 1 or more, or -1 for the"),
        ([*options, "--val-batches", -2], "--val-batches=-2: expected 1 or more, or -1 for the"),
        ([*options, "--test-batches", 0], "--test-batches=0: expected 1 or more, or -1 for the"),
        ([*options, "--fine-tune-type", "full"], "--fine-tune-type full: expected lora or dora"),
        ([*options, "--num-layers", 4], "--num-layers=4: expected 1 to 3, or -1 for all"),
        ([*options, "--num-layers", 0], "--num-layers=0: expected 1 to 3"),
        ([*options, "--resume-adapter-file", tmp_path / "no"], "no: no such file"),
        ([*options, "-c", tmp_path / "no.yaml"], "no.yaml: No such file"),
        ([*options, "--itres", 3], "unrecognized arguments: --itres"),
    ]
    for given, message in cases:
        assert message in refusal(capsys, *given)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_parameters: {alpha: 3}", "lora_parameters.alpha is not known; did you mean"),
        ("lora_parameters: {rank: 0}", "lora_parameters.rank=0: expected 1 or more"),
        ("lora_parameters: {keys: []}", "lora_parameters.keys=[]: expected a list"),
        (
            "lora_parameters: {keys: [self_attn.full.q_proj]}",
            "'self_attn.full.q_proj' is no projection of the linear heads, and all else stays "
            "frozen here; the nearest is 'self_attn.linear.q_proj'",
        ),
        ("lora_parameters: 3", "lora_parameters=3: expected an object"),
        ("fine_tune_type: full", "expected lora or dora"),
        ("- 1", "expected options, a name and a value each"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_settings_are_told_in_a_line(place, capsys, tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    options = training(place / "model", place / "data", tmp_path / "a", 1)
    assert message in refusal(capsys, *options, "-c", tmp_path / "s.yaml")


def test_models_without_linear_heads_are_refused(place, capsys, tmp_path):
    write_qwen3(tmp_path / "dense")
    options = training(tmp_path / "dense", place / "data", tmp_path / "a", 1)
    message = refusal(capsys, *options)
    assert "has no linear heads (model_type 'qwen3')" in message and "mlx_hydra.convert" in message

    tiny.save(tiny.model(), tiny.config(), tmp_path / "model")
    options = training(tmp_path / "model", place / "data", tmp_path / "a", 1)
    message = refusal(capsys, *options, "--num-layers", 1)
    assert "no linear heads in its last 1 of 3 layers: the last layer that has some is 1" in message
    every = {"full_attention_heads": [[0, 1, 2, 3]] * 3}
    tiny.save(tiny.model(**every), tiny.config(**every), tmp_path / "full")
    options = training(tmp_path / "full", place / "data", tmp_path / "a", 1)
    assert "in its last 3 of 3 layers: none has" in refusal(capsys, *options)


def test_adapters_of_another_kind_are_not_resumed(place, trained, capsys, tmp_path):
    file = tmp_path / "adapters.safetensors"
    weights = {"model.layers.0.self_attn.full.q_proj.weight": mx.zeros((2, 2))}
    mx.save_safetensors(str(file), weights)
    options = training(place / "model", place / "data", tmp_path / "a", 1)
    message = refusal(capsys, *options, "--resume-adapter-file", file)
    assert "holds model.layers.0.self_attn.full.q_proj.weight, which is no adapter" in message

    (tmp_path / "s.yaml").write_text("lora_parameters: {rank: 4}")
    shutil.copy(place / "adapters" / "adapters.safetensors", file)
    message = refusal(capsys, *options, "-c", tmp_path / "s.yaml", "--resume-adapter-file", file)
    assert "is of rank 8, this run of rank 4" in message
