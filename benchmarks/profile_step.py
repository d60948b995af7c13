"""Where the time of a prefill step and of a decode step goes, on an NVIDIA GPU.

    python benchmarks/profile_step.py [--ratio 0.125] [--out profile.txt]

A model of Qwen3-1.7B's sizes with random weights reads 6K tokens, then a step of 2,048 and single
tokens under PyTorch's profiler, which sees every kernel and every call to CUDA in the process;
PyTorch is needed for nothing else here. Without --ratio it is mlx-lm's dense model.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from prefill import build
from torch.profiler import ProfilerActivity, profile

from mlx_hydra import kernels

STEP, BEFORE, TOKENS, SHOWN = 2048, 3, 16, 30


def show(title: str, trace, runs: int, seconds: float, built: float) -> None:
    events = trace.key_averages()
    on_device = [(e.device_time_total, e.count, e.key) for e in events if e.device_time_total > 0]
    calls = [(e.self_cpu_time_total, e.count, e.key) for e in events if e.key.startswith("cu")]
    total = sum(time for time, _, _ in on_device)
    count = sum(count for _, count, _ in on_device)
    kernels_of_a_run = f"{count / runs:.0f} kernels, {total / runs / 1e3:.2f} ms"
    whole = f"{1e3 * seconds:.2f} ms, of which {1e3 * built:.2f} before the graph was built"
    print(f"\n{title}: {whole}; {kernels_of_a_run}")
    for rows in (on_device, calls):
        for duration, count, name in sorted(rows, reverse=True)[:SHOWN]:
            print(f"  {duration / runs / 1e3:8.3f} ms  x{count / runs:<6g} {name[:120]}")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratio", type=float, help="of full heads; without it the dense model")
    parser.add_argument("--size", default="qwen3-1.7b")
    parser.add_argument("--backend", default=kernels.gpu_backend() or "ops")
    parser.add_argument("--out", type=Path, help="write what is printed here, too")
    args = parser.parse_args()
    os.environ["MLX_HYDRA_BACKEND"] = args.backend

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run(args)
    sys.stdout.write(text.getvalue())
    if args.out is not None:
        args.out.write_text(text.getvalue())


def run(args: argparse.Namespace) -> None:
    model = build(args.size, args.ratio)
    cache = make_prompt_cache(model)

    def timed(tokens: mx.array, runs: int) -> tuple[float, float]:
        """Seconds of a run, and those of it in which Python builds the graph."""
        built, started = 0.0, time.perf_counter()
        for _ in range(runs):
            before = time.perf_counter()
            logits = model(tokens, cache=cache)
            arrays = logits[:, -1], [c.state for c in cache]
            built += time.perf_counter() - before
            mx.eval(arrays)
        mx.synchronize()
        return (time.perf_counter() - started) / runs, built / runs

    device = mx.device_info().get("device_name", str(mx.default_device()))
    kind = "dense" if args.ratio is None else f"HydraHead, {args.ratio:.1%} full"
    print(f"{device}, MLX {mx.__version__}, {args.size}, {kind}")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for title, tokens, before, runs in (
        (f"{STEP} tokens", mx.random.randint(0, 1000, (1, STEP)), BEFORE, 1),
        ("one token", mx.array([[1]]), TOKENS, TOKENS),
    ):
        timed(tokens, before)
        mx.clear_cache()
        first = timed(tokens, runs)
        with profile(activities=activities) as trace:
            timed(tokens, runs)
        show(title, trace, runs, *first)


if __name__ == "__main__":
    main()
