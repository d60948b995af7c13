"""The parts of conversion on their own: writer, reader, names, starting values."""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from checkpoint_files import read_bytes, write_qwen3
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from safetensors import safe_open

from mlx_hydra.checkpoints.migrate import (
    in_words,
    inverse_softplus,
    spread_decay,
    spread_step_sizes,
)
from mlx_hydra.checkpoints.names import canonical, layout, reorder_columns
from mlx_hydra.checkpoints.plan import and_more
from mlx_hydra.checkpoints.reader import CheckpointReader, read_header
from mlx_hydra.checkpoints.writer import ShardWriter, TensorSpec, make_shards, staged_folder
from mlx_hydra.config import ModelArgs

DTYPES = [mx.float32, mx.bfloat16, mx.float16, mx.uint32]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 400),
)
def test_what_is_written_is_read_back_by_everyone(tensors, shard_bytes):
    arrays = {
        f"t{i}": mx.random.randint(0, 100, shape, key=mx.random.key(i)).astype(dtype)
        for i, (shape, dtype) in enumerate(tensors)
    }
    specs = [TensorSpec(name, x.shape, x.dtype) for name, x in arrays.items()]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text("{}")
        with ShardWriter(folder, specs, shard_bytes=shard_bytes) as writer:
            for name, x in reversed(arrays.items()):
                writer.write(name, x)
        reader = CheckpointReader(folder)
        assert list(reader.tensors) != [] and set(reader.tensors) == set(arrays)
        for name, x in arrays.items():
            assert reader.tensors[name].shape == x.shape
            assert reader.read(name).dtype == x.dtype
            assert mx.array_equal(reader.read(name), x)
        for shard in reader.shards:
            with safe_open(shard, "numpy") as peer:
                assert peer.metadata() == {"format": "mlx"}
                for name in peer.keys():  # noqa: SIM118
                    if arrays[name].dtype in (mx.float32, mx.float16, mx.uint32):
                        assert (peer.get_tensor(name) == np.array(arrays[name])).all()
            header = json.loads(shard.read_bytes()[8:].partition(b"}}")[0] + b"}}")
            start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
            for name, entry in header.items():
                if name != "__metadata__":
                    assert (start + entry["data_offsets"][0]) % arrays[name].dtype.size == 0


def test_shards_are_filled_in_order():
    sizes = [3, 3, 3, 20, 1, 1]
    specs = [TensorSpec(str(i), (size,), mx.float32) for i, size in enumerate(sizes)]
    shards = [[spec.name for spec in shard] for shard in make_shards(specs, 28)]
    assert shards == [["0", "1"], ["2"], ["3"], ["4", "5"]]


def test_a_tensor_that_is_not_as_planned_or_never_comes_is_an_error(tmp_path):
    spec = TensorSpec("x", (2, 3), mx.float32)
    for wrong in (mx.zeros((3, 2)), mx.zeros((2, 3), mx.float16)):
        with pytest.raises(RuntimeError, match="planned as"), ShardWriter(tmp_path, [spec]) as w:
            w.write("x", wrong)
    with pytest.raises(RuntimeError, match="never written: x"), ShardWriter(tmp_path, [spec]):
        pass
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_strided_arrays_are_written_in_their_order(tmp_path):
    x = mx.arange(24).reshape(4, 6).astype(mx.bfloat16)
    arrays = {"t": x.T, "s": x[:, ::2], "row": x.reshape(-1)[1::3], "part": x[1:3]}
    specs = [TensorSpec(name, y.shape, y.dtype) for name, y in arrays.items()]
    with ShardWriter(tmp_path, specs) as writer:
        for name, y in arrays.items():
            writer.write(name, y)
    written = mx.load(str(tmp_path / "model.safetensors"))
    assert all(mx.array_equal(written[name], y) for name, y in arrays.items())


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    for out in (tmp_path / "out", tmp_path / "out" / "precious"):
        with pytest.raises(ValueError, match="choose another path"), staged_folder(out):
            pytest.fail("not to be reached")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_headers_alone_are_read_to_open_a_checkpoint(tmp_path):
    weights = write_qwen3(tmp_path, shards=2)
    reader = CheckpointReader(tmp_path)
    assert set(reader.tensors) == set(weights) == set(read_bytes(tmp_path))
    name = "model.norm.weight"
    assert reader.tensors[name].dtype == "F32"
    assert read_header(reader.tensors[name].shard)[name] == reader.tensors[name]
    assert mx.array_equal(reader.read(name), weights[name])


