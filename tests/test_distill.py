"""The stages: what they train, their gradients, and that a run goes on where it was stopped."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoint_files import read_bytes, read_config
from distill_runs import (
    distill,
    figures,
    losses,
    stage,
    write_config,
    write_folder,
    write_models,
    write_text,
)
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from tiny import distance, exact_peak

from mlx_hydra.distill import trainer
from mlx_hydra.distill.models import HIDDEN_SIZES, load_student, load_teacher
from mlx_hydra.distill.objectives import Attention, NextToken, install
from mlx_hydra.loading import load

STAGES = [
    stage("attention", 6, schedule="linear", warmup=0.4),
    stage("logits", 5, optimizer_config={"betas": [0.8, 0.9], "bias_correction": True}),
    stage("next_token", 4, optimizer="sgd", optimizer_config={"momentum": 0.9}, clip=0.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def whole(folder):
    """A run of three stages that nothing interrupts."""
    return distill(write_config(folder / "whole.yaml", STAGES, save_every=4))


@pytest.fixture(scope="module")
def pair(folder):
    student = load_student(str(folder / "student"))
    teacher = load_teacher(str(folder / "teacher"), student, HIDDEN_SIZES, mx.float32)
    return student, teacher


def trained_weights(student, objective) -> dict[str, mx.array]:
    weights = {name: student.reader.read(name) for name in student.reader.tensors}
    # Away from the start of a conversion, where gates and rates do not answer yet.
    rng = np.random.default_rng(0)
    return {
        name: w + 0.05 * mx.array(rng.standard_normal(w.shape).astype(np.float32))
        for name, w in weights.items()
        if objective.trains(name)
    }


def sample(rows=2, length=24) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, 61, (rows, length + 1)))


def test_attention_objective_is_the_mse_on_the_teachers_layer_inputs(pair, monkeypatch):
    student, teacher = pair
    seen = []
    attend = qwen3.Attention.__call__

    def record(self, x, mask=None, cache=None):
        seen.append((x, attend(self, x, mask, cache)))
        return seen[-1][1]

    monkeypatch.setattr(qwen3.Attention, "__call__", record)
    tokens = sample()
    teacher(tokens[:, :-1])
    monkeypatch.undo()

    objective = Attention(student, teacher, mx.float32)
    weights = trained_weights(student, objective)
    assert len(seen) == 3 and not any(".mlp." in name for name in weights)

    def expected(weights):
        install(student.model, weights, mx.float32)
        parts = [
            (layer.self_attn(x) - y).square().mean()
            for layer, (x, y) in zip(student.model.layers, seen)
        ]
        return sum(parts) / 3

    expected_loss, expected_grads = mx.value_and_grad(expected)(weights)
    grads, found = objective.gradients(weights, tokens)
    assert abs(found["loss"].item() - expected_loss.item()) < 1e-6
    assert set(grads) == set(weights) == {n for n in student.reader.tensors if "self_attn" in n}
    for name, grad in grads.items():
        assert mx.abs(grad).max().item() > 0, name
        assert distance(grad, expected_grads[name]) < 1e-5, name


@pytest.mark.parametrize("grad_checkpoint", [True, False])
@pytest.mark.parametrize("weights_of_loss", [(1.0, 0.5), None])
def test_logits_and_next_token_are_those_of_whole_logits(pair, weights_of_loss, grad_checkpoint):
    student, teacher = pair
    with_teacher = () if weights_of_loss is None else (teacher, *weights_of_loss)
    kl_weight, ce_weight = weights_of_loss or (0.0, 1.0)
    objective = NextToken(student, mx.float32, *with_teacher, grad_checkpoint=grad_checkpoint)
    weights, tokens = trained_weights(student, objective), sample()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def expected(weights):
        install(student.model, weights, mx.float32)
        logits = student.model(inputs)
        ce = nn.losses.cross_entropy(logits, targets, reduction="mean")
        of_teacher = nn.log_softmax(teacher(inputs))
        kl = nn.losses.kl_div_loss(nn.log_softmax(logits), of_teacher, reduction="none")
        return kl_weight * kl.mean() + ce_weight * ce, kl.mean(), ce

    (loss, kl, ce), expected_grads = mx.value_and_grad(expected)(weights)
    plain = type(student.model.layers[0]).__call__
    grads, found = objective.gradients(weights, tokens)
    assert type(student.model.layers[0]).__call__ is plain
    assert abs(found["loss"].item() - loss.item()) < 1e-5
    assert abs(found["ce"].item() - ce.item()) < 1e-5
    if weights_of_loss is not None:
        assert abs(found["kl"].item() - kl.item()) < 1e-5
    assert set(grads) == set(student.reader.tensors)
    for name, grad in grads.items():
        assert distance(grad, expected_grads[name]) < 1e-4, name


def test_half_precision_computes_and_float32_is_trained(pair):
    student, teacher = pair
    whole = NextToken(student, mx.float32, teacher, 1.0, 1.0)
    weights, tokens = trained_weights(student, whole), sample()
    expected, expected_figures = whole.gradients(weights, tokens)
    half = NextToken(student, mx.bfloat16, teacher, 1.0, 1.0)
    grads, found = half.gradients(weights, tokens)
    assert abs(found["loss"].item() - expected_figures["loss"].item()) < 0.05
    for name, w in tree_flatten(student.model.parameters()):
        kept = name.endswith(("A_log", "dt_bias", "gamma"))
        assert w.dtype == (mx.float32 if kept else mx.bfloat16), name
        assert grads[name].dtype == mx.float32, name
    norm = sum(g.square().sum() for g in expected.values())
    off = sum((g - grads[name]).square().sum() for name, g in expected.items())
    assert mx.sqrt(off / norm).item() < 0.1


def test_a_quantised_teacher_teaches(folder):
    model, config = load_model(folder / "teacher")
    model, config = quantize_model(model, config, group_size=32, bits=8)
    save_model(folder / "quantised", model)
    save_config(config, folder / "quantised" / "config.json")
    stages, outs = [stage("attention", 1), stage("logits", 1)], []
    for teacher in ("teacher", "quantised"):
        path = folder / f"by-{teacher}.yaml"
        outs.append(distill(write_config(path, stages, teacher=str(folder / teacher))))
    plain, quantised = (np.array(figures(out, "loss"), float) for out in outs)
    assert np.allclose(plain, quantised, rtol=0.02) and not np.array_equal(plain, quantised)


def test_losses_fall_in_each_stage(folder):
    steady = {"schedule": "constant", "learning_rate": 0.006, "length": 32, "micro_batch": 4}
    stages = [
        stage("attention", 16, **steady),
        stage("logits", 16, **steady),
        stage("next_token", 16, **steady),
    ]
    out = distill(write_config(folder / "falls.yaml", stages, grad_checkpoint=False))
    for number in (1, 2, 3):
        curve = losses(out, number)
        assert len(curve) == 16
        assert np.mean(curve[-4:]) < 0.95 * np.mean(curve[:4]), curve


@pytest.mark.parametrize("recipe", ["paper", "exact"])
def test_stage_1_leaves_all_but_the_hybrid_attention_to_the_bit(recipe, tmp_path):
    write_models(tmp_path, recipe=recipe, dtype=mx.bfloat16)
    write_text(tmp_path / "text.txt")
    path = write_config(tmp_path / "run.yaml", [stage("attention", 4)], dtype="bfloat16")
    before, after = (read_bytes(f) for f in (tmp_path / "student", distill(path) / "model"))
    # With recipe exact, the layer whose heads are all full is the teacher's own.
    hybrid = (0, 2) if recipe == "exact" else (0, 1, 2)
    attention = tuple(f"model.layers.{layer}.self_attn." for layer in hybrid)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name][:2] == after[name][:2]
        if not name.startswith(attention):
            assert before[name] == after[name], name
    changed = {name for name in before if before[name] != after[name]}
    kinds = ("q_proj.weight", "v_conv1d.weight", "o_proj.weight", "A_log", "gamma")
    assert all(any(n.startswith(a) and n.endswith(kinds) for n in changed) for a in attention)
    assert {k for k in kinds if any(n.endswith(k) for n in changed)} == set(kinds)


def test_the_model_is_saved_as_a_conversion_is(folder, whole):
    student, saved = folder / "student", whole / "model"
    assert {path.name for path in student.iterdir()} == {path.name for path in saved.iterdir()}
    assert read_config(saved) == read_config(student)
    model, tokenizer, _ = load(str(saved))
    assert model(mx.array([tokenizer.encode("w1 w2 w3")])).shape == (1, 3, 61)
    weights = dict(tree_flatten(model.parameters()))
    checkpoint = mx.load(str(whole / "checkpoints" / "step-00000015" / "model.safetensors"))
    for name, w in weights.items():
        assert mx.array_equal(w, checkpoint[f"weight/{name}"]), name


def test_a_stage_begins_with_the_weights_of_the_one_before_and_nothing_else(folder):
    first, second = stage("attention", 3), stage("logits", 3)
    both = distill(write_config(folder / "both.yaml", [first, second]))
    alone = distill(write_config(folder / "first.yaml", [first]))
    # The seed of the second stage's data.
    path = write_config(folder / "second.yaml", [second], student=str(alone / "model"), seed=1)
    names = ("objective", "loss", "gradient_norm")
    assert figures(both, *names)[3:] == figures(distill(path), *names)


@exact_peak
def test_recomputed_layers_are_not_held(pair):
    student, _ = pair
    tokens, peaks = sample(rows=1, length=512), []
    mx.eval(student.model.parameters())
    # By tests before this one, too.
    held = mx.get_active_memory()
    for grad_checkpoint in (True, False):
        objective = NextToken(student, mx.float32, grad_checkpoint=grad_checkpoint)
        weights = trained_weights(student, objective)
        mx.eval(weights)
        mx.reset_peak_memory()
        mx.eval(objective.gradients(weights, tokens))
        peaks.append(mx.get_peak_memory() - held)
    assert peaks[0] < 0.7 * peaks[1]


@pytest.mark.parametrize("recipe, expected", [("paper", [0, 1, 2]), ("exact", [0, 2])])
def test_layers_that_are_the_teachers_own_are_not_trained(recipe, expected, tmp_path):
    write_models(tmp_path, recipe=recipe)
    student = load_student(str(tmp_path / "student"))
    teacher = load_teacher(str(tmp_path / "teacher"), student, HIDDEN_SIZES, mx.float32)
    assert student.hybrid_layers() == expected
    objective = Attention(student, teacher, mx.float32)
    names = {name for name in student.reader.tensors if objective.trains(name)}
    assert {int(name.split(".")[2]) for name in names} == set(expected)
    assert all(".self_attn." in name for name in names)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [2, 6, 9, 13])
def test_a_killed_run_goes_on_to_the_same_digits(folder, whole, at, monkeypatch):
    """Killed before its first checkpoint, between two stages, and inside the second and third."""
    path = write_config(folder / f"killed-{at}.yaml", STAGES, save_every=4)
    rows = []
    add = trainer.LossFile.add

    def killed(self, row):
        add(self, row)
        rows.append(row)
        if len(rows) == at:
            raise Killed

    monkeypatch.setattr(trainer.LossFile, "add", killed)
    with pytest.raises(Killed):
        distill(path)
    monkeypatch.undo()
    (folder / f"killed-{at}" / "checkpoints" / ".step-99.partial").mkdir(parents=True)
    out = distill(path)
    names = ("stage", "step", "tokens", "loss", "kl", "ce", "learning_rate", "gradient_norm")
    assert figures(out, *names) == figures(whole, *names)
    assert len(figures(out, "loss")) == 15
    assert read_bytes(out / "model") == read_bytes(whole / "model")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000015"]


def test_a_compiled_update_is_the_plain_one(folder, monkeypatch):
    """In all stages, and where a killed run goes on."""
    outs, compiled, compile_it = {}, [], mx.compile

    def counted(function, *args, **kwargs):
        compiled.append(getattr(function, "__name__", None))
        return compile_it(function, *args, **kwargs)

    monkeypatch.setattr(trainer.mx, "compile", counted)
    for on_gpu in (False, True):
        monkeypatch.setattr(trainer, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        path = write_config(folder / f"compiled-{on_gpu}.yaml", STAGES, save_every=4)
        outs[on_gpu] = distill(path)
        assert compiled.count("apply_gradients") == (3 if on_gpu else 0)

    path = write_config(folder / "compiled-killed.yaml", STAGES, save_every=4)
    add = trainer.LossFile.add

    def killed(self, row):
        add(self, row)
        if (row["stage"], row["step"]) == (2, 3):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer.LossFile, "add", killed)
        with pytest.raises(Killed):
            distill(path)
    assert read_bytes(distill(path) / "model") == read_bytes(outs[True] / "model")

    names = ("loss", "gradient_norm", "learning_rate")
    plain, ours = (np.array(figures(outs[on_gpu], *names), float) for on_gpu in (False, True))
    assert np.allclose(plain, ours, rtol=1e-4)
    start, plain, ours = map(
        read_bytes, (folder / "student", *(o / "model" for o in outs.values()))
    )
    for name, (_, _, data) in start.items():
        a, b, c = (np.frombuffer(d, np.float32) for d in (data, plain[name][2], ours[name][2]))
        assert np.abs(b - c).max() <= 1e-3 * np.abs(b - a).max(), name


def test_a_finished_run_says_so(folder, whole, capfd):
    before = (whole / "losses.csv").read_bytes()
    distill(folder / "whole.yaml")
    assert "is there already: nothing is left to do" in capfd.readouterr().err
    assert (whole / "losses.csv").read_bytes() == before


@pytest.mark.parametrize("objective", ["attention", "logits"])
def test_accumulated_gradients_are_those_of_the_whole_batch(folder, objective):
    outs = [
        distill(
            write_config(
                folder / f"micro-{objective}-{size}.yaml",
                [stage(objective, 3, micro_batch=size, optimizer="sgd", learning_rate=0.1)],
            )
        )
        for size in (1, 4)
    ]
    one, four = (figures(out, "loss", "gradient_norm") for out in outs)
    assert np.allclose(np.array(one, float), np.array(four, float), rtol=1e-4)
    assert len({loss for loss, _ in one}) == 3


def test_the_learning_rate_rises_and_falls(folder, whole):
    rates = [float(rate) for (rate,) in figures(whole, "learning_rate")]
    assert np.allclose(rates[:6], [0.001, 0.002, 0.003, 0.00225, 0.0015, 0.00075])
    assert rates[6] == pytest.approx(0.003) and 0 < rates[10] < rates[9] < rates[8]


def test_gradients_are_clipped(folder):
    plain = stage("next_token", 2, optimizer="sgd", learning_rate=1.0, schedule="constant")
    before = read_bytes(folder / "student")
    for clip in (0.5, None):
        path = write_config(folder / f"clip-{clip}.yaml", [{**plain, "clip": clip}])
        (norm,), *_ = figures(out := distill(path), "gradient_norm")
        after = read_bytes(out / "model")
        moved = [
            np.frombuffer(after[n][2], np.float32) - np.frombuffer(before[n][2], np.float32)
            for n in before
        ]
        length = np.sqrt(sum(np.square(m, dtype=np.float64).sum() for m in moved))
        assert float(norm) > 1
        # Two steps of at most half a unit each.
        assert (length <= 1.001) == (clip is not None)


def test_what_a_checkpoint_tells(whole):
    state = json.loads((whole / "checkpoints" / "step-00000015" / "state.json").read_text())
    assert (state["stage"], state["step"], state["steps"]) == (2, 4, 15)
    assert state["config"]["stages"][0]["objective"] == "attention"
