import sys
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model

from mlx_hydra.models import hydrahead
from mlx_hydra.models.cache import linear_part, padding_mask
from mlx_hydra.models.hydrahead import Model, ModelArgs, TransformerBlock
from mlx_hydra.models.positions import rotation_of

FULL = {"rope": False, "log_scale_base": 16, "gate": True}
LINEAR = {"kind": "gated_delta", "conv_kernel_size": 4, "rope": True, "gate": True}

# Each is one switch away from tiny.config().
SWITCHES = {
    "full heads rotated": {"full_attention": {**FULL, "rope": True}},
    "no log scale": {"full_attention": {**FULL, "log_scale_base": None}},
    "another log scale": {"full_attention": {**FULL, "log_scale_base": 200}},
    "full heads not gated": {"full_attention": {**FULL, "gate": False}},
    "linear heads not rotated": {"linear_attention": {**LINEAR, "rope": False}},
    "linear heads not gated": {"linear_attention": {**LINEAR, "gate": False}},
    "no convolution": {"linear_attention": {**LINEAR, "conv_kernel_size": None}},
    "two taps": {"linear_attention": {**LINEAR, "conv_kernel_size": 2}},
    "linear heads alone normed": {"fusion": {"norm": "linear"}},
    "no head normed": {"fusion": {"norm": False}},
    "another eps": {"fusion": {"norm": True, "eps": 0.1}},
    "tied embeddings": {"tie_word_embeddings": True},
    "another rope base": {"rope_theta": 100.0},
    "rope scaled linearly": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "other heads": {"full_attention_heads": [[], [0, 2, 3], [0, 1, 2, 3]]},
}

