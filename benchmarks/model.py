"""HydraHead of Qwen3-1.7B's sizes against mlx-lm's dense Qwen3-1.7B, in one run on one GPU.

    python benchmarks/model.py --out benchmarks/results/model-h100.json --plot model.png

Random weights; a quarter and an eighth of the heads full, in whole KV groups where the share
allows; bfloat16 and 4-bit weights. The models take turns at each length, three times, and the
fastest counts; lengths of --ours-only are read once, by HydraHead at an eighth alone. What the
first prefill took, in which MLX still prepares kernels for lengths that it has not met, stands
beside it.
Ratios are ours over dense for speed, dense over ours for the cache.
"""

import argparse
import functools
import json
import os
from pathlib import Path

import mlx.core as mx
import record
from mlx.utils import tree_flatten
from prefill import build, fastest, measure
from rich.console import Console
from rich.table import Table

from mlx_hydra import kernels

# Options that the results tell.
ABOUT = ("backend", "size", "prefill_step_size", "decode_tokens")
MODELS = {"dense": None, "hydrahead 25%": 0.25, "hydrahead 12.5%": 0.125}


def show(rows) -> None:
    names = ("weights", "tokens", "model", "prefill tok/s", "", "decode tok/s", "", "KV MB", "")
    table = Table(*names, "peak GB")
    for row in rows:
        dense = next(
            (
                r
                for r in rows
                if r["model"] == "dense"
                and (r["weights"], r["tokens"]) == (row["weights"], row["tokens"])
            ),
            None,
        )

        def ratio(name, row=row, dense=dense, inverse=False):
            if dense in (None, row):
                return ""
            r = row[name] / dense[name]
            return f"{1 / r if inverse else r:.2f}x"

        table.add_row(
            row["weights"],
            f"{row['tokens']:,}",
            row["model"],
            f"{row['prefill_tps']:,.0f}",
            ratio("prefill_tps"),
            f"{row['decode_tps']:.1f}",
            ratio("decode_tps"),
            f"{row['cache_bytes'] / 1e6:,.0f}",
            ratio("cache_bytes", inverse=True),
            f"{row['peak_bytes'] / 1e9:.1f}",
        )
    Console(width=140).print(table)


def plot(rows, device, file) -> None:
    from matplotlib import pyplot as plt

    panels = {
        "prefill_tps": "prefill, tokens a second",
        "decode_tps": "decode, tokens a second",
        "cache_bytes": "cache, GB",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, (name, title) in zip(axes, panels.items()):
        for model in MODELS:
            mine = [r for r in rows if r["model"] == model and r["weights"] == "bfloat16"]
            scale = 1e-9 if name == "cache_bytes" else 1
            ax.plot([r["tokens"] for r in mine], [scale * r[name] for r in mine], "o-", label=model)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("tokens read")
        ax.set_title(title)
    axes[0].legend()
    figure.suptitle(f"Qwen3-1.7B's sizes, random weights, bfloat16, {device}")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="qwen3-1.7b", help="small, for a trial on a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--ours-only", type=int, nargs="*", default=[524288])
    parser.add_argument("--bits", nargs="+", default=["bfloat16", "4"])
    parser.add_argument("--backend", default=kernels.gpu_backend() or "ops", help="ours runs on")
    parser.add_argument("--decode-tokens", type=int, default=256)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="of each; the fastest counts")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--plot", type=Path, help="draw the curves here; needs matplotlib")
    args = parser.parse_args()

    os.environ["MLX_HYDRA_BACKEND"] = args.backend
    rows = []
    for bits in args.bits:
        weights = bits if bits == "bfloat16" else f"{bits} bits"
        models = {
            name: build(args.size, ratio, None if bits == "bfloat16" else int(bits))
            for name, ratio in MODELS.items()
        }
        for model in models.values():
            measure(model, 2 * args.prefill_step_size, args.prefill_step_size, 4)
        held = mx.get_active_memory()
        for tokens in args.lengths + args.ours_only:
            alone = tokens in args.ours_only
            times = {name: [] for name in list(models)[-1 if alone else 0 :]}
            # In turns, as a host that others share is not always as fast.
            for _ in range(1 if alone else args.repeats):
                for name, found in times.items():
                    found.append(
                        measure(models[name], tokens, args.prefill_step_size, args.decode_tokens)
                    )
            for name, found in times.items():
                got = functools.reduce(fastest, found)
                got["first_prefill_seconds"] = found[0]["prefill_seconds"]
                got["all_prefill_tps"] = [once["prefill_tps"] for once in found]
                got["all_decode_tps"] = [once["decode_tps"] for once in found]
                # The other models stay in memory meanwhile, and are no part of this one's peak.
                own = sum(w.nbytes for _, w in tree_flatten(models[name].parameters()))
                got["peak_bytes"] += own - held
                rows.append({"weights": weights, "tokens": tokens, "model": name, **got})
                print(json.dumps(rows[-1]), flush=True)
            about = {name: getattr(args, name) for name in ABOUT}
            record.write(args.out, **about, results=rows)
    show(rows)
    if args.plot is not None:
        plot(rows, record.device(), args.plot)


if __name__ == "__main__":
    main()