def test_a_numbered_set_needs_no_index(tmp_path):
    write_qwen3(tmp_path, shards=3)
    with_index = CheckpointReader(tmp_path).tensors
    (tmp_path / "model.safetensors.index.json").unlink()
    assert CheckpointReader(tmp_path).tensors == with_index


@pytest.mark.parametrize(
    "name, expected",
    [
        ("attn.linear_attn.q_proj.weight", "self_attn.linear.q_proj.weight"),
        ("self_attn.gated_deltanet.A_log", "self_attn.linear.A_log"),
        ("linear_attn.dt_bias", "self_attn.linear.dt_bias"),
        ("self_attn.softmax_attn.k_norm.weight", "self_attn.full.k_norm.weight"),
        ("full_attention.v_proj.weight", "self_attn.full.v_proj.weight"),
        ("attn.o_proj.weight", "self_attn.o_proj.weight"),
        ("attn.full.q_proj.weight", "self_attn.full.q_proj.weight"),
        ("self_attn.linear.q_conv1d.weight", "self_attn.linear.q_conv1d.weight"),
        ("mlp.gate_proj.weight", "mlp.gate_proj.weight"),
    ],
)
def test_aliases(name, expected):
    assert canonical(f"model.layers.12.{name}") == f"model.layers.12.{expected}"
    assert canonical("model.norm.weight") == "model.norm.weight"


def test_the_layout_is_the_models_own_and_costs_no_memory():
    model = tiny.model()
    expected = {name: x.shape for name, x in tree_flatten(model.parameters())}
    args = ModelArgs.from_dict(tiny.config())
    assert layout(args) == expected
    before = mx.get_active_memory()
    large = tiny.config(hidden_size=8192, vocab_size=1_000_000, intermediate_size=80_000)
    assert layout(ModelArgs.from_dict(large))["model.embed_tokens.weight"] == (1_000_000, 8192)
    assert mx.get_active_memory() - before < 1e6


def test_columns_move_in_blocks():
    x = mx.arange(12).reshape(2, 6)
    assert reorder_columns(x, (2, 0, 1)).tolist() == [[4, 5, 0, 1, 2, 3], [10, 11, 6, 7, 8, 9]]


@pytest.mark.parametrize("num_heads", [1, 2, 7, 16])
def test_starting_values_are_spread_over_the_heads(num_heads):
    A, step = np.array(spread_decay(num_heads)), np.array(spread_step_sizes(num_heads))
    assert A.min() > 1 and A.max() < 16 and len(set(A)) == num_heads
    assert step.min() > 1e-3 and step.max() < 0.1 and len(set(step)) == num_heads
    np.testing.assert_allclose(np.diff(A), 15 / num_heads, rtol=1e-5)
    ratios = np.diff(np.log(np.sort(step)))
    np.testing.assert_allclose(ratios, np.log(100) / num_heads, rtol=1e-4)
    bias = np.array(inverse_softplus(mx.array(step)), np.float64)
    np.testing.assert_allclose(np.log1p(np.exp(bias)), step, rtol=1e-4)
    if num_heads > 2:  # heads of one group are not alike
        assert np.abs(np.diff(np.log(step))).min() > np.log(100) / num_heads


def test_lists_in_words():
    assert in_words([0, 1, 2, 5]) == "0-2, 5"
    assert in_words((3, 4, 0, 1)) == "3-4, 0-1"
    assert in_words([0, 0, 1, 1, 2, 3]) == "0 (2 times), 1 (2 times), 2-3"
    assert in_words([]) == ""
    assert and_more(["a", "b", "c"]) == "a, b, c"
    assert and_more(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
