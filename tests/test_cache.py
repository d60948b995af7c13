import copy

import mlx.core as mx
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlx_hydra.models.cache import CacheList, append, cache_bytes, full_part, grow, linear_part

NO_CONVOLUTION = {"linear_attention": {"conv_kernel_size": None}}
ALL_FULL = {"full_attention_heads": [[0, 1, 2, 3]] * 3}
# Quantised keys need heads of a group's size.
WIDE = {"head_dim": 32}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def wide():
    return tiny.model(**WIDE)


def filled(model, length=40, seed=0):
    cache = model.make_cache()
    mx.eval(model(tiny.tokens(length, seed=seed), cache=cache), [c.state for c in cache])
    return cache


def next_logits(model, cache, steps=(1, 5, 1)):
    inputs = tiny.tokens(sum(steps), seed=9)
    parts, start = [], 0
    for step in steps:
        parts.append(model(inputs[:, start : start + step], cache=cache))
        start += step
    return mx.concatenate(parts, axis=1)


def arrays_of(cache):
    """Every array that a cache holds, its counters too."""
    parts = [p for c in cache for p in (full_part(c), linear_part(c)) if p is not None]
    return [x for p in parts for _, x in tree_flatten(vars(p)) if isinstance(x, mx.array)]


def saved_arrays(cache):
    """What mlx-lm saves of a cache: of the keys all that is held, in 0.31 all that is filled."""
    return [x for _, x in tree_flatten(cache.state) if isinstance(x, mx.array)]


def test_each_layer_caches_only_what_its_heads_need(model):
    linear, mixed, full = model.make_cache()
    assert isinstance(linear, ArraysCache)
    assert isinstance(mixed, CacheList)
    assert isinstance(mixed[0], KVCache)
    assert isinstance(mixed[1], ArraysCache)
    assert isinstance(full, KVCache)
    assert [full_part(c) for c in (linear, mixed, full)] == [None, mixed[0], full]
    assert [linear_part(c) for c in (linear, mixed, full)] == [linear, mixed[1], None]


@pytest.mark.parametrize("heads, kv_heads", [([0], 1), ([0, 1], 1), ([1, 2], 2), ([0, 1, 2, 3], 2)])
def test_keys_are_held_for_the_kv_heads_in_use_alone(heads, kv_heads):
    cache = filled(tiny.model(full_attention_heads=[heads] * 3))
    assert {full_part(c).keys.shape for c in cache} == {(1, kv_heads, 256, 16)}


def test_bytes_are_those_of_the_arrays(model):
    cache = filled(model)
    channels, taps, D = 3 * 16, 4, 16
    keys = 2 * (2 * 256 * D * 4)  # two layers with two KV heads, 256 tokens at a time
    keys *= 2  # and values
    states = sum(H * D * D * 4 + (taps - 1) * H * channels * 4 for H in (4, 1))
    assert cache_bytes(cache) == {"full_attention": keys, "linear_attention": states}
    assert sum(c.nbytes for c in cache) == keys + states
    assert cache_bytes(model.make_cache()) == {"full_attention": 0, "linear_attention": 0}


def test_without_a_convolution_only_the_state_is_held():
    cache = filled(tiny.model(**NO_CONVOLUTION))
    assert len(cache[0].cache) == 1
    assert cache_bytes(cache)["linear_attention"] == (4 + 1) * 16 * 16 * 4


def test_a_cache_with_a_recurrent_state_is_not_trimmable_and_says_so(model):
    cache = filled(model)
    before = [mx.array(x) for x in arrays_of(cache)]
    assert not can_trim_prompt_cache(cache)
    assert not cache[1].is_trimmable()
    assert trim_prompt_cache(cache, 3) == 0
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache[1].trim(3)
    assert all(mx.array_equal(x, y) for x, y in zip(before, arrays_of(cache)))
    assert cache[1].offset == cache[2].offset == 40
    with pytest.raises(ValueError, match="requires a trimmable prompt cache"):
        next(speculative_generate_step(mx.array([1, 2]), model, model))


def test_a_cache_of_full_heads_alone_can_be_trimmed():
    model = tiny.model(**ALL_FULL)
    cache, longer = filled(model, 40), filled(model, 40)
    model(tiny.tokens(6, seed=3), cache=longer)
    assert can_trim_prompt_cache(longer)
    assert trim_prompt_cache(longer, 6) == 6
    assert mx.array_equal(next_logits(model, longer), next_logits(model, cache))


