"""mlx_lm.lora on a HydraHead model of Qwen3-1.7B's sizes: through the kernels, and without them.

    python benchmarks/lora.py --out benchmarks/results/lora-h100.json

Random bfloat16 weights, the demo's tokenizer and report, sequences of 4,096 tokens, gradient
checkpointing. Both runs start alike, so their losses should agree to bfloat16's rounding.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import record
from mlx.utils import tree_flatten
from prefill import build

from mlx_hydra import kernels
from mlx_hydra.documents.demo import DEMO
from mlx_hydra.loading import ASKS_FOR_TRUST

# mlx-lm's own command, and what it held at its peak.
COMMAND = """
import mlx.core as mx, mlx_lm.lora
mlx_lm.lora.main()
print(f"peak_bytes {mx.get_peak_memory()}")
"""

ROW = re.compile(r"^\s*(\d+)\s+([\d.]+|nan|inf) ", re.MULTILINE)


def write_model(size: str, folder: Path) -> None:
    model = build(size, 0.125)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    config = {**vars(model.args), "model_file": "hydrahead.py"}
    for name in ("full_attention", "linear_attention", "fusion"):
        config[name] = vars(config[name])
    (folder / "config.json").write_text(json.dumps(config))
    for file in (DEMO / "model").iterdir():
        if file.name.startswith(("tokenizer", "hydrahead")):
            shutil.copy(file, folder)


def write_data(folder: Path, tokens: int) -> None:
    words = (DEMO / "report.txt").read_text().split()
    for name, start in (("train", 0), ("valid", len(words) // 2)):
        # A word is a token or more: each text is cut at the length that is asked for.
        texts = [" ".join((words * 2)[start + i : start + i + tokens]) for i in range(4)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def train(model: Path, data: Path, backend: str, args) -> dict:
    options = {
        "model": model,
        "data": data,
        "adapter-path": data / f"adapter-{backend}",
        "iters": args.iters,
        "batch-size": 1,
        "num-layers": -1,
        "max-seq-length": args.tokens,
        "learning-rate": args.learning_rate,
        "steps-per-report": 1,
        "val-batches": 1,
        "seed": 0,
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-u", "-c", COMMAND, "--train", "--grad-checkpoint", *flags]
    with subprocess.Popen(
        command + (["--trust-remote-code"] if ASKS_FOR_TRUST else []),
        env={**os.environ, "MLX_HYDRA_BACKEND": backend, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        lines = []
        for line in child.stdout:
            lines.append(re.sub(r"\x1b\[[\d;]*m", "", line))
            print(f"{backend}: {lines[-1]}", end="", flush=True)
    printed = "".join(lines)
    losses = [float(loss) for _, loss in ROW.findall(printed)]
    if child.returncode or not losses:
        return {"backend": backend, "failed": printed[-1500:]}
    peak = int(re.search(r"^peak_bytes (\d+)", printed, re.MULTILINE)[1])
    return {"backend": backend, "losses": losses, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="qwen3-1.7b", help="small, for a trial on a CPU")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--iters", type=int, default=8)
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1e-5,
        help="mlx_lm.lora's own; at 1e-4 these random weights' losses jump up and down",
    )
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="both runs side by side, on a GPU with room: half the wait, and no speeds to compare",
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), Path(folder, "data")
        model.mkdir()
        data.mkdir()
        write_model(args.size, model)
        write_data(data, args.tokens)
        mx.clear_cache()
        runs, backends = [], list(dict.fromkeys((kernels.gpu_backend() or "ops", "ops")))
        with ThreadPoolExecutor(len(backends) if args.at_once else 1) as pool:
            for run in pool.map(lambda backend: train(model, data, backend, args), backends):
                print(json.dumps(run), flush=True)
                runs.append(run)
                about = {
                    name: getattr(args, name)
                    for name in ("size", "tokens", "learning_rate", "at_once")
                }
                record.write(args.out, **about, runs=runs)


if __name__ == "__main__":
    main()
