"""The model on the kernels is the model on plain ops."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model
from test_model import EXACT, SWITCHES, cast

from mlx_hydra import kernels
from mlx_hydra.models import compiled_step, hydrahead, side_by_side
from mlx_hydra.models.cache import full_part, linear_part

# The kernels take heads of 32 channels and more.
SIZES = {"head_dim": 32}

# Asked now, as the simulator stands in for one.
ON_GPU = kernels.gpu_backend() is not None
SIMULATED = ("rope scaled linearly", "no convolution", "linear heads alone normed", "yarn")
CASES = {
    "base": {},
    "two layers of one kind": {"full_attention_heads": [[], [], [1, 2]]},
    "exact": EXACT,
    **{name: changes for name, changes in SWITCHES.items() if ON_GPU or name in SIMULATED},
}
ROUNDS = (20, 7, 1, 1)
# Of which a GPU compiles some.
PREFILLS = (256, 256, 256, 200, 256, 3, 1)


@pytest.fixture
def steps(monkeypatch):
    """Counts the fused steps that run."""
    calls = []
    run = hydrahead.gated_delta_step

    def watched(*arguments, **options):
        # A compiled step's token has no axis of its own.
        calls.append(arguments[0].shape[1] if arguments[0].ndim == 3 else 1)
        return run(*arguments, **options)

    monkeypatch.setattr(hydrahead, "gated_delta_step", watched)
    return calls


def rounds(model, inputs, cache, sizes=ROUNDS):
    """Logits of a sequence read in parts, and the states behind them."""
    logits, start = [], 0
    for size in sizes:
        logits.append(model(inputs[:, start : start + size], cache=cache))
        mx.eval(logits[-1], [c.state for c in cache])
        start += size
    states = [x for part in map(linear_part, cache) if part is not None for x in part.cache]
    return mx.concatenate(logits, axis=1), states


def on_ops(monkeypatch, function, *arguments):
    with monkeypatch.context() as patch:
        patch.setenv("MLX_HYDRA_BACKEND", "ops")
        found = function(*arguments)
    for model in arguments[:1]:
        # On a GPU it has compiled its steps: the kernels' first token is to be an ordinary one.
        model.model._remembered.forget()
    return found


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_prefill_and_decode_are_those_of_ops(changes, steps, kernel_backend, monkeypatch):
    # Not in training: then a layer's projections are one product in prefill too.
    model = tiny.model(**SIZES, **changes).eval()
    inputs = tiny.tokens(sum(ROUNDS))
    expected, states = on_ops(monkeypatch, rounds, model, inputs, model.make_cache())
    assert not steps
    found, own = rounds(model, inputs, model.make_cache())
    assert tiny.distance(found, expected) < 1e-4
    for x, y in zip(own, states):
        assert tiny.distance(x, y) < 1e-4
    linear_layers = sum(len(heads) < 4 for heads in model.args.full_attention_heads)
    assert steps == [size for size in ROUNDS[1:] for _ in range(linear_layers)]


@pytest.mark.skipif(not ON_GPU, reason="MLX compiles kernels on a GPU alone")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_compiled_steps_of_a_prefill_are_those_of_ops(changes, kernel_backend, monkeypatch):
    model = tiny.model(**SIZES, **changes).eval()
    inputs = tiny.tokens(sum(PREFILLS))
    expected, states = on_ops(monkeypatch, rounds, model, inputs, model.make_cache(), PREFILLS)
    # The second prompt's first step is compiled, too.
    for _ in range(2):
        found, own = rounds(model, inputs, model.make_cache(), PREFILLS)
        for x, y in zip((found, *own), (expected, *states)):
            assert tiny.distance(x, y) < 1e-4 * max(1, mx.abs(y).max().item())
    traced = model.model._compiled_prefill._traced.values()
    linear = any("linear" in layer.self_attn for layer in model.layers)
    assert linear == any(layer is not None for layers in traced for layer in layers)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rounding_costs_no_more_than_on_ops(dtype, kernel_backend, monkeypatch):
    sizes = PREFILLS if ON_GPU else ROUNDS
    model = cast(tiny.model(**SIZES).eval(), dtype)
    inputs = tiny.tokens(sum(sizes))
    expected, states = on_ops(monkeypatch, rounds, model, inputs, model.make_cache(), sizes)
    # On a GPU the second prompt is compiled from its first step on.
    prompts = [rounds(model, inputs, model.make_cache(), sizes) for _ in range(2)]
    exact = cast(model, mx.float32)
    truth, exact_states = on_ops(monkeypatch, rounds, exact, inputs, exact.make_cache(), sizes)
    for found, own in prompts:
        for x, y, z in zip((found, *own), (expected, *states), (truth, *exact_states)):
            assert x.dtype == y.dtype
            assert error(x, z) < 1.25 * error(y, z)


def error(x, truth):
    """The root of the mean squared difference."""
    return mx.sqrt(mx.mean((x.astype(mx.float32) - truth) ** 2)).item()


@pytest.fixture
def sums(monkeypatch):
    """Counts the products that take in what is before them."""
    calls = []
    run = side_by_side.normed_linear

    def watched(h, *arguments, **options):
        calls.append(len(h))
        return run(h, *arguments, **options)

    monkeypatch.setattr(side_by_side, "normed_linear", watched)
    return calls


def next_step(model, batch):
    """A token's hidden state and norm of it, from a compiled step's function and an ordinary step.

    And the arrays of the caches behind it, from both.
    """
    tokens, cache = tiny.tokens(7, batch=batch), model.make_cache()
    mx.eval(model(tokens[:, :6], cache=cache))
    parts = [(full_part(c), linear_part(c)) for c in cache]
    arrays = [
        (() if kv is None else (kv.keys, kv.values), () if part is None else tuple(part.cache))
        for kv, part in parts
    ]
    token = model.model.embed_tokens(tokens[:, 6:])
    step = compiled_step.traceable(model.layers, hydrahead.is_ours)
    # As it is before it is compiled, which takes a GPU.
    found, left = step(token, [mx.array([6])], arrays)
    found = model.model.norm(found)
    expected = model.model(tokens[:, 6:], cache=cache)
    kept = [
        (
            [] if kv is None else [x[:, :, :7] for x in (kv.keys, kv.values)],
            [] if part is None else part.cache,
        )
        for kv, part in parts
    ]
    left = [([x[:, :, :7] for x in of_full], of_linear) for of_full, of_linear in left]
    return (found, left), (expected, kept)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rope", [False, True])
def test_what_is_compiled_of_a_step_runs_on_the_kernels(batch, rope, steps, sums, kernel_backend):
    heads = {"rope": rope, "log_scale_base": 16, "gate": True}
    model = tiny.model(**SIZES, full_attention=heads).eval()
    (found, left), (expected, kept) = next_step(model, batch)
    linear = sum("linear" in layer.self_attn for layer in model.layers)
    # Of six tokens, of the compiled step and of the ordinary one.
    assert steps == [6] * linear + [1] * 2 * linear
    # Layers of full heads alone project for themselves, and all have an MLP.
    assert sums == [batch] * (linear + len(model.layers))
    assert tiny.distance(found, expected) < 1e-4
    for x, y in zip(tree_flatten(left), tree_flatten(kept)):
        assert tiny.distance(x[1], y[1]) < 1e-4


WEIGHTS = {
    "4 bits": (4, 32, {}),
    "8 bits": (8, 32, {}),
    "an odd MLP": (None, None, {"intermediate_size": 50}),
    "3 bits": (3, 32, {}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_so_it_does_with_weights_of_any_kind(kind, sums, kernel_backend):
    bits, group_size, changes = WEIGHTS[kind]
    settings = {**SIZES, "hidden_size": 64, "intermediate_size": 64, **changes}
    model = tiny.model(**settings).eval()
    if bits is not None:
        model, _ = quantize_model(model, tiny.config(**settings), group_size, bits)
    (found, left), (expected, kept) = next_step(model, 2)
    assert len(sums) == {"3 bits": 0, "an odd MLP": 2}.get(kind, 5)
    assert tiny.distance(found, expected) < 1e-4
    for x, y in zip(tree_flatten(left), tree_flatten(kept)):
        assert tiny.distance(x[1], y[1]) < 1e-4


@pytest.mark.parametrize("change", ["rows", "norm", "float norm", "lora", "bias", "types", "layer"])
def test_what_takes_no_sums_runs_part_by_part(change, sums, kernel_backend):
    class Louder(hydrahead.TransformerBlock):
        def __call__(self, *arguments, **options):
            return 1.5 * super().__call__(*arguments, **options)

    class Norm(nn.RMSNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model, batch = tiny.model(**SIZES).eval(), 1
    layer = model.layers[1]
    if change == "rows":
        batch = 5
    elif change == "norm":
        for layer in model.layers:
            layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = Norm
    elif change == "float norm":
        # After which all is float32.
        cast(model, mx.bfloat16)
        layer = model.layers[2]
        layer.post_attention_layernorm.set_dtype(mx.float32)
    elif change == "lora":
        keys = ["self_attn.linear.q_proj", "mlp.up_proj"]
        linear_to_lora_layers(model, 3, {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": keys})
    elif change == "bias":
        layer.mlp.up_proj.bias = mx.arange(layer.mlp.up_proj.weight.shape[0]) / 10
    elif change == "types":
        layer.mlp.set_dtype(mx.bfloat16)
    else:
        layer.__class__ = Louder
    (found, left), (expected, kept) = next_step(model, batch)
    missing = {"rows": 5, "norm": 5, "lora": 5, "layer": 2}.get(change, 1)
    assert len(sums) == 5 - missing
    assert found.dtype == expected.dtype
    rounded = change in ("types", "float norm")
    assert tiny.distance(found, expected) < (0.05 if rounded else 1e-4)
    for x, y in zip(tree_flatten(left), tree_flatten(kept)):
        assert x[1].dtype == y[1].dtype
        assert tiny.distance(x[1], y[1]) < (0.05 if rounded else 1e-4)


def test_no_token_waits_for_numbers(kernel_backend):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(9)
    cache = model.make_cache()
    # An ordinary token, and on a GPU a compiled one.
    rounds(model, tokens, cache, (4, 1, 1))
    # Made once, while the GPU is waited for.
    made = kernels.constant.cache_info().misses
    for at in (6, 7, 8):
        mx.eval(model(tokens[:, at : at + 1], cache=cache))
    assert kernels.constant.cache_info().misses == made


def test_a_prompt_of_a_few_tokens_starts_from_nothing(steps, kernel_backend, monkeypatch):
    model, inputs = tiny.model(**SIZES), tiny.tokens(5, batch=2)
    expected, _ = on_ops(monkeypatch, rounds, model, inputs, model.make_cache(), (3, 2))
    found, _ = rounds(model, inputs, model.make_cache(), (3, 2))
    assert tiny.distance(found, expected) < 1e-4
    assert steps == [3, 3, 2, 2]


class GrowingRope(nn.Module):
    """Like dynamic NTK scaling, which mlx-lm 0.31 does not have: another base at each length."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def __call__(self, x, offset):
        base = 1e4 * (1 + offset + x.shape[-2])
        return mx.fast.rope(x, self.dim, traditional=False, base=base, scale=1.0, offset=offset)


