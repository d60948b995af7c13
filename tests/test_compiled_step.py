"""Compiled decode steps are ordinary ones. Kernels cannot run inside mx.compile without a GPU, so
plain operations stand in for attention and for what all linear heads do."""

import copy
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_hydra.models import compiled_step, hydrahead
from mlx_hydra.models.cache import CacheList, full_part, linear_part
from mlx_hydra.models.hydrahead import may_cast
from mlx_hydra.ops import fuse_heads, gated_delta
from mlx_hydra.ops.gated_delta_inputs import gated_delta_inputs

SIZES = {"head_dim": 32}
CASES = {
    "base": {},
    "rope on full heads": {"full_attention": {"rope": True, "log_scale_base": None, "gate": True}},
    "layers of one kind": {"full_attention_heads": [[], [0, 1, 2, 3], [1, 2]]},
    "no convolution": {
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": None,
            "rope": True,
            "gate": False,
        }
    },
}


def attention(q, k, v, kv_index, *, scale, offset, mask=None, **_):
    index = list(kv_index)
    seen = mx.arange(k.shape[2]) <= offset + mx.arange(q.shape[2])[:, None]
    scores = (scale * q) @ k[:, index].swapaxes(2, 3)
    return mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1) @ v[:, index]


def delta_step(
    projected, weights, gamma, state, past, *, offset, rotation, eps, first=0, full=None, **others
):
    if projected.ndim == 2:
        out, *left = delta_step(
            *(projected[:, None], weights, gamma, state, past),
            **(others | {"offset": offset, "rotation": rotation, "eps": eps}),
            **{"first": first, "full": full},
        )
        return out[:, 0], *left
    (H,), (D,) = weights.A_log.shape, weights.q_norm.shape
    gated = projected.shape[-1] - first >= (4 * D + 2) * H
    ends = [first + i * H * D for i in range(1, 4 + gated)]
    _, q, k, v, *gate, ab = mx.split(projected, [first, *ends], axis=-1)
    rope = None
    if rotation is not None:

        def rope(x, offset):
            return mx.fast.rope(
                x, D, traditional=False, base=1e4, scale=1.0, offset=offset.reshape(())
            )

    q, k, v, g, beta, past = gated_delta_inputs(
        *(q, k, v, ab[..., :H], ab[..., H : 2 * H], weights, past),
        offset=mx.array([offset]) if isinstance(offset, int) else offset,
        rope=rope,
        rotation=rotation,
        backend="ops",
    )
    o, state = gated_delta(q, k, v, g, beta, state, backend="ops")
    F = len(gamma) - H
    gate, bias = gate[0] if gate else None, others["gate_bias"]
    gate = gate if bias is None else gate + bias
    o = fuse_heads(o, gamma[F:], gate, eps=eps, activation="silu")
    if full is not None:
        at = others["full_gate"]
        gate = None if at is None else projected[..., at : at + F * D]
        bias = others["full_gate_bias"]
        gate = gate if bias is None else gate + bias
        full = full.swapaxes(1, 2)
        full = fuse_heads(full, gamma[:F], gate, eps=others["full_eps"], activation="sigmoid")
        o = mx.concatenate([full, o], axis=-1)
    return o, state, past


@pytest.fixture
def compiled(monkeypatch, compiled_ops):
    """Counts the steps that run compiled."""
    monkeypatch.setattr(compiled_step, "takes_arrays", lambda dtype, head_dim: True)
    monkeypatch.setattr(compiled_step, "kernels_run", lambda: True)
    monkeypatch.setattr(
        hydrahead, "step_backend", lambda dtype, T, head_dim, taps: "metal" if T <= 8 else "ops"
    )
    monkeypatch.setattr(hydrahead, "head_attention", attention)
    monkeypatch.setattr(hydrahead, "head_attention_parts", attention)
    monkeypatch.setattr(hydrahead, "gated_delta_step", delta_step)
    return compiled_ops