def test_a_deep_copy_goes_its_own_way(model):
    cache = filled(model)
    twin = copy.deepcopy(cache)
    kept = [mx.array(x) for x in arrays_of(cache)]
    first = next_logits(model, twin)
    assert all(mx.array_equal(x, y) for x, y in zip(kept, arrays_of(cache)))
    assert cache[1].offset == 40
    assert mx.array_equal(next_logits(model, cache), first)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(
    "changes", [{}, NO_CONVOLUTION, ALL_FULL], ids=["mixed", "no conv", "full"]
)
def test_a_saved_cache_goes_on_as_if_it_had_not_been_saved(tmp_path, changes, bits):
    model = tiny.model(**WIDE, **changes)
    cache = filled(model)
    if bits is not None:
        cache = [
            c.to_quantized(group_size=32, bits=bits) if hasattr(c, "to_quantized") else c
            for c in cache
        ]
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache, {"model": "tiny"})
    loaded, metadata = load_prompt_cache(path, return_metadata=True)
    assert metadata == {"model": "tiny"}
    for old, new in zip(cache, loaded):
        # mlx-lm knows its own classes alone, and the model takes those as well.
        assert type(new).__module__ == mlx_lm_cache.__name__
        assert type(new).__name__ == type(old).__name__
        assert new.nbytes == sum(x.nbytes for x in saved_arrays(old))
        assert new.is_trimmable() == old.is_trimmable()
    assert tiny.distance(next_logits(model, loaded), next_logits(model, cache)) < 1e-5


def test_offsets_stay_python_integers_for_a_single_sequence(model, tmp_path):
    cache = filled(model)
    next_logits(model, cache)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache)
    for c in (*cache, *load_prompt_cache(path)):
        if full_part(c) is not None:
            assert type(full_part(c).offset) is int
            assert full_part(c).offset == 47


def test_quantising_quantises_the_keys_and_leaves_the_states(wide):
    cache = filled(wide)
    states = [mx.array(x) for x in cache[1][1].cache]
    quantised = cache[1].to_quantized(group_size=32, bits=8)
    assert isinstance(quantised, CacheList)
    assert isinstance(quantised[0], QuantizedKVCache)
    assert (quantised.offset, quantised[0].bits, quantised[0].group_size) == (40, 8, 32)
    assert quantised[1] is cache[1][1]
    assert all(mx.array_equal(x, y) for x, y in zip(states, quantised[1].cache))
    assert quantised.nbytes < cache[1].nbytes
    again = quantised.to_quantized(group_size=32, bits=8)
    assert again[0] is quantised[0]


@pytest.mark.parametrize("start", [0, 20, 45])
@pytest.mark.parametrize("bits, tolerance", [(8, 0.1), (4, 1.5)])
def test_generation_with_quantised_keys_is_close_to_the_plain_one(wide, bits, tolerance, start):
    prompt = tiny.tokens(40)[0]
    plain = filled(wide)
    kv_cache = wide.make_cache()
    steps = generate_step(
        prompt,
        wide,
        max_tokens=8,
        prompt_cache=kv_cache,
        prefill_step_size=16,
        kv_bits=bits,
        kv_group_size=32,
        quantized_kv_start=start,
    )
    chosen, logprobs = map(list, zip(*steps))
    expected = wide(prompt[None])[:, -1:]
    expected = [expected, *(wide(mx.array([[t]]), cache=plain) for t in chosen[:-1])]
    for found, logits in zip(logprobs, expected):
        logits = logits[0, -1]
        assert tiny.distance(found, logits - mx.logsumexp(logits)) < tolerance
    for c in kv_cache[1:]:
        assert isinstance(full_part(c), QuantizedKVCache)
        assert full_part(c).bits == bits


def padded(model, lengths, front):
    """Rows of different length as one batch, and a batched cache that knows of the padding."""
    T = max(lengths)
    rows = [tiny.tokens(n, seed=n)[0] for n in lengths]
    widths = [((T - n, 0) if front else (0, T - n)) for n in lengths]
    inputs = mx.stack([mx.pad(row, width, constant_values=7) for row, width in zip(rows, widths)])
    padding = [T - n for n in lengths]
    cache = [c.merge([c] * len(lengths)) for c in model.make_cache()]
    if front:
        for c in cache:
            if full_part(c) is not None:
                full_part(c).prepare(left_padding=padding)
            if linear_part(c) is not None:
                linear_part(c).left_padding = mx.array(padding)
    elif any(padding):
        for c in cache:
            c.prepare(lengths=lengths, right_padding=padding)
    return rows, inputs, cache


@pytest.mark.parametrize("step", [1, 3, 16, 100])
@pytest.mark.parametrize("front", [True, False], ids=["in front", "behind"])
@pytest.mark.parametrize("changes", [{}, NO_CONVOLUTION], ids=["conv", "no conv"])
def test_rows_padded_in_a_batch_are_what_they_are_alone(changes, front, step):
    model = tiny.model(**changes)
    lengths = [1, 2, 5, 70, 33]
    rows, inputs, cache = padded(model, lengths, front)
    logits = tiny.in_steps(model, inputs, step, cache)
    if not front:
        for c in cache:
            c.finalize()
    following = mx.array([[3], [1], [4], [1], [5]])
    decoded = [model(following, cache=cache), model(following, cache=cache)]
    for i, (row, n) in enumerate(zip(rows, lengths)):
        alone_cache = model.make_cache()
        alone = model(row[None], cache=alone_cache)[0]
        found = logits[i, -n:] if front else logits[i, :n]
        assert tiny.distance(found, alone) < 1e-4
        for batch in decoded:
            alone = model(following[i : i + 1], cache=alone_cache)[0]
            assert tiny.distance(batch[i], alone) < 1e-4