def test_rope_that_depends_on_the_length_runs_part_by_part(steps, kernel_backend, monkeypatch):
    monkeypatch.setattr(hydrahead, "rope_for", lambda args: GrowingRope(args.head_dim))
    model, inputs = tiny.model(**SIZES), tiny.tokens(5)
    expected, _ = on_ops(monkeypatch, rounds, model, inputs, model.make_cache(), (4, 1))
    found, _ = rounds(model, inputs, model.make_cache(), (4, 1))
    assert tiny.distance(found, expected) < 1e-4
    assert not steps


def test_a_batch_with_padding_decodes_as_its_sequences_do(steps, kernel_backend, monkeypatch):
    model = tiny.model(**SIZES)
    padding, inputs = [3, 0], tiny.tokens(8, batch=2)
    cache = model.make_cache()

    def batched():
        caches = []
        for c in model.make_cache():
            if (part := linear_part(c)) is not None:
                part.left_padding = mx.array(padding)
            kv = BatchKVCache(padding)
            if part is None:
                caches.append(kv)
            elif part is c:
                caches.append(c)
            else:
                caches.append(type(c)(kv, part))
        return caches

    found, states = rounds(model, inputs, batched(), (5, 2, 1))
    expected, others = on_ops(monkeypatch, rounds, model, inputs, batched(), (5, 2, 1))
    assert steps == [5, 5, 2, 2, 1, 1]
    alone, _ = on_ops(monkeypatch, rounds, model, inputs[:1, 3:], cache, (5,))
    assert tiny.distance(found[:1, 3:], alone) < 1e-4
    assert tiny.distance(found[1], expected[1]) < 1e-4
    for x, y in zip(states, others):
        assert tiny.distance(x, y) < 1e-4


