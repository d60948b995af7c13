"""The kernels of softmax attention against float64, on what GPU there is or in the simulator."""

import itertools
import sys

import metalsim
import mlx.core as mx
import numpy as np
import pytest

from mlx_hydra import kernels
from mlx_hydra.ops import head_attention
from mlx_hydra.ops.head_attention import (
    head_attention_parts,
    head_attention_prefill,
    prefill_splits,
)

MODULE = sys.modules["mlx_hydra.ops.head_attention"]
ON_GPU = kernels.gpu_backend() is not None

ROUNDING = {mx.float32: 0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
RAGGED = (0, 2, 0, 0)


class Case:
    """Inputs in their dtype, and what attention gives for them in float64."""

    def __init__(
        self,
        T,
        offset=0,
        D=64,
        dtype=mx.float32,
        bits=None,
        *,
        kv_index=RAGGED,
        B=2,
        extra=3,
        group_size=32,
        masked=False,
        scale=None,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.T, self.offset, self.kv_index = T, offset, list(kv_index)
        self.scale = D**-0.5 if scale is None else scale
        Hk, S = max(kv_index) + 1, offset + T + extra
        self.q = mx.array(rng.standard_normal((B, len(kv_index), T, D)), dtype)
        k, v = (rng.standard_normal((B, Hk, S, D)) for _ in range(2))
        # Neither the keys past the last query nor the heads that nobody reads may be touched.
        unread = [h for h in range(Hk) if h not in kv_index]
        for x in (k, v):
            x[:, unread] = np.nan
            if not masked:
                x[:, :, offset + T :] = np.nan
        self.k, self.v = mx.array(k, dtype), mx.array(v, dtype)
        self.options = {"offset": offset}
        if bits is not None:
            self.options |= {"group_size": group_size, "bits": bits}
            self.k, self.v = (
                mx.quantize(x, group_size=group_size, bits=bits) for x in (self.k, self.v)
            )
        allowed = np.arange(S) <= offset + np.arange(T)[:, None]
        if masked:
            # Beyond the causal rule; the last row is padded in front, and its first query with it.
            allowed = np.arange(S) <= offset + 2 + np.arange(T)[:, None]
            allowed = np.repeat(allowed[None, None], B, axis=0)
            allowed[-1, :, :, : (S + 1) // 2] = False
            allowed[-1, :, 0] = False
            self.options["mask"] = mx.array(allowed)
        self.bits, self.allowed = bits, allowed

    def run(self, backend, **options):
        options = {**self.options, "scale": self.scale, "backend": backend, **options}
        return head_attention(self.q, self.k, self.v, self.kv_index, **options)

    def check(self, backend, **options):
        found = self.run(backend, **options)
        assert found.dtype == self.q.dtype
        assert found.shape == self.q.shape
        expected, bound = self.expected()
        assert np.abs(in_float64(found) - expected).max() < bound

    def expected(self):
        """Attention, zero where a query sees nothing, and how far rounding may lead from it.

        Outputs are rounded to the dtype once, as are weights before they meet the values; keys
        and values that were packed are rounded too. A rounded key moves a score, and with it the
        logarithm of a weight, by the sum of its products' own roundings; so do tensor cores,
        whose three products in TF32 keep 22 bits of a float's 24.
        """
        q = in_float64(self.q)
        k, v = (in_float64(self.unpacked(x))[:, self.kv_index] for x in (self.k, self.v))
        seen = self.allowed.any(axis=tuple(range(self.allowed.ndim - 1)))
        k, v = (np.where(seen[:, None], x, 0) for x in (k, v))
        scores = self.scale * q @ k.swapaxes(-1, -2)
        scores = np.where(self.allowed, scores, -np.inf)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(largest == -np.inf, 0, largest))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        o = weights @ v
        bound = 2e-5 * np.abs(o).max()
        u = ROUNDING[self.q.dtype]
        bound += u * (np.abs(o).max() + np.abs(v).max())
        products = np.quantile(abs(self.scale) * np.abs(q) @ np.abs(k).swapaxes(-1, -2), 0.9)
        if self.bits is not None:
            bound += u * np.abs(v).max() * (1 + 2 * products)
        if kernels.gpu_backend() == "cuda" and self.q.dtype == mx.float32:
            bound += 2.0**-22 * np.abs(v).max() * products
        return o, bound

    def unpacked(self, x):
        if self.bits is None:
            return x
        words, scales, biases = x
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        packing = {name: self.options[name] for name in ("group_size", "bits")}
        return mx.dequantize(words, scales, biases, **packing)


def in_float64(x):
    return np.array(x.astype(mx.float32), np.float64)


def name_of(value):
    return str(value).replace("mlx.core.", "") if isinstance(value, mx.Dtype) else None


LENGTHS = [(1, 0), (1, 299), (2, 60), (7, 40), (63, 0), (64, 13), (65, 131), (300, 77)]
DIMS, DTYPES = (32, 64, 128, 256), tuple(ROUNDING)

# T and offset, D, dtype, bits, whether masked.
GRID = [
    *itertools.product(LENGTHS, DIMS, DTYPES, [None], [False]),
    *itertools.product(LENGTHS[1::2], DIMS, DTYPES, [4, 8], [False]),
    *itertools.product(LENGTHS[::2], DIMS, DTYPES, [None], [True]),
    *itertools.product(LENGTHS[::2], [64], DTYPES, [4, 8], [True]),
    *itertools.product(LENGTHS[1:5], [80, 96], DTYPES, [None], [False]),
]
# The simulator compiles and runs a kernel in a second: all shapes, but not with each other.
SAMPLE = [
    ((1, 0), 32, mx.float16, None, False),
    ((1, 299), 64, mx.float32, None, False),
    ((1, 299), 128, mx.bfloat16, None, False),
    ((1, 63), 256, mx.float32, None, True),
    ((1, 130), 128, mx.float32, 8, False),
    ((1, 130), 32, mx.bfloat16, 4, False),
    ((1, 65), 64, mx.float16, 4, True),
    ((2, 60), 64, mx.float32, None, True),
    ((7, 40), 64, mx.float32, None, False),
    ((63, 0), 32, mx.float32, None, True),
    ((64, 13), 128, mx.bfloat16, None, False),
    ((65, 131), 64, mx.float16, None, False),
    ((300, 77), 32, mx.float32, None, False),
    ((63, 20), 256, mx.float32, None, False),
    ((65, 7), 64, mx.float32, 8, False),
    ((7, 70), 128, mx.float16, 4, True),
    ((17, 9), 96, mx.bfloat16, None, False),
]


@pytest.mark.parametrize("lengths, D, dtype, bits, masked", GRID if ON_GPU else SAMPLE, ids=name_of)
def test_it_is_attention_in_float64(kernel_backend, lengths, D, dtype, bits, masked):
    case = Case(*lengths, D, dtype, bits, masked=masked, B=3 if ON_GPU or lengths[0] < 64 else 1)
    case.check(kernel_backend)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("split", [1, 30, 100, 1000])
def test_splits_come_together(monkeypatch, kernel_backend, split, T, bits):
    monkeypatch.setattr(MODULE, "DECODE_SPLIT", (split, 4096))
    monkeypatch.setattr(MODULE, "PREFILL_SPLIT", (split, 4096))
    Case(T, 120 if split > 1 else 11, 32, mx.float32, bits).check(kernel_backend)


@pytest.mark.parametrize("T", [1, 9])
def test_splits_of_which_rows_see_nothing_come_together(monkeypatch, kernel_backend, T):
    monkeypatch.setattr(MODULE, "DECODE_SPLIT", (8, 4096))
    monkeypatch.setattr(MODULE, "PREFILL_SPLIT", (8, 4096))
    Case(T, 35, 32, mx.float16, masked=True).check(kernel_backend)


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("T, offset", [(3, 0), (20, 45), (40, 100)])
def test_a_tile_may_be_on_its_way_while_one_is_worked_on(
    monkeypatch, kernel_backend, buffers, T, offset
):
    monkeypatch.setattr(MODULE, "BUFFERS", {kernel_backend: buffers})
    for split in (64, 1000):
        monkeypatch.setattr(MODULE, "PREFILL_SPLIT", (split, 4096))
        Case(T, offset, 32).check(kernel_backend)


@pytest.mark.parametrize(
    "dtype, bits, masked",
    [(mx.float16, None, False), (mx.bfloat16, None, True), (mx.bfloat16, 8, True)],
)
@pytest.mark.parametrize("T, offset", [(9, 3), (21, 50), (40, 100)])
def test_a_simdgroup_may_have_two_tiles_of_rows(
    monkeypatch, kernel_backend, T, offset, dtype, bits, masked
):
    monkeypatch.setattr(MODULE, "SIMDGROUPS", 1)
    monkeypatch.setattr(MODULE, "ROW_TILES", {kernel_backend: 2})
    for split in (64, 1000):
        monkeypatch.setattr(MODULE, "PREFILL_SPLIT", (split, 4096))
        Case(T, offset, 32, dtype, bits, masked=masked).check(kernel_backend)


@pytest.mark.parametrize("T, offset, extra", [(1, 1, 1000), (1, 300, 700), (9, 4, 900)])
def test_the_position_may_be_an_array(kernel_backend, T, offset, extra):
    # Of the splits that the length of the buffers calls for some have nothing to read.
    case = Case(T, offset, 32, extra=extra)
    case.check(kernel_backend, offset=mx.array([offset]))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 100, 32),
        Case(1, 300, 128, mx.bfloat16, kv_index=(0, 0), B=1),
        Case(1, 700, 64, extra=900),
        Case(2, 40, 32, mx.float16, kv_index=(0,) * 9),
    ],
    ids=["a part", "two", "of which some are empty", "many queries"],
)
def test_parts_may_be_left_to_others(kernel_backend, case):
    where = mx.array([case.offset])
    found = head_attention_parts(
        case.q, case.k, case.v, case.kv_index, scale=case.scale, offset=where
    )
    assert found.sums.dtype == found.stats.dtype == mx.float32
    assert found.sums.shape == (*found.stats.shape[:-1], case.q.shape[-1])
    sums, stats = map(in_float64, found)
    largest, weights = stats[..., 0], stats[..., 1]
    kept = np.exp2(largest - largest.max(-1, keepdims=True))
    o = (kept[..., None] * sums).sum(-2) / (kept * weights).sum(-1)[..., None]
    expected, bound = case.expected()
    assert np.abs(o - expected).max() < bound


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(
    "case",
    [Case(20, 45, 32), Case(40, 0, 32, mx.bfloat16, kv_index=(0, 0)), Case(9, 90, 80, B=1)],
    ids=["ragged", "from the start", "odd"],
)
def test_no_shape_has_to_tell_the_number_of_keys(kernel_backend, case, splits):
    # The simulator's arrays end where they say.
    first = 1 if ON_GPU else None
    k, v = case.k[:, :, :first], case.v[:, :, :first]
    where = mx.array([case.offset])
    found = head_attention_prefill(
        case.q, k, v, case.kv_index, scale=case.scale, offset=where, splits=splits
    )
    expected, bound = case.expected()
    assert np.abs(in_float64(found) - expected).max() < bound