EXACT = {
    "full_attention_heads": [[0, 1, 2, 3]] * 3,
    "full_attention": {"rope": True, "log_scale_base": None, "gate": False},
    "fusion": {"norm": "linear"},
}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def weights_of(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def with_weights_of(other, **changes) -> Model:
    """Another model with every weight that the two have in common."""
    built = tiny.model(**changes)
    own, shared = weights_of(built), weights_of(other)
    common = [(n, w) for n, w in shared.items() if n in own and own[n].shape == w.shape]
    built.load_weights(common, strict=False)
    return built


@pytest.mark.parametrize(
    "name, tolerance",
    [("hydrahead_paper", 5e-4), ("hydrahead_ragged", 5e-4), ("hydrahead_plain", 1e-4)],
)
@pytest.mark.parametrize("step", [1, 5, 37])
def test_an_independent_torch_model_gives_the_same_logits(name, tolerance, step):
    model, golden = tiny.golden_model(name)
    logits = tiny.in_steps(model, golden["tokens"], step)
    assert tiny.distance(logits, golden["logits"]) < tolerance
    if step == 37:
        assert tiny.distance(model(golden["tokens"]), golden["logits"]) < tolerance


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_prefill_in_steps_of_any_size_gives_what_the_whole_gives(model, step):
    inputs = tiny.tokens(300, batch=2)
    whole_cache, cache = model.make_cache(), model.make_cache()
    whole = model(inputs, cache=whole_cache)
    assert tiny.distance(tiny.in_steps(model, inputs, step, cache), whole) < 1e-4
    assert tiny.distance(model(inputs), whole) < 1e-5
    for found, expected in zip(map(linear_part, cache), map(linear_part, whole_cache)):
        for x, y in zip(found or [], expected or []):
            assert tiny.distance(x, y) < 1e-4


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_makes_a_difference_and_decodes_what_it_prefills(model, changes):
    inputs = tiny.tokens(90)
    switched = with_weights_of(model, **changes)
    logits = switched(inputs)
    assert 1e-3 < tiny.distance(logits, model(inputs)) < 1e3
    cache = switched.make_cache()
    parts = [tiny.in_steps(switched, inputs[:, :67], 67, cache)]
    parts.append(tiny.in_steps(switched, inputs[:, 67:85], 6, cache))
    parts.append(tiny.in_steps(switched, inputs[:, 85:], 1, cache))
    assert tiny.distance(mx.concatenate(parts, axis=1), logits) < 1e-4


def test_later_tokens_do_not_change_what_came_before(model):
    inputs = tiny.tokens(80)
    changed = mx.concatenate([inputs[:, :50], (inputs[:, 50:] + 1) % tiny.VOCABULARY], axis=1)
    before, after = model(inputs), model(changed)
    assert tiny.distance(before[:, :50], after[:, :50]) < 1e-5
    assert tiny.distance(before[:, 50:], after[:, 50:]) > 0.1


def test_a_layer_has_no_parameter_that_it_does_not_need(model):
    names = [
        {n.split(".")[4] for n in weights_of(model) if f"layers.{i}.self_attn" in n}
        for i in (0, 1, 2)
    ]
    assert names[0] == {"linear", "fusion", "o_proj"}
    assert names[1] == {"full", "linear", "fusion", "o_proj"}
    assert names[2] == {"full", "fusion", "o_proj"}
    exact = {n.split(".")[4] for n in weights_of(tiny.model(**EXACT)) if "self_attn" in n}
    assert exact == {"full", "o_proj"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope_scaling", [None, SWITCHES["yarn"]["rope_scaling"]])
def test_with_every_head_full_it_is_qwen3_to_the_bit(tied, rope_scaling):
    settings = tiny.config(tie_word_embeddings=tied, rope_scaling=rope_scaling, **EXACT)
    model = tiny.model(**settings)
    teacher = qwen3.Model(qwen3.ModelArgs.from_dict({**settings, "model_type": "qwen3"}))
    weights = {n.replace(".full.", "."): w for n, w in weights_of(model).items()}
    teacher.load_weights(list(weights.items()))
    inputs = tiny.tokens(40, batch=2)
    assert mx.array_equal(model(inputs), teacher(inputs))
    caches = model.make_cache(), [KVCache() for _ in range(3)]
    for step in (30, 1, 8, 1):
        part, inputs = inputs[:, :step], inputs[:, step:]
        assert mx.array_equal(model(part, cache=caches[0]), teacher(part, cache=caches[1]))


def mean_error(found, expected) -> float:
    """The mean difference, over the scale of what is expected."""
    found, expected = (np.array(x.astype(mx.float32)) for x in (found, expected))
    return np.abs(found - expected).mean() / expected.std()


def cast(model, dtype):
    """As mlx_lm.convert casts."""

    def to_dtype(path, x):
        floating = mx.issubdtype(x.dtype, mx.floating)
        return x.astype(dtype) if floating and model.cast_predicate(path) else x

    model.update(tree_map_with_path(to_dtype, model.parameters()))
    return model


FLOAT32 = ("A_log", "dt_bias", "gamma")


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 0.01), (mx.bfloat16, 0.06)])
def test_half_precision_is_close_and_its_state_float32(model, dtype, tolerance):
    half = cast(tiny.model(), dtype)
    for name, x in weights_of(half).items():
        assert x.dtype == (mx.float32 if name.endswith(FLOAT32) else dtype), name
    inputs = tiny.tokens(80)
    cache = half.make_cache()
    logits = tiny.in_steps(half, inputs, 79, cache)
    assert logits.dtype == dtype
    assert mean_error(logits, model(inputs)) < tolerance
    recurrent, past = cache[1][1][0], cache[1][1][1]
    assert (recurrent.dtype, past.dtype) == (mx.float32, dtype)
    assert cache[1][0].keys.dtype == dtype


