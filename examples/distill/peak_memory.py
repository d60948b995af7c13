"""The peak memory of one step of the stage ``logits``, against one array of all logits.

    python examples/distill/peak_memory.py --tokens 16384 --words 151936

The model has one layer and a hidden size of 16, so that the vocabulary is nearly all there is.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import qwen3
from mlx_lm.utils import save_config, save_model

from mlx_hydra.convert import main as convert
from mlx_hydra.distill.command import main as distill
from mlx_hydra.documents.demo import MODEL, REPORT

SIZES = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--words", type=int, default=151936)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peak = measure(Path(folder), args)
    logits = args.tokens * args.words * getattr(mx, args.dtype).size
    print(f"peak: {peak / 1e9:.2f} GB; all logits in {args.dtype}: {logits / 1e9:.2f} GB.")


def measure(folder: Path, args: argparse.Namespace) -> int:
    teacher, student, run = (folder / name for name in ("teacher", "student", "run"))
    config = {**SIZES, "vocab_size": args.words}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.update(tree_map(lambda x: 0.2 * mx.random.normal(x.shape), model.parameters()))
    save_model(teacher, model)
    save_config(config, teacher / "config.json")
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, teacher)
    convert(["--hf-path", str(teacher), "--mlx-path", str(student), "--full-ratio", "0.5"])
    stage = {"objective": "logits", "tokens": args.tokens, "length": args.tokens}
    stage |= {"batch_size": 1, "learning_rate": 0.001}
    (folder / "run.yaml").write_text(json.dumps({"dtype": args.dtype, "stages": [stage]}))
    paths = {"config": folder / "run.yaml", "teacher": teacher, "student": student, "out": run}
    distill([f"--{name}={path}" for name, path in {**paths, "data": REPORT}.items()])
    return mx.get_peak_memory()


if __name__ == "__main__":
    main()