def test_keys_are_cut_into_few_different_numbers_of_parts(monkeypatch, kernel_backend):
    monkeypatch.setattr(MODULE, "PREFILL_SPLIT", (4, 13))

    def found(case, offset):
        return prefill_splits(case.q, case.k, case.v, case.kv_index, offset)

    # Of 20 rows a threadgroup has all: 13 splits at most, and else a power of two.
    case = Case(20, 45, 32, kv_index=(0,), B=1)
    assert [found(case, offset) for offset in (0, 8, 12, 27, 28, 31, 45)] == [4, 4, 8, 8, 8, 13, 13]
    assert found(Case(1, 45, 32), 45) is None
    assert found(Case(20, 45, 16), 45) is None


@pytest.mark.parametrize("simdgroups", [1, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 300, 32),
        Case(1, 60, 256, mx.float16, kv_index=(0,)),
        Case(13, 60, 80, mx.bfloat16),
        Case(20, 40, 128, masked=True),
        Case(20, 40, 32, scale=400.0),
    ],
    ids=["a row", "wide", "odd", "masked", "far apart"],
)
def test_few_and_many_rows_are_brought_together(monkeypatch, kernel_backend, case, simdgroups):
    monkeypatch.setattr(MODULE, "DECODE_SPLIT", (2, 4096))
    monkeypatch.setattr(MODULE, "PREFILL_SPLIT", (4, 4096))
    monkeypatch.setattr(MODULE, "MERGE_ROWS", 1 if simdgroups == 1 else 1 << 20)
    with monkeypatch.context() as patch:
        calls = recorded(patch)
        case.run(kernel_backend)
    assert [name for name, _ in calls][1:] == [MERGE]
    case.check(kernel_backend)