def test_half_precision_reaches_the_operations_and_the_decay_stays_float32(monkeypatch):
    seen = []

    def watch(name):
        operation = getattr(hydrahead, name)

        def watched(*arguments, **options):
            arrays = arguments[:5]
            if name == "fuse_kinds":
                kinds, gamma = arguments
                arrays = [gamma, *(x for kind in kinds for x in kind[:2])]
            seen.append((name, *(x.dtype for x in arrays if isinstance(x, mx.array))))
            return operation(*arguments, **options)

        monkeypatch.setattr(hydrahead, name, watched)

    half = cast(tiny.model(), mx.bfloat16)
    for name in ("head_attention", "gated_delta", "fuse_kinds"):
        watch(name)
    half(tiny.tokens(5))
    half, whole = mx.bfloat16, mx.float32
    assert set(seen) == {
        ("head_attention", half, half, half),
        ("gated_delta", half, half, half, whole, whole),
        ("fuse_kinds", whole, half, half),
        ("fuse_kinds", whole, half, half, half, half),
    }


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_it_runs_as_its_dequantised_self_and_keeps_the_decay_whole(bits, dtype):
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64}
    settings = tiny.config(**sizes)
    quantised, saved = quantize_model(cast(tiny.model(**sizes), dtype), settings, 32, bits)
    weights = weights_of(quantised)
    for name, x in weights.items():
        if name.endswith(FLOAT32):
            assert x.dtype == mx.float32, name
        if "a_proj" in name or "b_proj" in name:
            assert name.endswith(".weight") and x.dtype == dtype, name
        if "q_proj.weight" in name or "g_proj.weight" in name:
            assert x.dtype == mx.uint32, name
    assert saved["quantization"]["bits"] == bits

    plain = {}
    for name, x in weights.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight" and f"{base}.scales" in weights:
            scales, biases = weights[f"{base}.scales"], weights[f"{base}.biases"]
            plain[name] = mx.dequantize(x, scales, biases, 32, bits)
        elif kind not in ("scales", "biases"):
            plain[name] = x
    dequantised = Model(ModelArgs.from_dict(settings))
    dequantised.load_weights(list(plain.items()))
    inputs = tiny.tokens(70)
    tolerance = 1e-5 if dtype == mx.float32 else 0.05
    assert mean_error(quantised(inputs), dequantised(inputs)) < tolerance


@pytest.mark.parametrize("changes", [{}, *SWITCHES.values()], ids=["base", *SWITCHES])
def test_gradients_reach_every_parameter(changes):
    built = tiny.model(**changes)
    inputs = tiny.tokens(70)

    def loss(built):
        return nn.losses.cross_entropy(built(inputs[:, :-1]), inputs[:, 1:], reduction="mean")

    gradients = dict(tree_flatten(nn.value_and_grad(built, loss)(built)[1]))
    assert gradients.keys() == weights_of(built).keys()
    for name, gradient in gradients.items():
        assert mx.isfinite(gradient).all(), name
        assert mx.abs(gradient).max() > 0, name


def test_a_training_step_can_be_compiled():
    built = tiny.model()
    shapes = {name: x.shape for name, x in weights_of(built).items()}
    inputs = tiny.tokens(70)

    def loss(built):
        return nn.losses.cross_entropy(built(inputs[:, :-1]), inputs[:, 1:], reduction="mean")

    # Traced and never evaluated: on the CPU the kernels take a minute to compile.
    step = mx.compile(lambda: nn.value_and_grad(built, loss)(built), inputs=built.state)
    value, gradients = step()
    assert value.shape == ()
    assert {name: x.shape for name, x in tree_flatten(gradients)} == shapes


