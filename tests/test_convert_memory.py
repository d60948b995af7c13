"""Conversion holds a tensor at a time, not a model."""

import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import QWEN3, write_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

# 5 shards of about 110 MB in bfloat16, so that the whole would not fit; an embedding of 46 MB.
SIZES = {
    "hidden_size": 1280,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 128,
    "vocab_size": 18_000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

# Linux hands the peak of ru_maxrss on from a parent to the program that its child becomes.
CHILD = """
import pathlib, resource, sys
from mlx_hydra.convert import main
main(sys.argv[1:])
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "source"
    write_large_qwen3(folder)
    yield folder
    shutil.rmtree(folder)


def write_large_qwen3(folder):
    config = {**QWEN3, **SIZES}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    rng = np.random.default_rng(0)
    weights = {}
    for name, x in tree_flatten(model.parameters()):
        bits = rng.integers(0x3C00, 0x3D00, x.shape, dtype=np.uint16)
        weights[name] = mx.array(bits).view(mx.bfloat16)
    write_checkpoint(folder, config, weights, shards=5)


@pytest.mark.parametrize("options", [(), ("-q", "--dtype", "float32")])
def test_peak_memory_is_bounded_by_a_shard(options, source, tmp_path):
    args = ["--hf-path", source, "--mlx-path", tmp_path / "out", *options]
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert run.stderr == "" and run.returncode == 0
    peak = int(run.stdout.splitlines()[-1])
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert len(shards) == 5 and sum(shards) > 1.5 * max(shards) + 300e6
    print(f"{options}: {peak / 1e6:.0f} MB at a shard of {max(shards) / 1e6:.0f} MB")
    assert peak < 1.5 * max(shards) + 300e6
