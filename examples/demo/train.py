"""Train the demo model: a curriculum of ever longer reports, loss on the answers alone.

    python examples/demo/train.py --tokenizer DIR --out DIR --minutes 13

A stage ends when 95% of the answers' tokens come out right, or when its share of the time is over.
The state is saved every half minute; a second run with the same --out goes on from there.
"""

import argparse
import json
import multiprocessing
import time
from collections import deque
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from questions import IGNORED, Encoder, training_batch

from mlx_hydra.models.hydrahead import LinearAttention, Model, ModelArgs

SEED = 20261123
HERE = Path(__file__).parent

# Length, rows a step, and the share of the time a stage may take.
STAGES = [
    (160, 256, 0.25),
    (320, 128, 0.15),
    (640, 64, 0.10),
    (1280, 32, 0.10),
    (2560, 16, 0.15),
    (5120, 8, 0.15),
    (10240, 4, 0.10),
    (20480, 2, 0.10),
]
LEARNING_RATE, WARMUP, CLIP = 2e-3, 200, 1.0

_encode = None


def start_worker(tokenizer: str) -> None:
    global _encode
    _encode = Encoder(Path(tokenizer))


def make_batch(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    return training_batch(_encode, *task)


def new_model() -> Model:
    mx.random.seed(SEED)
    model = Model(ModelArgs.from_dict(json.loads((HERE / "config.json").read_text())))
    for module in model.modules():
        if isinstance(module, LinearAttention):
            # As Gated DeltaNet starts: decay rates and time steps spread over the heads.
            H = module.n_heads
            step = mx.exp(mx.random.uniform(np.log(1e-3), np.log(0.1), (H,)))
            module.A_log = mx.log(mx.random.uniform(1, 16, (H,)))
            module.dt_bias = step + mx.log(-mx.expm1(-step))
    return model


def loss_and_accuracy(model, inputs, targets):
    logits = model(inputs)
    asked = targets != IGNORED
    count = asked.sum()
    losses = nn.losses.cross_entropy(logits, mx.where(asked, targets, 0))
    right = (mx.argmax(logits, axis=-1) == targets) * asked
    return (losses * asked).sum() / count, right.sum() / count


def save(out: Path, model, optimizer, progress: dict) -> None:
    temporary = out / "state.tmp.safetensors"
    arrays = {f"model.{k}": v for k, v in tree_flatten(model.parameters())}
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    mx.save_safetensors(str(temporary), arrays, {"progress": json.dumps(progress)})
    temporary.rename(out / "state.safetensors")


def restore(out: Path, model, optimizer) -> dict:
    arrays, metadata = mx.load(str(out / "state.safetensors"), return_metadata=True)
    parts = {"model": [], "optimizer": []}
    for name, value in arrays.items():
        part, name = name.split(".", 1)
        parts[part].append((name, value))
    model.load_weights(parts["model"])
    optimizer.state = tree_unflatten(parts["optimizer"])
    return json.loads(metadata["progress"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=13.0, help="of this run")
    parser.add_argument("--total-minutes", type=float, help="of all runs, for the schedule")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count() - 1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    total = 60 * (args.total_minutes or args.minutes)

    model = new_model()
    optimizer = optim.AdamW(learning_rate=LEARNING_RATE, betas=[0.9, 0.98], weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    progress = {"step": 0, "stage": 0, "stage_seconds": 0.0, "seconds": 0.0, "tokens": 0}
    if (args.out / "state.safetensors").exists():
        progress = restore(args.out, model, optimizer)
    print(f"{sum(v.size for _, v in tree_flatten(model.parameters())):,} parameters", progress)

    state = [model.state, optimizer.state]

    def step(inputs, targets):
        (loss, accuracy), gradients = nn.value_and_grad(model, loss_and_accuracy)(
            model, inputs, targets
        )
        gradients, norm = optim.clip_grad_norm(gradients, CLIP)
        optimizer.update(model, gradients)
        return loss, accuracy, norm

    curve = (args.out / "curve.csv").open("a")
    recent = deque(maxlen=40)
    started = saved = shown = last = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(
        args.workers, start_worker, (str(args.tokenizer),)
    ) as pool:
        asked, pending = progress["step"], deque()
        while last - started < 60 * args.minutes:
            length, rows, share = STAGES[progress["stage"]]
            while len(pending) < 2 * args.workers:
                task = (SEED + asked, rows, length)
                pending.append((task, pool.apply_async(make_batch, (task,))))
                asked += 1
            task, batch = pending.popleft()
            if task[2] != length:
                continue
            inputs, targets = batch.get()

            left = 1 - progress["seconds"] / total
            optimizer.learning_rate = LEARNING_RATE * min(
                1.0, (progress["step"] + 1) / WARMUP, max(left / 0.4, 0.05)
            )
            loss, accuracy, norm = step(mx.array(inputs), mx.array(targets))
            mx.eval(state, loss, accuracy, norm)
            now = time.perf_counter()
            recent.append((loss.item(), accuracy.item()))
            progress["step"] += 1
            progress["tokens"] += rows * length
            progress["seconds"] += now - last
            progress["stage_seconds"] += now - last
            last = now
            mean_loss, mean_accuracy = np.mean(recent, axis=0)
            if now - shown > 5:
                shown = now
                row = (
                    f"{progress['step']},{progress['seconds']:.0f},{progress['tokens']},{length},"
                    f"{mean_loss:.4f},{mean_accuracy:.4f},{norm.item():.3f}"
                )
                print(row, flush=True)
                print(row, file=curve, flush=True)
            last_stage = progress["stage"] == len(STAGES) - 1
            learnt = len(recent) == recent.maxlen and mean_accuracy > 0.95
            if not last_stage and (learnt or progress["stage_seconds"] > share * total):
                progress["stage"] += 1
                progress["stage_seconds"] = 0.0
                recent.clear()
            if now - saved > 30:
                saved = now
                save(args.out, model, optimizer, progress)
    save(args.out, model, optimizer, progress)
    print(progress)


if __name__ == "__main__":
    main()