def graph_nodes(x, folder) -> int:
    """How much still hangs on an array: none once it has been evaluated."""
    path = str(folder / "graph.dot")
    mx.export_to_dot(path, x)
    with open(path) as file:
        return file.read().count("->")


@pytest.mark.parametrize("lengths", [[4], [4, 4], [4, 9, 2]], ids=["single", "even", "padded"])
@pytest.mark.parametrize("changes", [{}, NO_CONVOLUTION], ids=["conv", "no conv"])
def test_no_graph_grows_behind_the_cache_while_decoding(tmp_path, lengths, changes):
    model = tiny.model(**changes)
    if len(lengths) == 1:
        cache = filled(model, lengths[0])
    else:
        _, inputs, cache = padded(model, lengths, front=False)
        model(inputs, cache=cache)
        if len(set(lengths)) > 1:  # as mlx-lm does
            for c in cache:
                c.finalize()

    def nodes_after(steps):
        tokens = mx.zeros((len(lengths), 1), mx.int32)
        for _ in range(steps):
            # As generation does: only the next tokens are evaluated.
            tokens = model(tokens, cache=cache).argmax(-1)
            mx.eval(tokens)
        return [graph_nodes(x, tmp_path) for x in arrays_of(cache)]

    few = nodes_after(3)
    assert nodes_after(40) == few


@pytest.mark.parametrize("batch", [1, 3], ids=["single", "batched"])
def test_thousands_of_tokens_take_no_memory_but_that_of_their_keys(batch):
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 8,
        "head_dim": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "full_attention_heads": [[1], []],
    }
    model = tiny.model(**sizes)
    cache = model.make_cache()
    if batch > 1:
        cache = [c.merge([c] * batch) for c in cache]
    tokens = mx.zeros((batch, 1), mx.int32)
    held = {}
    for step in range(1, 3001):
        tokens = model(tokens, cache=cache).argmax(-1)
        mx.async_eval(tokens)
        if step in (500, 3000):
            mx.eval(tokens)
            held[step] = mx.get_active_memory() - sum(c.nbytes for c in cache)
    assert cache[1].empty() is False
    assert cache_bytes(cache)["full_attention"] == 2 * batch * 3072 * 4 * 4
    # What rounding of allocations may come to; 32 bytes a token would be over it.
    assert abs(held[3000] - held[500]) < 60_000


@pytest.mark.parametrize("changes", [{}, NO_CONVOLUTION], ids=["conv", "no conv"])
def test_a_long_prefill_leaves_nothing_behind_but_the_cache(changes):
    model = tiny.model(**changes)
    filled(model, 8)
    before = mx.get_active_memory()
    cache = filled(model, 3000)
    held = mx.get_active_memory() - before
    # The convolution's inputs, of which a view would keep all, are 2 MB a layer.
    assert abs(held - sum(c.nbytes for c in cache)) < 200_000


@tiny.exact_peak
def test_the_memory_of_a_prefill_does_not_grow_with_the_layers():
    def peak(layers):
        model = tiny.model(
            num_hidden_layers=layers, full_attention_heads=[[0]] + [[]] * (layers - 1)
        )
        filled(model, 8)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cache = filled(model, 1000)
        held = sum(c.nbytes for c in cache)
        return mx.get_peak_memory() - before - held

    assert peak(12) < 1.2 * peak(2)


def test_batched_it_is_made_of_mlx_lms_own_parts(model):
    merged = model.make_cache()[1].merge([model.make_cache()[1]] * 2)
    assert isinstance(merged, CacheList)
    assert isinstance(merged[0], BatchKVCache)
    assert isinstance(merged[1], ArraysCache)


@given(
    sizes=st.lists(st.sampled_from([1, 3, 255, 256, 512, 300]), min_size=1, max_size=6),
    heads=st.integers(1, 2),
    kind=st.sampled_from([KVCache, QuantizedKVCache]),
)
def test_what_is_appended_is_fetched_as_from_the_caches_own_method(sizes, heads, kind):
    ours, own = kind(), kind()
    for size in sizes:
        # As a projection's heads come.
        keys, values = (mx.random.normal((2, size, heads, 64)).swapaxes(1, 2) for _ in range(2))
        found, expected = append(ours, keys, values), own.update_and_fetch(keys, values)
        for (_, x), (_, y) in zip(tree_flatten(found), tree_flatten(expected)):
            assert mx.array_equal(x, y)
        assert ours.offset == own.offset
        if kind is KVCache:
            assert ours.keys.shape == own.keys.shape


def test_a_grown_cache_holds_what_it_held():
    cache = KVCache()
    keys = mx.random.normal((2, 1, 256, 8))
    append(cache, keys, 2 * keys)
    grow(cache)
    assert cache.offset == 256 and cache.keys.shape == (2, 1, 512, 8)
    assert mx.array_equal(cache.keys[:, :, :256], keys)
    assert mx.array_equal(cache.values[:, :, :256], 2 * keys)