@pytest.fixture
def compiled_ops(monkeypatch):
    """The same where no kernels run: what is compiled is what runs on a Mac."""
    for module in (compiled_step, hydrahead):
        monkeypatch.setattr(module, "runs_on_gpu", lambda: True)
    calls = []
    run = compiled_step.CompiledStep.__call__

    def counted(self, layers, h, cache):
        calls.append(h.shape)
        return run(self, layers, h, cache)

    monkeypatch.setattr(compiled_step.CompiledStep, "__call__", counted)
    return calls


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_norms_may_be_of_another_type(compiled, changes, monkeypatch):
    def attend(q, k, v, *arguments, **others):
        assert q.dtype == k.dtype == v.dtype == mx.bfloat16
        return attention(q, k, v, *arguments, **others).astype(q.dtype)

    monkeypatch.setattr(hydrahead, "head_attention", attend)
    monkeypatch.setattr(hydrahead, "head_attention_parts", attend)
    model, tokens = tiny.model(**SIZES, **changes), tiny.tokens(4)
    for layer in model.layers:
        layer.set_dtype(mx.bfloat16, lambda dtype: dtype == mx.float32)
        for heads in (layer.self_attn.get("full"), layer.self_attn.get("linear")):
            if heads is not None:
                heads.q_norm.set_dtype(mx.float32)
                heads.k_norm.set_dtype(mx.float32)
    model.model.embed_tokens.set_dtype(mx.bfloat16)
    read(model, tokens, begun(model))
    assert compiled


def weights_of(model):
    return tree_flatten(model.parameters())


def read(model, tokens, cache, *, one_by_one=True):
    """Logits of tokens, read after one another or at most 8 at a time, none of these compiled."""
    step = 1 if one_by_one else 8
    logits = []
    for start in range(0, tokens.shape[1], step):
        logits.append(model(tokens[:, start : start + step], cache=cache))
        mx.eval(logits[-1], [c.state for c in cache])
    return mx.concatenate(logits, axis=1)


def keys_of(cache):
    return next(kv.keys for c in cache if (kv := full_part(c)) is not None)


def begun(model, batch=1, tokens=5):
    cache = make_prompt_cache(model)
    mx.eval(model(tiny.tokens(tokens, batch=batch), cache=cache), [c.state for c in cache])
    return cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["compiled", "compiled_ops"])
def test_compiled_steps_are_ordinary_ones(request, backend, changes, batch):
    compiled = request.getfixturevalue(backend)
    model, tokens = tiny.model(**SIZES, **changes), tiny.tokens(9, batch=batch)
    plain = begun(model, batch)
    expected = read(model, tokens, plain, one_by_one=False)
    assert not compiled
    cache = begun(model, batch)
    for kv in filter(None, map(full_part, cache)):
        # What lies behind the sequence is nobody's.
        for rows in (kv.keys, kv.values):
            rows[:, :, kv.offset :] = mx.random.normal(rows[:, :, kv.offset :].shape)
    found = read(model, tokens, cache)
    assert len(compiled) == 9
    assert tiny.distance(found, expected) < 1e-4
    for c, other in zip(cache, plain):
        full, linear = full_part(c), linear_part(c)
        if full is not None:
            assert full.offset == full_part(other).offset == 14
            assert type(full.offset) is int
            for name in ("keys", "values"):
                x, y = (getattr(kv, name)[:, :, :14] for kv in (full, full_part(other)))
                assert tiny.distance(x, y) < 1e-4
        if linear is not None:
            for x, y in zip(linear.cache, linear_part(other).cache):
                assert tiny.distance(x, y) < 1e-4


@pytest.mark.parametrize("kind", ["mixed types", "quantised weights", "lora"])
def test_compiled_ops_take_what_mlx_lm_brings(compiled_ops, kind):
    model, tokens = tiny.model(**SIZES), tiny.tokens(7)
    if kind == "mixed types":
        cast = {n: w.astype(mx.bfloat16) if may_cast(n) else w for n, w in weights_of(model)}
        model.load_weights(list(cast.items()))
    elif kind == "quantised weights":

        def of_whole_groups(_, module):
            return type(module) is nn.Linear and module.weight.shape[1] % 32 == 0

        nn.quantize(model, 32, 4, class_predicate=of_whole_groups)
    else:
        linear_to_lora_layers(model, 2, {"rank": 2, "scale": 3.0, "dropout": 0.0})
    limit = 0.1 if kind == "mixed types" else 1e-4
    expected = read(model, tokens, begun(model), one_by_one=False)
    assert tiny.distance(read(model, tokens, begun(model)), expected) < limit
    assert compiled_ops


@pytest.mark.parametrize("room", [256, 250])
def test_a_full_cache_is_made_to_grow(compiled, room):
    model, tokens = tiny.model(**SIZES), tiny.tokens(12)
    plain, cache = begun(model, tokens=250), begun(model, tokens=250)
    for kv in filter(None, map(full_part, cache)):
        kv.keys, kv.values = (rows[:, :, :room] for rows in (kv.keys, kv.values))
    expected = read(model, tokens, plain, one_by_one=False)
    assert tiny.distance(read(model, tokens, cache), expected) < 1e-4
    # All but the first, which grows a cache itself.
    assert len(compiled) == 11
    assert keys_of(cache).shape[2] == room + 256


