"""Checkpoint folders on disk for the tests of conversion: made, read back as bytes, converted."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import load_model
from tiny import GOLDEN, READS_ROPE_PARAMETERS

from mlx_hydra.convert import main

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def write_qwen3(folder: Path, *, dtype=mx.float32, shards: int = 1, seed: int = 0, **changes):
    """A random Qwen3 checkpoint; its weights by name."""
    config = {**QWEN3, **changes}
    rng = np.random.default_rng(seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights = {}
    for name, x in sorted(tree_flatten(model.parameters())):
        normal = rng.standard_normal(x.shape, dtype=np.float32)
        value = 1 + 0.2 * normal if "norm" in name else 0.2 * normal
        weights[name] = mx.array(value).astype(dtype)
    write_checkpoint(folder, config, weights, shards=shards)
    return weights


def write_checkpoint(folder: Path, config: dict, weights: dict, *, shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        return
    weight_map, names = {}, sorted(weights)
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        mx.save_safetensors(str(folder / shard), part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_golden(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, folder))


def convert(source, out, *options) -> Path:
    """Run the command; its refusals come as SystemExit."""
    main(["--hf-path", str(source), "--mlx-path", str(out), *map(str, options)])
    return Path(out)


def load(folder: Path):
    """The model in mlx-lm's hands."""
    config = read_config(folder)
    changes, rope = {"model_file": None}, config.get("rope_parameters")
    if rope and config["model_type"] == "qwen3" and not READS_ROPE_PARAMETERS:
        changes |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope}
    return load_model(Path(folder), model_config=changes)[0]


def read_config(folder: Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def read_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder as its dtype, shape and bytes, by a reader of its own."""
    tensors = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert name not in tensors
            begin, end = entry["data_offsets"]
            data = raw[start + begin : start + end]
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), data)
    return tensors


def leftovers(folder: Path, *expected: str) -> set[str]:
    """What is in a folder beyond the names that should be."""
    return {path.name for path in Path(folder).iterdir()} - set(expected)


def heads_file(path: Path, heads: list[list[int]], num_heads: int, **changes) -> Path:
    content = {"num_layers": len(heads), "num_heads": num_heads, "full_attention_heads": heads}
    path.write_text(json.dumps({**content, **changes}))
    return path
