"""What scoring all heads on a pair of prompts costs, against one pass over its tokens.

    python benchmarks/select_cost.py --out benchmarks/results/select-h100.json    # for a GPU
    python benchmarks/select_cost.py --size small --context 1024                  # a CPU trial

Random weights and tokens, the swapped answer in the middle of the prompt. Scoring all receivers is
the clean pass, the counterfactual one from the swapped answer on, and the batched patching; the
target is three passes in all. Senders, in one and in two rounds, are measured beside it, with as
many receivers as a selection takes at most. Times are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import record
from mlx_lm.models.cache import make_prompt_cache
from prefill import SIZES, build
from rich.console import Console
from rich.table import Table

from mlx_hydra.select.causal import RECEIVER_SHARE, counterfactual_readout
from mlx_hydra.select.patching import patched_readouts
from mlx_hydra.select.probes import Pair
from mlx_hydra.select.trace import Trace, prefill


def make_pair(context: int, answer: int, vocabulary: int) -> Pair:
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(0, vocabulary, count).tolist()  # noqa: E731
    prompt, right, wrong = draw(context), draw(answer), draw(answer)
    middle = context // 2
    text = {
        name: prompt[:middle] + tokens + prompt[middle + answer :]
        for name, tokens in (("clean", right), ("other", wrong))
    }
    return Pair(text["clean"], text["other"], right, wrong, "random")


def some_receivers(shape: tuple[int, int], seed: int) -> dict[int, list[int]]:
    """As many heads as a hop has at most, anywhere but in the first layer."""
    layers, heads = shape
    count = max(1, round(RECEIVER_SHARE * layers * heads))
    drawn = np.random.default_rng(seed).permutation((layers - 1) * heads)[:count] + heads
    receivers: dict[int, list[int]] = {}
    for layer, head in (divmod(int(i), heads) for i in sorted(drawn)):
        receivers.setdefault(layer, []).append(head)
    return receivers


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of some work, after once for warming up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="qwen3-1.7b")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--answer", type=int, default=7, help="tokens of the answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    model = build(args.size, None)
    pair = make_pair(args.context, args.answer, model.args.vocab_size)
    shape = len(model.model.layers), model.args.num_attention_heads
    heads = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    trace = Trace(model, pair)
    first, second = some_receivers(shape, 1), some_receivers(shape, 2)
    rounds = {"senders, round 1": [first], "senders, round 2": [second, first]}

    def runs() -> None:
        counterfactual_readout(Trace(model, pair))

    forward = seconds(
        lambda: prefill(model, pair.clean_tokens, make_prompt_cache(model)), args.repeats
    )
    counted = trace.forward_macs(0, trace.length)
    rows = []

    def row(part: str, macs: int, work: Callable[[], object]) -> None:
        mx.reset_peak_memory()
        took = seconds(work, args.repeats)
        rows.append(
            {
                "part": part,
                "seconds": round(took, 4),
                "forward_passes": round(took / forward, 3),
                "forward_passes_counted": round(macs / counted, 3),
                "peak_bytes": mx.get_peak_memory(),
            }
        )

    row("clean and counterfactual", sum(trace.macs.values()), runs)
    row(
        "patching of receivers",
        patched_readouts(trace, heads)[1],
        lambda: patched_readouts(trace, heads),
    )
    for name, hops in rounds.items():
        senders = [head for head in heads if head[0] < max(hops[0])]
        row(
            name,
            patched_readouts(trace, senders, hops)[1],
            lambda senders=senders, hops=hops: patched_readouts(trace, senders, hops),
        )
    receivers = sum(r["forward_passes"] for r in rows[:2])
    result = {
        "size": args.size,
        "context": args.context,
        "answer_tokens": args.answer,
        "heads": len(heads),
        "forward_seconds": round(forward, 4),
        "receivers_in_forward_passes": round(receivers, 3),
        "parts": rows,
    }
    record.write(args.out, **result)
    table = Table("part", "seconds", "forward passes", "counted", "peak GB")
    table.add_row("a forward pass", f"{forward:.3f}", "1.00", "1.00", "")
    for r in rows:
        table.add_row(
            r["part"],
            f"{r['seconds']:.3f}",
            f"{r['forward_passes']:.2f}",
            f"{r['forward_passes_counted']:.2f}",
            f"{r['peak_bytes'] / 1e9:.2f}",
        )
    Console().print(table)
    print(f"All {len(heads)} receivers of a pair: {receivers:.2f} forward passes (target: 3).")


if __name__ == "__main__":
    main()