def test_a_lora_step_with_checkpoints_can_be_compiled(monkeypatch):
    monkeypatch.setattr(TransformerBlock, "__call__", TransformerBlock.__call__)
    built, inputs = tiny.model(), tiny.tokens(20)
    built.freeze()
    linear_to_lora_layers(built, 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    grad_checkpoint(built.layers[0])

    def loss(built, inputs):
        return nn.losses.cross_entropy(built(inputs[:, :-1]), inputs[:, 1:], reduction="mean")

    step = mx.compile(lambda x: nn.value_and_grad(built, loss)(built, x), inputs=built.state)
    # Traced and never evaluated, as above.
    value, gradients = step(inputs)
    assert value.shape == ()
    assert len(tree_flatten(gradients)) == len(tree_flatten(built.trainable_parameters()))


def test_a_gradient_is_the_slope_of_the_loss():
    built = tiny.model()
    inputs = tiny.tokens(70)

    def loss(built):
        return nn.losses.cross_entropy(built(inputs[:, :-1]), inputs[:, 1:], reduction="mean")

    gradients = dict(tree_flatten(nn.value_and_grad(built, loss)(built)[1]))
    for name in (
        "model.layers.0.self_attn.linear.A_log",
        "model.layers.0.self_attn.linear.k_conv1d.weight",
        "model.layers.1.self_attn.fusion.gamma",
        "model.layers.1.self_attn.full.k_proj.weight",
        "model.embed_tokens.weight",
    ):
        weight, gradient = weights_of(built)[name], gradients[name]
        step, losses = 2e-3 / (gradient**2).sum() * gradient, []
        for moved in (weight + step, weight - step, weight):
            built.load_weights([(name, moved)], strict=False)
            losses.append(loss(built).item())
        assert losses[0] - losses[1] == pytest.approx(4e-3, rel=0.02), name


def test_embeddings_stand_in_for_tokens(model):
    inputs = tiny.tokens(20)
    embeddings = model.model.embed_tokens(inputs)
    assert mx.array_equal(model(None, input_embeddings=embeddings), model(inputs))
    assert mx.array_equal(model(inputs * 0, input_embeddings=embeddings), model(inputs))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_linear_heads_take_nothing_from_what_is_masked(model, poison):
    linear = model.layers[0].self_attn.linear
    x = mx.random.normal((1, 12, 32), key=mx.random.key(0))
    x[:, :2] = x[:, 9:] = poison
    padded, alone = (model.make_cache()[0] for _ in range(2))
    padded.prepare(lengths=[9])
    padded.left_padding = mx.array([2])
    o, _ = linear(x, padding_mask(padded, 12), padded, 0)
    expected, _ = linear(x[:, 2:9], None, alone, 2)
    assert tiny.distance(o[:, 2:9], expected) < 1e-5
    assert not o[:, :2].any()
    assert not o[:, 9:].any()
    for found, state in zip(padded.cache, alone.cache):
        assert tiny.distance(found, state) < 1e-5


def test_fused_heads_are_what_the_output_projection_reads(model):
    attention = model.layers[1].self_attn
    x = mx.random.normal((2, 9, 32), key=mx.random.key(0))
    heads = attention.fused_heads(x)
    assert heads.shape == (2, 9, 4 * 16)
    assert mx.array_equal(attention.o_proj(heads), attention(x))


def test_a_checkpoint_in_pytorchs_layout_is_not_taken_for_ours():
    built = Model(ModelArgs.from_dict(tiny.config(head_order="teacher")))
    with pytest.raises(ValueError, match=r"head_order 'teacher'.*convert\.py"):
        built.sanitize({})


def test_tied_embeddings_drop_the_head_that_some_checkpoints_carry():
    weights = {"lm_head.weight": mx.zeros(1), "model.norm.weight": mx.zeros(1)}
    tied, untied = (
        Model(ModelArgs.from_dict(tiny.config(tie_word_embeddings=tied))).sanitize(dict(weights))
        for tied in (True, False)
    )
    assert tied.keys() == {"model.norm.weight"}
    assert untied.keys() == weights.keys()


def test_a_model_may_run_in_another_thread_than_it_was_made_in():
    rotation, found = rotation_of(nn.RoPE(32, base=1e4), 32), []
    thread = threading.Thread(target=lambda: found.append((2 * rotation.frequencies).tolist()))
    thread.start()
    thread.join()
    assert np.allclose(found[0], 2 * 1e4 ** -(np.arange(0, 32, 2) / 32), rtol=1e-6)


def test_mlx_lm_finds_the_model_type():
    assert sys.modules["mlx_lm.models.hydrahead"].Model is Model