def test_lengths_that_end_within_the_step_run_part_by_part(steps, kernel_backend):
    model = tiny.model(**SIZES, full_attention_heads=[[], [], [0]])
    cache = model.make_cache()
    cache[0].prepare(lengths=[3, 5])
    layer = model.layers[0].self_attn
    x = mx.random.normal((2, 5, 32), key=mx.random.key(0))
    layer(x, None, mx.array([[1, 1, 1, 0, 0], [1] * 5]).astype(mx.bool_), cache[0], 0)
    assert not steps


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 0.01), (mx.bfloat16, 0.06)])
def test_half_precision(dtype, tolerance, steps, kernel_backend, monkeypatch):
    model, inputs = tiny.model(**SIZES), tiny.tokens(29)
    expected, _ = on_ops(monkeypatch, rounds, model, inputs, model.make_cache())
    model = cast(model, dtype)
    cache = model.make_cache()
    found, _ = on_ops(monkeypatch, rounds, model, inputs[:, :27], cache, (20, 7))
    logits, (state, past, *_) = rounds(model, inputs[:, 27:], cache, (1, 1))
    assert len(steps) == 4
    assert (logits.dtype, state.dtype, past.dtype) == (dtype, mx.float32, dtype)
    found = np.array(mx.concatenate([found, logits], axis=1).astype(mx.float32))
    error = np.abs(found - np.array(expected)).mean()
    assert error < tolerance * np.array(expected).std()


