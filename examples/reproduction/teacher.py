"""Train the teacher, a small Qwen3 of full attention, until it answers questions on reports.

    python examples/reproduction/teacher.py --out TEACHER --minutes 12 --total-minutes 9

A curriculum of lengths: one ends when 95% of the answers' tokens come out right, or when its share
of the training time is over, to which steps that compile do not count. The state is saved every
half minute; a second run with the same --out goes on from there. --out holds the model as mlx-lm
loads it, curve.csv and how many questions it answers; no file of it is over 15 MiB.
"""

import argparse
import json
import multiprocessing
import shutil
import time
from collections import deque
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from evaluate import evaluate
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.qwen3 import Model, ModelArgs
from texts import PER_REPORT, SEED, TASKS, TOKENIZER, Writer, drawn_for, exams

from mlx_hydra.checkpoints.writer import ShardWriter, TensorSpec

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Lengths, and the share of the training time that each may take.
STAGES = [(160, 0.5), (320, 0.2), (512, 1.0)]
TOKENS_A_STEP = 40960
LEARNING_RATE, WARMUP, DECAY, CLIP = 2e-3, 200, 0.35, 1.0
# What the tokens that are no answer count: they teach the language that the students learn from.
# Little at first, where the gradient of so many would drown what retrieval is learnt from, then
# ever more between these two shares of the training time.
OTHERS, RAISED = (0.05, 0.25), (0.5, 0.8)
# The share of people with a last name alone. Else none is ever an answer's first token, and how to
# copy one was not learnt at all in 1,671 steps, in which all other answers came out right.
LAST_NAMES = 0.25
# Files of a state, and how large those of the model may be: a machine that will be gone may hand
# out no larger ones.
PIECES, SHARD_BYTES = 5, 14 << 20

COLUMNS = "step,seconds,tokens,length,loss,accuracy,gradient_norm,peak_gigabytes"
LENGTH_OF_EXAM = 512

_writer = None


def start_worker() -> None:
    global _writer
    _writer = Writer(TOKENIZER)