def test_threadgroups_are_not_without_number(monkeypatch, kernel_backend):
    monkeypatch.setattr(MODULE, "DECODE_SPLIT", (4, 12))
    calls = recorded(monkeypatch)
    Case(1, 100, 32).run(kernel_backend)
    # Two batches of two KV heads: three of the twelve for each.
    assert [groups for name, groups in calls] == [(3, 2, 2), (1, 8, 1)]


@pytest.mark.parametrize("kv_index", [(0,), (0, 1), (1, 1, 0), (0,) * 5, (3, 1, 0, 3, 1, 1, 3, 3)])
@pytest.mark.parametrize("T", [1, 2, 20])
def test_groups_of_any_size_and_order(kernel_backend, kv_index, T):
    Case(T, 50, 32, kv_index=kv_index).check(kernel_backend)


@pytest.mark.parametrize("T, group_size", [(1, 32), (1, 64), (20, 128)])
def test_scales_belong_to_their_groups(kernel_backend, group_size, T):
    Case(T, 20, 128, mx.float32, 4, group_size=group_size).check(kernel_backend)


@pytest.mark.parametrize("T, offset", [(1, 0), (1, 70), (20, 0), (20, 70)])
@pytest.mark.parametrize("scale", [400.0, 40.0, -40.0, 3.0, 1e-3])
def test_scores_of_any_size_give_weights(kernel_backend, scale, T, offset):
    Case(T, offset, 32, scale=scale).check(kernel_backend)