def test_a_few_traces_are_kept(compiled):
    model, tokens = tiny.model(**SIZES), tiny.tokens(6)
    step, cache = model.model._compiled_step, begun(model, tokens=252)
    read(model, tokens[:, :2], cache)
    [(key, traced)] = step._traced.items()
    read(model, tokens[:, 2:3], cache)
    assert step._traced == {key: traced}
    # The cache grows by the way.
    read(model, tokens[:, 3:], cache)
    assert keys_of(cache).shape[2] == 512
    assert len(step._traced) == 2
    for batch in range(2, 6):
        read(model, tiny.tokens(1, batch=batch), begun(model, batch))
    assert len(step._traced) == compiled_step.TRACES
    assert key not in step._traced


def test_sequences_take_turns(compiled):
    model, tokens = tiny.model(**SIZES), tiny.tokens(6, batch=2)
    caches = [begun(model, tokens=n) for n in (3, 7)]
    expected = [
        read(model, tokens[i : i + 1], begun(model, tokens=n), one_by_one=False)
        for i, n in enumerate((3, 7))
    ]
    for t in range(6):
        for i in range(2):
            got = model(tokens[i : i + 1, t : t + 1], cache=caches[i])
            assert tiny.distance(got, expected[i][:, t : t + 1]) < 1e-4
    assert len(compiled) == 11
    # Of one size, and of two.
    assert len(model.model._compiled_step._traced) == 1
    caches[1] = begun(model, tokens=300)
    for t in range(3):
        for cache in caches:
            model(tokens[:1, t : t + 1], cache=cache)
    assert len(model.model._compiled_step._traced) == 2
    traced = dict(model.model._compiled_step._traced)
    model(tokens[:1, :1], cache=caches[0])
    assert model.model._compiled_step._traced == traced


def test_a_copy_of_a_cache_stays_as_it_is(compiled):
    model, tokens = tiny.model(**SIZES), tiny.tokens(6)
    cache = begun(model)
    read(model, tokens[:, :2], cache)
    kept = copy.deepcopy(cache)
    first = read(model, tokens[:, 2:], cache)
    assert tiny.distance(read(model, tokens[:, 2:], kept), first) < 1e-6


def test_new_weights_and_new_layers_are_taken_up(compiled):
    model, tokens = tiny.model(**SIZES), tiny.tokens(3)
    read(model, tokens, begun(model))
    model.update(tree_map(lambda w: 0.9 * w, model.parameters()))
    expected = read(model, tokens, begun(model), one_by_one=False)
    assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4

    model.layers[0] = tiny.model(seed=1, **SIZES).layers[0]
    expected = read(model, tokens, begun(model), one_by_one=False)
    assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4

    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 3.0, "dropout": 0.0})
    for name, module in model.named_modules():
        if name.endswith("down_proj") and "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape)
    expected = read(model, tokens, begun(model), one_by_one=False)
    assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4


def with_lora(model, **settings):
    linear_to_lora_layers(model, 3, {"rank": 2, "scale": 3.0, "dropout": 0.0} | settings)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape)
    return model.eval()


def test_new_settings_are_taken_up(compiled_ops):
    model, tokens = with_lora(tiny.model(**SIZES)), tiny.tokens(3)
    read(model, tokens, begun(model))
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.scale = 0.0
    expected = read(model, tokens, begun(model), one_by_one=False)
    assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4


