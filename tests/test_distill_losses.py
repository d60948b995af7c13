"""The losses against plain ones that hold all logits, and the memory that they need."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import distance, exact_peak

from mlx_hydra.distill import losses
from mlx_hydra.distill.losses import attention_loss, head_loss


def sample(N=37, V=53, hidden=8, seed=0, dtype=mx.float32):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in ((N, hidden), (V, hidden), (N, 5), (V, 5))]
    h, weight, teacher_h, teacher_weight = (mx.array(x.astype(np.float32)) for x in arrays)
    targets = mx.array(rng.integers(0, V, N))
    return h.astype(dtype), weight.astype(dtype), targets, teacher_h, teacher_weight


def plain(h, weight, targets, teacher_logits, kl_weight, ce_weight):
    log_q = nn.log_softmax(h @ weight.T)
    ce = nn.losses.cross_entropy(h @ weight.T, targets, reduction="mean")
    kl = nn.losses.kl_div_loss(log_q, nn.log_softmax(teacher_logits)).mean()
    return kl_weight * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("rows", [1, 8, 37, 100])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0)])
def test_loss_and_gradients_are_those_of_the_plain_form(rows, weights, monkeypatch):
    h, weight, targets, teacher_h, teacher_weight = sample()
    monkeypatch.setattr(losses, "LOGIT_BYTES", rows * 4 * len(weight))
    teacher = teacher_h, lambda x: x @ teacher_weight.T

    def ours(h, weight):
        return head_loss(h, weight, targets, teacher, *weights)

    def theirs(h, weight):
        return plain(h, weight, targets, teacher_h @ teacher_weight.T, *weights)

    found, grads = mx.value_and_grad(lambda *x: ours(*x), (0, 1))(h, weight)
    expected, expected_grads = mx.value_and_grad(theirs, (0, 1))(h, weight)
    for a, b in zip(found, expected):
        assert abs(a.item() - b.item()) < 1e-5
    for a, b in zip(grads, expected_grads):
        assert distance(a, b) < 1e-6


def test_without_a_teacher_it_is_the_cross_entropy(monkeypatch):
    h, weight, targets, *_ = sample()
    monkeypatch.setattr(losses, "LOGIT_BYTES", 5 * 4 * len(weight))

    def theirs(h, weight):
        return 3 * nn.losses.cross_entropy(h @ weight.T, targets, reduction="mean")

    def ours(h, weight):
        return 3 * head_loss(h, weight, targets).loss

    found, grads = mx.value_and_grad(ours, (0, 1))(h, weight)
    expected, expected_grads = mx.value_and_grad(theirs, (0, 1))(h, weight)
    assert abs(found.item() - expected.item()) < 1e-5
    assert all(distance(a, b) < 1e-6 for a, b in zip(grads, expected_grads))


def test_half_precision_goes_in_and_comes_out(monkeypatch):
    h, weight, targets, teacher_h, teacher_weight = sample(dtype=mx.bfloat16)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 5 * 4 * len(weight))
    teacher = teacher_h, lambda x: x @ teacher_weight.T

    def ours(h, weight):
        return head_loss(h, weight, targets, teacher).loss

    def theirs(h, weight):
        h, weight = h.astype(mx.float32), weight.astype(mx.float32)
        return plain(h, weight, targets, teacher_h @ teacher_weight.T, 1, 1)[0]

    found, grads = mx.value_and_grad(ours, (0, 1))(h, weight)
    expected, expected_grads = mx.value_and_grad(theirs, (0, 1))(h, weight)
    assert found.dtype == mx.float32
    assert abs(found.item() - expected.item()) < 0.02
    for a, b in zip(grads, expected_grads):
        assert a.dtype == mx.bfloat16
        assert distance(a, b) < 0.02 * mx.abs(b).max().item()


@exact_peak
@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_pass_holds_all_logits(with_teacher, monkeypatch):
    N, V = 1024, 16384
    h, weight, targets, teacher_h, teacher_weight = sample(N, V)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 16 * 4 * V)
    teacher = (teacher_h, lambda x: x @ teacher_weight.T) if with_teacher else None
    mx.eval(h, weight, targets, teacher_h, teacher_weight)

    def ours(h, weight):
        return head_loss(h, weight, targets, teacher).loss

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(ours, (0, 1))(h, weight))
    logits = N * V * 4
    assert mx.get_peak_memory() - before < 0.5 * logits


def test_the_attention_loss_is_taken_in_float32():
    a, b = mx.full((2, 3), 3.0, mx.bfloat16), mx.full((2, 3), 1.01, mx.bfloat16)
    expected = (3 - np.float32(b.astype(mx.float32)[0, 0].item())) ** 2
    assert abs(attention_loss(a, b).item() - expected) < 1e-6