@pytest.mark.parametrize("T", [1, 20])
def test_one_mask_can_serve_all_rows(kernel_backend, T):
    case = Case(T, 10, 32, masked=True)
    case.allowed = case.allowed[:1]
    case.options["mask"] = mx.array(case.allowed)
    case.check(kernel_backend)


@pytest.mark.parametrize("T", [1, 20])
# The simulator lays inputs out itself, so that one type is enough there.
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16][: 1 + ON_GPU], ids=name_of)
@pytest.mark.parametrize(
    "lie",
    [
        lambda x: mx.pad(x, [(0, 0), (1, 0), (2, 7), (0, 0)])[:, 1:, 2:-7],
        lambda x: mx.pad(x, [(0, 0), (0, 0), (0, 0), (1, 2)])[..., 1:-2],
        lambda x: mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda x: mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2),
    ],
    ids=["a longer buffer", "odd places", "columns", "tokens first"],
)
def test_inputs_may_lie_as_they_like(kernel_backend, lie, dtype, T):
    case = Case(T, 40, 64, dtype)
    case.q, case.k, case.v = (lie(x) for x in (case.q, case.k, case.v))
    mx.eval(case.q, case.k, case.v)
    case.check(kernel_backend)


@pytest.mark.parametrize("T", [1, 20])
def test_the_parts_of_packed_keys_may_lie_each_in_its_own_way(kernel_backend, T):
    case = Case(T, 40, 64, mx.float32, 8)

    def lie(words, scales, biases):
        scales = mx.contiguous(scales.swapaxes(1, 2)).swapaxes(1, 2)
        biases = mx.contiguous(biases.swapaxes(-1, -2)).swapaxes(-1, -2)
        return mx.pad(words, [(0, 0), (0, 0), (1, 0), (1, 0)])[:, :, 1:, 1:], scales, biases

    case.k, case.v = lie(*case.k), lie(*case.v)
    mx.eval(case.k, case.v)
    case.check(kernel_backend)


@pytest.mark.skipif(not metalsim.available(), reason="the simulator counts bytes")
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_keys_are_read_once_for_all_heads_of_a_group(heads):
    with metalsim.metal(checked=False) as sim:
        case = Case(1, 999, 128, mx.bfloat16, kv_index=(0,) * heads, B=1)
        mx.eval(case.run("metal"))
    keys_and_values = 2 * 1000 * 128 * 2
    assert keys_and_values <= sim.counters.device_bytes_read < 1.25 * keys_and_values


@pytest.mark.parametrize("blocks", ["one block", "small blocks"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 20])
def test_gradients_are_those_of_the_plain_form(monkeypatch, kernel_backend, T, masked, blocks):
    case = Case(T, 9, 32, masked=masked)
    if masked:  # A query that sees nothing has no gradient to compare.
        case.options["mask"] = mx.array(case.allowed | (np.arange(case.allowed.shape[-1]) < 1))
    case.k, case.v = (mx.where(mx.isnan(x), 0, x) for x in (case.k, case.v))
    weights = mx.random.normal(case.q.shape, key=mx.random.key(1))

    def loss(backend):
        def of(q, k, v):
            case.q, case.k, case.v = q, k, v
            return (weights * case.run(backend)).sum()

        return of

    inputs = case.q, case.k, case.v
    expected = mx.grad(loss("ops"), argnums=(0, 1, 2))(*inputs)
    if blocks == "small blocks":
        monkeypatch.setattr(MODULE, "SCORE_BYTES", 1)
    found = mx.grad(loss(kernel_backend), argnums=(0, 1, 2))(*inputs)
    for x, y in zip(found, expected):
        assert x.shape == y.shape
        assert mx.abs(x - y).max() < 1e-5 * mx.abs(y).max()


