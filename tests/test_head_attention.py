import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mlx_hydra.ops import head_attention

SCALE = 0.3

# One for each way the heads can be called: all at once, and run by run.
KV_INDICES = {
    "one each": [0, 1, 2],
    "uniform groups": [0, 0, 1, 1, 2, 2],
    "ragged groups": [0, 0, 0, 1, 2, 2],
    "any order": [2, 0, 1, 0, 0],
    "one each in another order": [2, 0, 1],
    "groups in turns": [0, 1, 2, 0, 1, 2],
    "heads nobody reads": [1, 1],
    "one head": [0],
}


def inputs(kv_index, T, offset=0, extra=0, *, B=2, Hk=3, D=8, seed=0):
    rng = np.random.default_rng(seed)
    S = offset + T + extra
    q = rng.standard_normal((B, len(kv_index), T, D))
    k, v = (rng.standard_normal((B, Hk, S, D)) for _ in range(2))
    return q, k, v


def causal(T, S, offset):
    return np.arange(S) <= offset + np.arange(T)[:, None]


def softmax_attention(q, k, v, kv_index, allowed):
    """Attention as it is written down, in float64; ``allowed`` broadcasts to [B, 1, T, S]."""
    scores = SCALE * q @ k[:, kv_index].swapaxes(-1, -2)
    scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v[:, kv_index]


def attend(q, k, v, kv_index, dtype=mx.float32, **options):
    q, k, v = (mx.array(x, dtype) for x in (q, k, v))
    return head_attention(q, k, v, kv_index, scale=SCALE, **options)


def small_blocks(monkeypatch):
    """Sixteen queries a block, the fewest there are."""
    monkeypatch.setattr(sys.modules["mlx_hydra.ops.head_attention"], "SCORE_BYTES", 1)


@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 5),
    st.integers(1, 4).flatmap(
        lambda Hk: st.tuples(st.just(Hk), st.lists(st.integers(0, Hk - 1), min_size=1, max_size=6))
    ),
    st.booleans(),
)
def test_it_is_softmax_attention_for_any_grouping(B, T, offset, extra, heads, as_array):
    Hk, kv_index = heads
    q, k, v = inputs(kv_index, T, offset, extra, B=B, Hk=Hk)
    expected = softmax_attention(q, k, v, kv_index, causal(T, k.shape[2], offset))
    # Neither the keys past the last query nor the heads that nobody reads may be touched.
    unread = [h for h in range(Hk) if h not in kv_index]
    for x in (k, v):
        x[:, :, offset + T :] = np.nan
        x[:, unread] = np.nan
    found = attend(q, k, v, mx.array(kv_index) if as_array else kv_index, offset=offset)
    assert found.shape == q.shape
    assert tiny.distance(found, expected) < 1e-5


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("kv_index", KV_INDICES.values(), ids=KV_INDICES)
def test_a_mask_stands_in_for_the_causal_rule(kv_index, T):
    q, k, v = inputs(kv_index, T, offset=5, extra=3)
    mask = np.broadcast_to(causal(T, 8 + T, 7), (2, 1, T, 8 + T)).copy()
    mask[1, :, :, :3] = False
    expected = softmax_attention(q, k, v, kv_index, mask)
    found = attend(q, k, v, kv_index, offset=5, mask=mx.array(mask))
    assert tiny.distance(found, expected) < 1e-5


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [16, 17, 50])
@pytest.mark.parametrize("kv_index", KV_INDICES.values(), ids=KV_INDICES)
def test_blocks_of_queries_give_what_one_block_gives(monkeypatch, kv_index, T, masked, bits):
    q, k, v = (mx.array(x, mx.float32) for x in inputs(kv_index, T, offset=9, D=64))
    options = {"scale": SCALE, "offset": 9}
    if masked:
        mask = causal(T, 9 + T, 9) & (np.arange(9 + T) >= np.array([0, 4])[:, None, None, None])
        options["mask"] = mx.array(mask)
    if bits is not None:
        k, v = (mx.quantize(x, group_size=64, bits=bits) for x in (k, v))
        options |= {"group_size": 64, "bits": bits}
    whole = head_attention(q, k, v, kv_index, **options)
    small_blocks(monkeypatch)
    assert tiny.distance(head_attention(q, k, v, kv_index, **options), whole) < 1e-5