def test_convolutions_of_several_types_run_part_by_part(steps, kernel_backend, monkeypatch):
    model, inputs = tiny.model(**SIZES), tiny.tokens(10)
    for layer in model.layers:
        if "linear" in layer.self_attn:
            conv = layer.self_attn.linear.q_conv1d
            conv.weight = conv.weight.astype(mx.float16)
    expected, _ = on_ops(monkeypatch, rounds, model, inputs, model.make_cache(), (8, 1, 1))
    found, _ = rounds(model, inputs, model.make_cache(), (8, 1, 1))
    assert tiny.distance(found, expected) < 1e-4
    assert not steps


def test_quantized_weights_and_lora_decode_through_the_step(steps, kernel_backend, monkeypatch):
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 64}
    inputs = tiny.tokens(9)
    for change in ("quantized", "lora"):
        model = tiny.model(**sizes)
        if change == "quantized":
            model, _ = quantize_model(model, tiny.config(**sizes), 32, 8)
        else:
            linear_to_lora_layers(model, 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
            adapters = [
                (name, mx.random.normal(x.shape, key=mx.random.key(0)))
                for name, x in tree_flatten(model.parameters())
                if name.endswith("lora_b")
            ]
            assert adapters
            model.load_weights(adapters, strict=False)
        expected, _ = on_ops(monkeypatch, rounds, model, inputs, model.make_cache(), (8, 1))
        before = dict(tree_flatten(model.parameters()))
        found, _ = rounds(model, inputs, model.make_cache(), (8, 1))
        assert tiny.distance(found, expected) < 2e-4
        after = dict(tree_flatten(model.parameters()))
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert steps == [8, 8, 1, 1] * 2


def test_new_weights_are_taken_up(kernel_backend, monkeypatch):
    model, other = tiny.model(**SIZES), tiny.model(seed=1, **SIZES)
    inputs = tiny.tokens(4)
    rounds(model, inputs, model.make_cache(), (3, 1))
    model.load_weights(tree_flatten(other.parameters()))
    found, _ = rounds(model, inputs, model.make_cache(), (3, 1))
    expected, _ = on_ops(monkeypatch, rounds, other, inputs, other.make_cache(), (3, 1))
    assert tiny.distance(found, expected) < 1e-4


def test_gradients_go_through_the_kernels(kernel_backend, monkeypatch):
    model = tiny.model(**SIZES, full_attention_heads=[[], [0, 1], [0, 1, 2, 3]])
    inputs = tiny.tokens(9)

    def gradients():
        def loss(parameters):
            model.update(parameters)
            return (model(inputs) * mx.cos(mx.arange(tiny.VOCABULARY))).mean()

        values = model.trainable_parameters()
        found = dict(tree_flatten(mx.grad(loss)(values)))
        model.update(values)
        mx.eval(found)
        return found

    found, expected = gradients(), on_ops(monkeypatch, gradients)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = mx.abs(gradient).max().item()
        assert tiny.distance(found[name], gradient) <= 1e-3 * scale + 1e-7, name