@pytest.mark.parametrize("blocks", ["one block", "small blocks"])
def test_queries_have_gradients_where_keys_are_packed(monkeypatch, kernel_backend, blocks):
    case = Case(20, 9, 32, bits=8, kv_index=(0, 1, 0))
    plain = Case(20, 9, 32, kv_index=(0, 1, 0), extra=0)
    plain.k, plain.v = (case.unpacked(x)[:, :, :29] for x in (case.k, case.v))

    def loss(case, backend):
        def of(q):
            case.q = q
            return (case.run(backend) ** 2).sum()

        return of

    q = case.q
    expected = mx.grad(loss(plain, "ops"))(q)
    if blocks == "small blocks":
        monkeypatch.setattr(MODULE, "SCORE_BYTES", 1)
    found = mx.grad(loss(case, kernel_backend))(q)
    assert mx.abs(found - expected).max() < 1e-5 * mx.abs(expected).max()


def recorded(monkeypatch):
    """(name, threadgroups) of each kernel that is called from here on; none is run."""
    calls = []

    def recording(kernel, *arguments, groups, output_shapes, output_dtypes, **options):
        calls.append((kernel.name, groups))
        return [mx.zeros(*output) for output in zip(output_shapes, output_dtypes)]

    monkeypatch.setattr(kernels.Kernel, "__call__", recording)
    return calls


DECODE, PREFILL = "head_attention_decode", "head_attention_prefill"
MERGE = "head_attention_merge"


@pytest.mark.parametrize(
    "case, expected",
    [
        (Case(1, 9, 32), [DECODE]),
        (Case(1, 300, 32), [DECODE, MERGE]),
        (Case(2, 9, 32), [DECODE]),
        (Case(3, 9, 32), [PREFILL]),
        (Case(1, 9, 80), [PREFILL]),
        (Case(9, 9, 64, mx.float16), [PREFILL]),
        (Case(9, 9, 64, kv_index=(0, 1)), [PREFILL]),
        (Case(9, 9, 32, mx.float16, kv_index=(0, 1)), [PREFILL]),
        (Case(9, 9, 64, mx.float16, 8, kv_index=(0, 1)), [PREFILL]),
        (Case(9, 9, 64, mx.float16, kv_index=(1, 0)), [PREFILL]),
        # What MLX does as well, and what we do not do.
        (Case(9, 9, 64, mx.float16, kv_index=(0, 0, 1, 1)), []),
        (Case(9, 9, 128, mx.bfloat16, kv_index=(0, 1), masked=True), []),
        (Case(9, 9, 64, mx.float16, kv_index=(0, 1), B=1), [PREFILL]),
        (Case(1, 9, 64, mx.float16, kv_index=(0, 0)), [DECODE]),
        (Case(1, 9, 16), []),
        (Case(9, 9, 64, mx.float32, 2), []),
    ],
)
def test_auto_takes_the_fastest(monkeypatch, kernel_backend, case, expected):
    monkeypatch.setattr(MODULE, "FUSED_QUERIES", {kernel_backend: 36})
    monkeypatch.setenv("MLX_HYDRA_BACKEND", "auto")
    monkeypatch.setattr("mlx_hydra.ops.backend.PROVEN", (kernel_backend,))
    calls = recorded(monkeypatch)
    case.run("auto")
    assert [name for name, _ in calls] == expected
    calls.clear()
    case.run("ops")
    assert not calls


@pytest.mark.parametrize(
    "case, change",
    [
        (Case(1, 9, 16), {}),
        (Case(1, 9, 32), {"mask": mx.zeros((1, 1, 1, 13))}),
        (Case(1, 9, 32), {"mask": mx.ones((13,), mx.bool_)}),
        (Case(1, 9, 32, bits=2), {}),
        (Case(1, 0, 32, bits=4, B=1, kv_index=(0,), extra=0), {}),
    ],
    ids=["head size", "mask of numbers", "mask of one axis", "bits", "hardly any keys"],
)
def test_what_no_kernel_takes_is_said(kernel_backend, case, change):
    with pytest.raises(ValueError, match="this call runs on ops only"):
        case.run(kernel_backend, **change)