class Louder(nn.Module):
    """A norm of one's own, which has a weight like others."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def __call__(self, x):
        return 2 * mx.fast.rms_norm(x, self.weight, self.eps)


class LouderBlock(hydrahead.TransformerBlock):
    def __call__(self, x, *others):
        return 2 * super().__call__(x, *others)


def loud_norms(model):
    for layer in model.layers:
        layer.input_layernorm = Louder(layer.input_layernorm)
        layer.post_attention_layernorm = Louder(layer.post_attention_layernorm)


def loud_blocks(model):
    for layer in model.layers[1:]:
        layer.__class__ = LouderBlock


def halves_beside_floats(model):
    """Whose norms of states, and what follows them, are float32."""
    for _, module in model.named_modules():
        if type(module) is not nn.RMSNorm:
            module.update(
                {
                    name: x.astype(mx.bfloat16)
                    for name, x in module.items()
                    if isinstance(x, mx.array) and may_cast(name)
                }
            )
    model.model.embed_tokens.set_dtype(mx.float32)


def a_float_at_the_end(model):
    model.set_dtype(mx.bfloat16)
    model.layers[-1].post_attention_layernorm.set_dtype(mx.float32)


@pytest.mark.parametrize(
    "change, tolerance",
    [
        (loud_norms, 1e-4),
        (loud_blocks, 1e-4),
        (halves_beside_floats, 1e-4),
        (a_float_at_the_end, 0.05),
    ],
)
def test_layers_may_be_changed(compiled, change, tolerance, monkeypatch):
    def attend(q, *arguments, **others):
        return attention(q, *arguments, **others).astype(q.dtype)

    monkeypatch.setattr(hydrahead, "head_attention", attend)
    monkeypatch.setattr(hydrahead, "head_attention_parts", attend)
    model, tokens = tiny.model(**SIZES), tiny.tokens(4)
    change(model)
    expected = read(model, tokens, begun(model), one_by_one=False)[:, 2:]
    cache = begun(model)
    read(model, tokens[:, :2], cache)
    assert compiled
    found = read(model, tokens[:, 2:], cache)
    assert found.dtype == expected.dtype
    assert tiny.distance(found, expected) < tolerance * max(1, mx.abs(expected).max().item())


class Wrapped(nn.Module):
    """A layer within another module, as those who watch activations put it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, *arguments):
        return self.layer(*arguments)


def test_layers_may_be_wrapped(compiled):
    model, tokens = tiny.model(**SIZES, full_attention_heads=[[0], [], [1, 2]]), tiny.tokens(4)
    expected = read(model, tokens, begun(model), one_by_one=False)
    model.model.layers[1] = Wrapped(model.layers[1])
    assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4
    assert compiled


class Scaled(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.factor = mx.ones(size)

    def __call__(self, x):
        return self.factor * x


def test_layers_with_modules_in_lists_are_not_compiled(compiled_ops):
    model, tokens = tiny.model(**SIZES), tiny.tokens(3)
    for layer in model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, Scaled(32))
    for factor in (1.0, 3.0):
        for layer in model.layers:
            layer.mlp.down_proj.layers[1].factor = mx.full(32, factor)
        expected = read(model, tokens, begun(model), one_by_one=False)
        assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4
    assert not compiled_ops


def test_dropout_is_not_compiled(compiled_ops):
    model, tokens = with_lora(tiny.model(**SIZES), dropout=0.5), tiny.tokens(3)
    expected = read(model, tokens, begun(model), one_by_one=False)
    cache = begun(model)
    model.train()
    assert not compiled_ops
    found = [read(model, tokens[:, :2], copy.deepcopy(cache)) for _ in range(2)]
    assert tiny.distance(*found) > 0.1
    assert not compiled_ops
    model.eval()
    assert tiny.distance(read(model, tokens, begun(model)), expected) < 1e-4


@pytest.mark.parametrize("then", ["a token", "a prompt", "training"])
def test_old_weights_are_let_go(compiled_ops, then):
    model, tokens = tiny.model(**SIZES), tiny.tokens(3)
    read(model, tokens, begun(model))
    assert compiled_ops
    held = [weakref.ref(w) for _, w in weights_of(model)]
    model.update(tree_map(lambda w: 0.9 * w, model.parameters()))
    if then == "training":
        mx.eval(model.train()(tokens))
    else:
        read(model, tokens[:, : 1 if then == "a token" else 3], begun(model), one_by_one=False)
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_weights_may_be_arguments(compiled_ops):
    model, tokens = tiny.model(**SIZES), tiny.tokens(4)
    expected = model(tokens, cache=make_prompt_cache(model))
    model = tiny.model(**SIZES)

    def run(tokens):
        return model(tokens, cache=make_prompt_cache(model))

    whole = mx.compile(run, inputs=[model.state])
    assert tiny.distance(whole(tokens), expected) < 1e-4
    assert tiny.distance(read(model, tokens, make_prompt_cache(model)), expected) < 1e-4


