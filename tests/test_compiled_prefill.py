"""Compiled steps of a prefill are ordinary ones. Plain operations stand in for the kernels."""

import functools
import gc
import pickle
import weakref

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from test_compiled_step import CASES, SIZES, LouderBlock, attention, with_lora

from mlx_hydra.models import compiled_prefill, compiled_step, hydrahead
from mlx_hydra.models.cache import full_part, linear_part

T = 8
ALL = [0, 1, 2, 3]


@pytest.fixture
def compiled(monkeypatch):
    """Counts the layers that run compiled."""
    monkeypatch.setattr(hydrahead, "kernels_run", lambda: True)
    monkeypatch.setattr(hydrahead, "PREFILL", T)
    for module in (compiled_step, hydrahead):
        monkeypatch.setattr(module, "runs_on_gpu", lambda: True)
    calls, make = [], compiled_prefill.functions_of

    def counted(layer, leading):
        found = make(layer, leading)
        if found is None:
            return None

        def after(splits):
            def finish(h, *others):
                calls.append(h.shape)
                return found[1](splits)(h, *others)

            return finish

        return found[0], after

    monkeypatch.setattr(compiled_prefill, "functions_of", counted)
    return calls


def read(model, tokens, cache, sizes):
    logits, start = [], 0
    for size in sizes:
        logits.append(model(tokens[:, start : start + size], cache=cache))
        mx.eval(logits[-1], [c.state for c in cache])
        start += size
    return mx.concatenate(logits, axis=1)