def make_batch(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[rows, length + 1]`` and which of those that come next answer ``[rows, length]``.

    A document ends with the start token of the next, as in a text of many.
    """
    number, rows, length = task
    rng = drawn_for("teacher", length, number)
    tokens = np.full((rows, length + 1), _writer.encode.bos, np.int32)
    answers = np.zeros((rows, length), bool)
    for row in range(rows):
        document = _writer.document(rng, length, LAST_NAMES)
        tokens[row, :length] = document.ids
        for start, count in document.answers:
            answers[row, start - 1 : start - 1 + count] = True
    return tokens, answers


def new_model(sizes: dict) -> Model:
    mx.random.seed(SEED)
    model = Model(ModelArgs.from_dict(CONFIG | sizes))
    for layer in model.layers:
        # What is added to the residual stream starts small, the more layers there are.
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight = projection.weight * (2 * len(model.layers)) ** -0.5
    return model


def weight_of_others(done: float) -> float:
    """At a share of the training time."""
    return float(np.interp(done, RAISED, OTHERS))


def loss_and_accuracy(model, tokens, answers, others):
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    losses = nn.losses.cross_entropy(logits, targets)
    asked = answers.sum()
    loss = (losses * answers).sum() / asked
    loss = loss + others * (losses * ~answers).sum() / (answers.size - asked)
    right = ((mx.argmax(logits, axis=-1) == targets) * answers).sum()
    return loss, right / asked


def save(out: Path, model, optimizer, progress: dict) -> None:
    """Write the state in pieces of about the same size, beside the one before and then for it."""
    arrays = {f"model.{k}": v for k, v in tree_flatten(model.parameters())}
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    pieces: list[dict] = [{} for _ in range(PIECES)]
    sizes = [0] * PIECES
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].nbytes):
        smallest = sizes.index(min(sizes))
        pieces[smallest][name] = array
        sizes[smallest] += array.nbytes
    partial, before = out / "state.partial", out / "state.before"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for number, piece in enumerate(pieces):
        mx.save_safetensors(str(partial / f"{number}.safetensors"), piece)
    (partial / "progress.json").write_text(json.dumps(progress))
    state = out / "state"
    if state.exists():
        state.rename(before)
    partial.rename(state)
    shutil.rmtree(before, ignore_errors=True)


def restore(out: Path, model, optimizer) -> dict | None:
    """The progress of a saved state, or None where there is none."""
    state = out / "state"
    if not state.exists():
        # One who died between two renames.
        state = out / "state.before"
    if not state.exists():
        return None
    parts = {"model": [], "optimizer": []}
    for number in range(PIECES):
        for name, value in mx.load(str(state / f"{number}.safetensors")).items():
            part, name = name.split(".", 1)
            parts[part].append((name, value))
    model.load_weights(parts["model"])
    optimizer.state = tree_unflatten(parts["optimizer"])
    return json.loads((state / "progress.json").read_text())


def save_model(out: Path, model: Model, sizes: dict) -> None:
    """Write what mlx-lm loads."""
    weights = dict(tree_flatten(model.parameters()))
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in weights.items()]
    with ShardWriter(out, specs, shard_bytes=SHARD_BYTES) as writer:
        for name, array in weights.items():
            writer.write(name, array)
    (out / "config.json").write_text(json.dumps(CONFIG | sizes, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, out / name)
    shutil.copyfile(TOKENIZER / "chat_template.jinja", out / "chat_template.jinja")


def read_weights(folder: Path) -> list[tuple[str, mx.array]]:
    return [
        pair for path in folder.glob("model*.safetensors") for pair in mx.load(str(path)).items()
    ]


def train(args: argparse.Namespace, model: Model) -> dict:
    total = 60 * (args.total_minutes or args.minutes)
    optimizer = optim.AdamW(learning_rate=LEARNING_RATE, betas=[0.9, 0.98], weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    progress = {"step": 0, "stage": 0, "stage_seconds": 0.0, "seconds": 0.0, "tokens": 0}
    progress = restore(args.out, model, optimizer) or progress
    print(f"{sum(v.size for _, v in tree_flatten(model.parameters())):,} parameters", progress)

    state = [model.state, optimizer.state]

    def step(tokens, answers, others):
        (loss, accuracy), gradients = nn.value_and_grad(model, loss_and_accuracy)(
            model, tokens, answers, others
        )
        gradients, norm = optim.clip_grad_norm(gradients, CLIP)
        optimizer.update(model, gradients)
        return loss, accuracy, norm

    if not args.no_compile:
        step = mx.compile(step, inputs=state, outputs=state)
    curve = (args.out / "curve.csv").open("a")
    if curve.tell() == 0:
        print(COLUMNS, file=curve)
    recent, compiled_for = deque(maxlen=40), None
    started = saved = shown = last = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.workers, start_worker) as pool:
        asked, pending = progress["step"], deque()
        while last - started < 60 * args.minutes and progress["seconds"] < total:
            length, share = STAGES[progress["stage"]]
            rows = max(1, args.tokens_a_step // length)
            while len(pending) < 2 * args.workers:
                task = (asked, rows, length)
                pending.append((task, pool.apply_async(make_batch, (task,))))
                asked += 1
            task, batch = pending.popleft()
            if task[2] != length:
                continue
            tokens, answers = map(mx.array, batch.get())

            left = 1 - progress["seconds"] / total
            optimizer.learning_rate = LEARNING_RATE * min(
                1.0, (progress["step"] + 1) / WARMUP, max(left / DECAY, 0.03)
            )
            others = mx.array(weight_of_others(1 - left))
            loss, accuracy, norm = step(tokens, answers, others)
            mx.eval(state, loss, accuracy, norm)
            now = time.perf_counter()
            recent.append((loss.item(), accuracy.item()))
            progress["step"] += 1
            progress["tokens"] += rows * length
            if length == compiled_for:
                progress["seconds"] += now - last
                progress["stage_seconds"] += now - last
            last, compiled_for = now, length
            mean_loss, mean_accuracy = np.mean(recent, axis=0)
            if now - shown > 5:
                shown = now
                row = (
                    f"{progress['step']},{progress['seconds']:.0f},{progress['tokens']},{length},"
                    f"{mean_loss:.4f},{mean_accuracy:.4f},{norm.item():.3f},"
                    f"{mx.get_peak_memory() / 1e9:.1f}"
                )
                print(row, flush=True)
                print(row, file=curve, flush=True)
            last_stage = progress["stage"] == len(STAGES) - 1
            learnt = len(recent) == recent.maxlen and mean_accuracy > 0.95
            if not last_stage and (learnt or progress["stage_seconds"] > share * total):
                progress["stage"] += 1
                progress["stage_seconds"] = 0.0
                recent.clear()
                mx.clear_cache()
            if now - saved > 30:
                save(args.out, model, optimizer, progress)
                saved = last = time.perf_counter()
    save(args.out, model, optimizer, progress)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of this run, by the clock")
    parser.add_argument(
        "--total-minutes", type=float, help="of training in all runs, for the schedule (--minutes)"
    )
    parser.add_argument("--start", type=Path, metavar="MODEL", help="begin with its weights")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count() - 1)
    parser.add_argument("--tokens-a-step", type=int, default=TOKENS_A_STEP)
    parser.add_argument("--questions", type=int, default=128, help="of the exam at the end")
    parser.add_argument("--no-compile", action="store_true", help="run the step op by op")
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=N", help="another model's")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    mx.set_cache_limit(8 << 30)
    sizes = {name: int(n) for name, n in (size.split("=") for size in args.sizes)}
    model = new_model(sizes)
    if args.start is not None:
        model.load_weights(read_weights(args.start))
    progress = train(args, model)
    print(progress)
    save_model(args.out, model, sizes)
    mx.clear_cache()
    writer, results = Writer(TOKENIZER), []
    for task in TASKS:
        numbers = range(args.questions // PER_REPORT[task])
        documents = exams(writer, task, LENGTH_OF_EXAM, numbers)
        results.append(evaluate(model, task, LENGTH_OF_EXAM, documents))
    print(json.dumps(results))
    device = mx.device_info().get("device_name", str(mx.default_device()))
    content = {"device": device, "mlx": mx.__version__, "progress": progress, "results": results}
    (args.out / "exam.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