def test_what_is_not_compiled(compiled, monkeypatch):
    model, tokens = tiny.model(**SIZES), tiny.tokens(4)
    read(model, tokens, begun(model))
    takes, h = model.model._compiled_step.takes, mx.zeros((1, 1, 32))
    cache = begun(model)
    assert takes(model.layers, h, cache)
    assert not takes(model.layers, h.astype(mx.float16), cache)
    assert not takes(model.layers, mx.zeros((1, 2, 32)), cache)
    assert not takes(model.layers, h, make_prompt_cache(model))
    assert not takes(model.layers, h, [None] * len(cache))
    quantised = [c.to_quantized(32, 8) if isinstance(c, CacheList) else c for c in cache]
    assert not takes(model.layers, h, quantised)
    linear_part(cache[0]).left_padding = mx.array([0])
    assert not takes(model.layers, h, cache)
    layer = next(layer for layer in model.layers if "full" in layer.self_attn)
    layer.self_attn.full.takes_arrays = False
    assert not takes(model.layers, h, begun(model))
    layer.self_attn.full.takes_arrays = True
    monkeypatch.setattr(compiled_step, "takes_arrays", lambda dtype, head_dim: False)
    assert not takes(model.layers, h, begun(model))


def test_ops_whose_rope_depends_on_the_length_are_not_compiled(compiled_ops):
    model = tiny.model(**SIZES)
    takes, h, cache = model.model._compiled_step.takes, mx.zeros((1, 1, 32)), begun(model)
    assert takes(model.layers, h, cache)
    linear = next(layer.self_attn.linear for layer in model.layers if "linear" in layer.self_attn)
    linear.takes_arrays = False
    assert not takes(model.layers, h, cache)


def test_the_keys_are_written_in_place(compiled, monkeypatch):
    # Holds nothing of the keys' size itself.
    for name in ("head_attention", "head_attention_parts"):
        monkeypatch.setattr(hydrahead, name, lambda q, k, *_, **__: q + k[:, :1, :1])
    model, tokens = tiny.model(**SIZES), tiny.tokens(4)
    cache = begun(model, tokens=2000)
    read(model, tokens[:, :2], cache)
    assert len(compiled) == 1
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    read(model, tokens[:, 2:], cache)
    assert len(compiled) == 3
    assert mx.get_peak_memory() - held < keys_of(cache).nbytes


def test_a_model_can_be_copied_and_freed(compiled):
    model, tokens = tiny.model(**SIZES), tiny.tokens(3)
    expected = read(model, tokens, begun(model))
    assert compiled
    twin = copy.deepcopy(model)
    assert tiny.distance(read(twin, tokens, begun(twin)), expected) < 1e-4
    gone = weakref.ref(model.layers[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_layers_share_what_they_make_of_the_position(compiled, monkeypatch):
    model, made = tiny.model(**SIZES, full_attention_heads=[[0], [1, 2], [3]]), []
    cache, make = begun(model), compiled_step.Position.index

    def seen(self, shape):
        made.append((shape, make(self, shape)))
        return made[-1][1]

    monkeypatch.setattr(compiled_step.Position, "index", seen)
    read(model, tiny.tokens(2), cache)
    assert compiled and len(made) == 3
    assert len({id(array) for _, array in made}) == len({shape for shape, _ in made}) < 3


def test_a_prefill_begins_before_its_last_layers_are_built(compiled, monkeypatch):
    model, tokens = tiny.model(**SIZES), tiny.tokens(8)
    expected = read(model, tokens, make_prompt_cache(model), one_by_one=False)
    monkeypatch.setattr(hydrahead, "kernels_run", lambda: True)
    monkeypatch.setattr(hydrahead, "PREFILL", 8)
    begun, begin = [], mx.async_eval

    def seen(h):
        begin(h)
        begun.append(h)

    monkeypatch.setattr(mx, "async_eval", seen)
    found = read(model, tokens, make_prompt_cache(model), one_by_one=False)
    # What comes out of the last is not asked for, but at the end of a prompt.
    assert len(begun) == len(model.layers) - 1
    assert tiny.distance(found, expected) < 1e-4
    whole = mx.compile(lambda tokens: model(tokens, cache=make_prompt_cache(model)))
    assert tiny.distance(whole(tokens), expected) < 1e-4
    model(tokens[:, :7], cache=make_prompt_cache(model))
    model(tokens)
    assert len(begun) == len(model.layers) - 1

    def fails(h):
        raise ValueError("[metal] something else")

    monkeypatch.setattr(mx, "async_eval", fails)
    with pytest.raises(ValueError, match="something else"):
        model(tokens, cache=make_prompt_cache(model))