def whole(model, tokens):
    """Without a cache nothing is compiled."""
    return model(tokens)


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_compiled_steps_are_ordinary_ones(compiled, changes, batch, kv_bits):
    model, tokens = tiny.model(**SIZES, **changes).eval(), tiny.tokens(5 * T + 3, batch=batch)
    layers = sum("linear" in layer.self_attn for layer in model.layers)
    sizes = (T, T, T, T, 3, T)
    caches = []
    for _ in range(3):
        caches.append(make_prompt_cache(model))
        if kv_bits is not None:
            caches[-1] = [
                c.to_quantized(32, kv_bits) if hasattr(c, "to_quantized") else c for c in caches[-1]
            ]
    # The second steps of a length are compiled.
    found = read(model, tokens, caches[0], sizes)
    assert len(compiled) == 4 * layers
    # The first of another prompt, which goes on from nothing, is so, too.
    again = read(model, tokens, caches[2], sizes)
    assert len(compiled) == 9 * layers
    assert tiny.distance(again, found) < 1e-4
    if kv_bits is None:
        assert tiny.distance(found, whole(model, tokens)) < 1e-4
    model.model._remembered.forget()
    plain = read(model, tokens, caches[1], (17, 11, 9, 6))
    assert tiny.distance(found, plain) < (1e-4 if kv_bits is None else 5e-2)
    for cache in (caches[0], caches[2]):
        for c, other in zip(cache, caches[1]):
            if full_part(c) is not None:
                assert full_part(c).offset == full_part(other).offset == 5 * T + 3
            if linear_part(c) is not None:
                for x, y in zip(linear_part(c).cache, linear_part(other).cache):
                    assert x.dtype == y.dtype
                    assert tiny.distance(x, y) < (1e-4 if kv_bits is None else 5e-2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_attention_that_is_compiled_reads_on_behind_the_first_key(
    compiled, monkeypatch, changes, batch
):
    model, tokens = tiny.model(**SIZES, **changes).eval(), tiny.tokens(3 * T, batch=batch)
    expected = whole(model, tokens)
    held, calls, append = [], [], compiled_prefill.append

    def remembering(*arguments):
        held[:] = append(*arguments)
        return held

    def attend(q, k, v, kv_index, *, scale, offset, splits):
        calls.append((offset.item(), splits))
        for first, rows in zip((k, v), held):
            assert mx.array_equal(first, rows[:, :, :1])
        return attention(q, *held, kv_index, scale=scale, offset=offset)

    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(compiled_prefill, "append", remembering)
    monkeypatch.setattr(compiled_prefill, "prefill_splits", lambda *arguments: 1 + arguments[-1])
    monkeypatch.setattr(hydrahead, "head_attention_prefill", attend)
    found = read(model, tokens, make_prompt_cache(model), (T, T, T))
    assert tiny.distance(found, expected) < 1e-4
    both = sum({"full", "linear"} <= layer.self_attn.keys() for layer in model.layers)
    assert calls == [(T, 1 + T)] * both + [(2 * T, 1 + 2 * T)] * both


def test_a_second_prompt_goes_on_with_what_is_compiled(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(3 * T)
    expected = whole(model, tokens)
    before = {}
    for turn in range(3):
        cache = make_prompt_cache(model)
        assert tiny.distance(read(model, tokens, cache, (T, T, T)), expected) < 1e-4
        traced = dict(model.model._compiled_prefill._traced)
        # What a token joins has been joined.
        read(model, tokens[:, :3], cache, (1, 1, 1))
        assert model.model._compiled_prefill._traced == traced
        if turn:
            assert traced == before
        before = traced
    # All but the first prompt's first step.
    assert len(compiled) == 2 * (2 + 3 + 3)


@pytest.mark.parametrize("change", ["weights", "lora"])
def test_new_weights_are_taken_up(compiled, change):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(4 * T)
    read(model, tokens, make_prompt_cache(model), (T,) * 4)
    count = len(compiled)
    assert count
    if change == "weights":
        model.update(tree_map(lambda w: 0.9 * w, model.parameters()))
    else:
        with_lora(model)
    expected = whole(model, tokens)
    found = read(model, tokens, make_prompt_cache(model), (T,) * 4)
    assert tiny.distance(found, expected) < 1e-4
    assert len(compiled) == 2 * count


def test_padding_and_training_run_ordinarily(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(3 * T, batch=2)
    read(model, tokens[:, : 2 * T], make_prompt_cache(model), (T, T))
    count = len(compiled)
    cache = make_prompt_cache(model)
    for c in filter(None, map(linear_part, cache)):
        c.left_padding = mx.array([0, 2])
    read(model, tokens, cache, (T, T, T))
    model.train()
    read(model, tokens, make_prompt_cache(model), (T, T, T))
    assert len(compiled) == count


def test_masks_of_other_caches_are_heeded(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(4 * T)

    def windowed():
        cache = make_prompt_cache(model)
        return [
            RotatingKVCache(12)
            if full_part(c) is c
            else type(c)(RotatingKVCache(12), linear_part(c))
            if full_part(c) is not None
            else c
            for c in cache
        ]

    found = read(model, tokens, windowed(), (T,) * 4)
    assert not compiled
    model.model._remembered.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydrahead, "PREFILL", 1000)
        expected = read(model, tokens, windowed(), (T,) * 4)
    assert tiny.distance(found, expected) < 1e-5


class LouderAttention(hydrahead.Attention):
    def __call__(self, x, *others):
        return 2 * super().__call__(x, *others)


class LouderHeads(hydrahead.LinearAttention):
    def __call__(self, x, *others):
        o, gate = super().__call__(x, *others)
        return 2 * o, gate


@pytest.mark.parametrize(
    "path, louder",
    [("", LouderBlock), ("self_attn", LouderAttention), ("self_attn.linear", LouderHeads)],
)
def test_layers_of_ones_own_are_called(compiled, path, louder):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(4 * T)
    functools.reduce(getattr, path.split(".") if path else (), model.layers[1]).__class__ = louder
    expected = whole(model, tokens)
    assert tiny.distance(read(model, tokens, make_prompt_cache(model), (T,) * 4), expected) < 1e-4
    assert not compiled


def test_old_weights_are_let_go(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(4 * T)
    read(model, tokens, make_prompt_cache(model), (T,) * 4)
    held = [weakref.ref(w) for _, w in tree_flatten(model.parameters())]
    model.update(tree_map(lambda w: 0.9 * w, model.parameters()))
    seen, begin = [], hydrahead.begin

    def counting(h):
        seen.append(sum(ref() is not None for ref in held))
        begin(h)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydrahead, "begin", counting)
        read(model, tokens[:, :T], make_prompt_cache(model), (T,))
    gc.collect()
    # Of a layer at most: the new weights are made of the old when they are asked for.
    assert seen and not any(ref() for ref in held)


@pytest.mark.parametrize("heads", [[ALL, [], ALL], [[], ALL, ALL], [ALL, ALL, [1]]], ids=str)
def test_layers_of_full_heads_alone_stand_anywhere(compiled, heads):
    model = tiny.model(**SIZES, full_attention_heads=heads).eval()
    tokens = tiny.tokens(3 * T, batch=3)
    found = read(model, tokens, make_prompt_cache(model), (T,) * 3)
    assert compiled
    assert tiny.distance(found, whole(model, tokens)) < 1e-4


# Before the second norm the first layer's heads are of 16 bits.
@pytest.mark.parametrize(
    "norm, tolerance", [("input_layernorm", 1e-4), ("post_attention_layernorm", 0.05)]
)
def test_norms_of_states_may_be_of_another_type(compiled, norm, tolerance):
    model = tiny.model(**SIZES, full_attention_heads=[[1], [], [0]]).eval()
    model.update(tree_map(lambda w: w.astype(mx.bfloat16), model.parameters()))
    for layer in model.layers:
        layer[norm].set_dtype(mx.float32)
    tokens, cache, other = tiny.tokens(3 * T), make_prompt_cache(model), make_prompt_cache(model)
    found = read(model, tokens, cache, (T,) * 3)
    assert compiled
    expected = model(tokens[:, : T - 1], cache=other)
    for c, ordinary in zip(cache, other):
        for x, y in zip(linear_part(c).cache, linear_part(ordinary).cache):
            assert x.dtype == y.dtype
    # States are float32 from the first sum on, and what is computed of them.
    assert found.dtype == expected.dtype == mx.float32
    expected = whole(model, tokens)
    assert tiny.distance(found, expected) < tolerance * mx.abs(expected).max().item()


def test_what_is_read_between_prompts_changes_nothing(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(3 * T)
    for _ in range(3):
        read(model, tokens, make_prompt_cache(model), (T, T, T - 3))
        traced = dict(model.model._compiled_prefill._traced)
        model(tokens[:, :5])
        assert model.model._compiled_prefill._traced == traced
    assert len(traced) == 1


@pytest.mark.parametrize("call", ["no cache", "few tokens", "a prefill"])
def test_old_weights_are_let_go_by_any_call(compiled, call):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(4 * T)
    read(model, tokens, make_prompt_cache(model), (T,) * 4)
    # What has been joined, too.
    products = [layer._side_by_side._known[1][0][0] for layer in model.layers]
    held = [weakref.ref(w) for _, w in tree_flatten(model.parameters())]
    held += [weakref.ref(product.turned) for product in products]
    del products
    model.update(tree_map(lambda w: 0.9 * w, model.parameters()))
    mx.eval(model.parameters())
    size = {"no cache": T, "few tokens": 3, "a prefill": T}[call]
    cache = None if call == "no cache" else make_prompt_cache(model)
    mx.eval(model(tokens[:, :size], cache=cache))
    gc.collect()
    assert not any(ref() for ref in held)


def joined(model):
    blocks = model.layers
    attentions = [layer.self_attn for layer in blocks]
    return [
        *(x for block in blocks for x in (block._side_by_side, block._down)),
        *(attention._out for attention in attentions),
        *(attention.side_by_side for attention in attentions if "linear" in attention),
    ]


def test_a_prefill_is_step_enough_for_the_first_token(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(2 * T + 2)
    expected, inner = whole(model, tokens), model.model
    cache = make_prompt_cache(model)
    found = [read(model, tokens[:, :T], cache, (T,))]
    # All has been joined before anything is compiled that holds the weights as they are.
    assert all(products._known[0] for products in joined(model))
    assert inner._remembered.remembers(model.layers)
    found.append(read(model, tokens[:, T : T + 1], cache, (1,)))
    assert len(inner._compiled_step._traced) == 1
    assert inner._remembered.remembers(model.layers)
    found.append(read(model, tokens[:, T + 1 :], cache, (T, 1)))
    assert len(compiled) == 2
    assert tiny.distance(mx.concatenate(found, axis=1), expected) < 1e-4


def test_nothing_is_joined_or_remembered_in_training(compiled):
    model, tokens = tiny.model(**SIZES).train(), tiny.tokens(2 * T)
    read(model, tokens, make_prompt_cache(model), (T, T))
    assert model.model._remembered.is_empty
    assert not model.model._compiled_prefill._seen
    assert not any(products._known[0] for products in joined(model))
    # What has been remembered is forgotten.
    model.eval()
    read(model, tokens, make_prompt_cache(model), (T, T))
    assert compiled
    model.train()
    read(model, tokens, make_prompt_cache(model), (T, T))
    assert model.model._remembered.is_empty
    assert not any(products._known[0] for products in joined(model))
    # What has been joined, too, by steps that nothing remembers.
    for layer in model.layers:
        layer.join()
    model(tokens)
    assert not any(products._known[0] for products in joined(model))


def test_what_has_been_forgotten_is_run_ordinarily(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(3 * T)
    read(model, tokens, make_prompt_cache(model), (T, T))
    count = len(compiled)
    model.model._remembered.forget()
    read(model, tokens, make_prompt_cache(model), (T,))
    assert len(compiled) == count


def test_a_key_more_is_noticed(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(T)
    read(model, tokens, make_prompt_cache(model), (T,))
    remembered = model.model._remembered
    assert remembered.remembers(model.layers)
    modules = remembered._known[0]
    last = [module for module in modules if type(module) not in compiled_step.PLAIN][-1]
    vars(last)["more"] = 1
    assert not remembered.remembers(model.layers)


@pytest.mark.parametrize("dtypes", [1, 2])
def test_layers_are_split_each_its_way(compiled, monkeypatch, dtypes):
    heads = [[0], [0, 1], [0, 1]]
    model, tokens = tiny.model(**SIZES, full_attention_heads=heads).eval(), tiny.tokens(2 * T)
    make, last, asked = hydrahead.FullAttention.heads, model.layers[2].self_attn.full, []

    def heads_of(self, *arguments):
        found = make(self, *arguments)
        return [x.astype(mx.bfloat16) for x in found] if self is last and dtypes == 2 else found

    def splits(q, k, v, kv_index, offset):
        asked.append((q.shape, k.shape, kv_index, q.dtype))

    monkeypatch.setattr(hydrahead.FullAttention, "heads", heads_of)
    monkeypatch.setattr(compiled_prefill, "prefill_splits", splits)
    read(model, tokens, make_prompt_cache(model), (T, T))
    assert len(asked) == len(set(asked)) == 1 + dtypes


def test_an_mlp_of_ones_own_is_called(compiled):
    class Louder(hydrahead.MLP):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(3 * T + 2)
    model.layers[1].mlp.__class__ = Louder
    expected = whole(model, tokens)
    found = read(model, tokens, make_prompt_cache(model), (T, T, T, 1, 1))
    assert tiny.distance(found, expected) < 1e-4
    assert compiled


def test_a_copy_of_a_model_holds_no_products(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(2 * T + 2)
    size = len(pickle.dumps(model))
    expected = read(model, tokens, make_prompt_cache(model), (T, T, 1, 1))
    after = pickle.dumps(model)
    assert len(after) < 1.01 * size
    found = read(pickle.loads(after), tokens, make_prompt_cache(model), (T, T, 1, 1))
    assert tiny.distance(found, expected) < 1e-4


def test_a_bias_that_would_be_lost_is_named(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(2 * T)
    model.layers[1].self_attn.linear.q_proj.bias = mx.ones(SIZES["head_dim"])
    with pytest.raises(ValueError, match="only g_proj may have a bias"):
        read(model, tokens, make_prompt_cache(model), (T, T))


def test_embeddings_have_gradients_every_time(compiled):
    model, tokens = tiny.model(**SIZES).eval(), tiny.tokens(T)
    embeddings = model.model.embed_tokens(tokens)

    def total(embeddings, cache):
        return model(tokens, cache=cache, input_embeddings=embeddings).sum()

    expected = mx.grad(total)(embeddings, None)
    for _ in range(3):
        found = mx.grad(total)(embeddings, make_prompt_cache(model))
        assert tiny.distance(found, expected) < 1e-3
    assert not compiled
    # Where nobody asks for a gradient, steps with embeddings are compiled as others.
    model(tokens, cache=make_prompt_cache(model), input_embeddings=embeddings)
    assert compiled