def test_a_block_holds_no_more_scores_than_it_may(monkeypatch):
    calls = []
    attention = mx.fast.scaled_dot_product_attention

    def counted(q, k, v, **options):
        calls.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(
        sys.modules["mlx_hydra.ops.head_attention"], "SCORE_BYTES", 4 * 2 * 3 * 100 * 20
    )
    attend(*inputs([0, 1, 2], 70, offset=30), [0, 1, 2], offset=30)
    # Twenty rows of 100 scores fit; a block reads no key that its last query does not see.
    assert calls == [(20, 50), (20, 70), (20, 90), (10, 100)]


@tiny.exact_peak
@pytest.mark.parametrize("kv_index", [[0, 0, 1, 1], list(reversed(range(8)))], ids=str)
def test_the_scores_of_few_blocks_are_held_at_once(monkeypatch, kv_index):
    block = 1 << 20
    monkeypatch.setattr(sys.modules["mlx_hydra.ops.head_attention"], "SCORE_BYTES", block)
    Hk = max(kv_index) + 1
    q, k, v = (mx.array(x, mx.float32) for x in inputs(kv_index, 2048, B=1, Hk=Hk, D=16))
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(head_attention(q, k, v, kv_index, scale=SCALE))
    # The output and its parts beside scores, their softmax and what is being made of them: all
    # blocks at once would hold 64 or 128.
    assert mx.get_peak_memory() - before < 2 * q.nbytes + 6 * block + q.nbytes


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kv_index", KV_INDICES.values(), ids=KV_INDICES)
def test_quantised_keys_and_values_are_read_as_their_dequantised_selves(kv_index, bits, T):
    q, k, v = inputs(kv_index, T, offset=4, extra=3, D=64)
    packing = {"group_size": 32, "bits": bits}
    k, v = (mx.quantize(mx.array(x, mx.float32), **packing) for x in (k, v))
    plain = [np.array(mx.dequantize(*x, **packing), np.float64) for x in (k, v)]
    expected = softmax_attention(q, *plain, kv_index, causal(T, 7 + T, 4))
    q = mx.array(q, mx.float32)
    before = np.array(q)
    found = head_attention(q, k, v, kv_index, scale=SCALE, offset=4, **packing)
    assert tiny.distance(found, expected) < 1e-5
    assert tiny.distance(q, before) == 0


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 4e-3), (mx.bfloat16, 3e-2)])
@pytest.mark.parametrize("kv_index", KV_INDICES.values(), ids=KV_INDICES)
def test_half_precision_goes_in_and_out(kv_index, dtype, tolerance):
    q, k, v = inputs(kv_index, 20)
    found = attend(q, k, v, kv_index, dtype)
    assert found.dtype == dtype
    assert tiny.distance(found, softmax_attention(q, k, v, kv_index, causal(20, 20, 0))) < tolerance


@pytest.mark.parametrize("blocks", ["one block", "small blocks"])
@pytest.mark.parametrize("kv_index", KV_INDICES.values(), ids=KV_INDICES)
def test_gradients_are_the_slopes_that_float64_differences_measure(monkeypatch, kv_index, blocks):
    case = inputs(kv_index, 20, offset=3)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(case[0].shape)

    def loss(q, k, v):
        out = head_attention(q, k, v, kv_index, scale=SCALE, offset=3)
        return (out * mx.array(weights, mx.float32)).sum()

    if blocks == "small blocks":
        small_blocks(monkeypatch)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(*(mx.array(x, mx.float32) for x in case))
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(case[i].shape)
        direction /= np.linalg.norm(direction)

        def slope(step, i=i, direction=direction):
            moved = [x + (step * direction if i == j else 0) for j, x in enumerate(case)]
            return (softmax_attention(*moved, kv_index, causal(20, 23, 3)) * weights).sum()

        expected = (slope(1e-5) - slope(-1e-5)) / 2e-5
        assert (np.array(gradient) * direction).sum() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "kv_index, options, message",
    [
        ([0, 1], {}, "kv_index has 2 entries for 3 heads"),
        ([0, 1, 3], {}, "kv_index names KV head 3 of 3 (0 to 2)"),
        ([0, -1, 2], {}, "kv_index names KV head -1 of 3 (0 to 2)"),
        ([0, 1, 2], {"offset": 2}, "5 keys for 4 queries at offset 2"),
        ([0, 1, 2], {"backend": "opencl"}, "backend='opencl'"),
    ],
)
def test_what_does_not_fit_is_named(kv_index, options, message):
    with pytest.raises(ValueError) as error:
        attend(*inputs([0] * 3, 4, extra=1), kv_index, **options)
    assert message in str(error.value)
