"""HydraHead against mlx-lm's dense Qwen3 of the same sizes: prefill, decode and cache, in one run.

    python benchmarks/prefill.py                          # 3 layers of 8 heads, for a CPU
    python benchmarks/prefill.py --size qwen3-1.7b        # for a GPU

Weights are random, lengths the same for both, the two models take turns at each length. An eighth
of the heads is full, in whole KV groups, at least one head a layer. Ratios are ours over dense for
speed, dense over ours for the cache: over 1 is to our favour.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Optional

import mlx.core as mx
import mlx.nn as nn
import record
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache
from rich.console import Console
from rich.table import Table

from mlx_hydra.config import spread_heads
from mlx_hydra.models import hydrahead
from mlx_hydra.models.cache import cache_bytes

SIZES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 2048,
        "dtype": mx.float32,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "dtype": mx.bfloat16,
    },
}
FULL_RATIO = 0.125


STEP = {"small": 512, "qwen3-1.7b": 2048}


def build(size: str, full_ratio: Optional[float], bits: Optional[int] = None) -> nn.Module:
    """A model with random weights: HydraHead, or mlx-lm's dense Qwen3 where the ratio is None."""
    config = {
        **SIZES[size],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    }
    dtype = config.pop("dtype")
    mx.random.seed(0)
    if full_ratio is None:
        model = qwen3.Model(qwen3.ModelArgs.from_dict({"model_type": "qwen3", **config}))
    else:
        layers, heads, kv_heads = (
            config[f"num_{n}"] for n in ("hidden_layers", "attention_heads", "key_value_heads")
        )
        full = {"full_attention_heads": spread_heads(full_ratio, layers, heads, kv_heads)}
        config = {"model_type": "hydrahead", **full, **config}
        model = hydrahead.Model(hydrahead.ModelArgs.from_dict(config))
    model.update(
        tree_map_with_path(
            lambda path, w: w.astype(dtype) if hydrahead.may_cast(path) else w, model.parameters()
        )
    )
    if bits is not None:
        predicate = getattr(model, "quant_predicate", None)
        nn.quantize(model, group_size=64, bits=bits, class_predicate=_quantizable(predicate))
    mx.eval(model.parameters())
    return model.eval()


def _quantizable(predicate):
    return lambda path, m: hasattr(m, "to_quantized") and (predicate is None or predicate(path, m))


def measure(model: nn.Module, tokens: int, step: int, decode_tokens: int) -> dict[str, float]:
    """Prefill and decode one random prompt the way mlx-lm generates."""
    prompt = mx.random.randint(0, model.args.vocab_size, (tokens,))
    cache = make_prompt_cache(model)
    mx.eval(prompt)
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    steps = generate_step(
        prompt, model, max_tokens=decode_tokens + 1, prompt_cache=cache, prefill_step_size=step
    )
    next(steps)
    prefilled = time.perf_counter()
    for _ in steps:
        pass
    finished = time.perf_counter()
    return {
        "prefill_seconds": round(prefilled - started, 3),
        "prefill_tps": round(tokens / (prefilled - started), 1),
        "decode_tps": round(decode_tokens / (finished - prefilled), 2),
        "cache_bytes": sum(cache_bytes(cache).values()),
        "peak_bytes": mx.get_peak_memory(),
    }


def fastest(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    better = {"prefill_seconds": min}
    return {n: better.get(n, max)(value, before.get(n, value)) for n, value in now.items()}


def compare(tokens: int, dense: dict[str, float], ours: dict[str, float]) -> dict:
    return {
        "tokens": tokens,
        "dense": dense,
        "hydrahead": ours,
        "prefill_ratio": round(ours["prefill_tps"] / dense["prefill_tps"], 2),
        "decode_ratio": round(ours["decode_tps"] / dense["decode_tps"], 2),
        "cache_ratio": round(dense["cache_bytes"] / ours["cache_bytes"], 2),
    }


def show(rows: list[dict]) -> None:
    table = Table("tokens", "model", "prefill s", "prefill tok/s", "decode tok/s", "cache MB")
    for row in rows:
        for name in ("dense", "hydrahead"):
            m = row[name]
            table.add_row(
                f"{row['tokens']:,}",
                name,
                f"{m['prefill_seconds']:.2f}",
                f"{m['prefill_tps']:,.0f}",
                f"{m['decode_tps']:.1f}",
                f"{m['cache_bytes'] / 1e6:.1f}",
            )
        ratios = (row[f"{name}_ratio"] for name in ("prefill", "decode", "cache"))
        table.add_row("", "ratio", "", *(f"{ratio:.2f}x" for ratio in ratios), end_section=True)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--prefill-step-size", type=int, help="default: 512 small, 2048 else")
    parser.add_argument("--repeats", type=int, default=1, help="of each; the fastest counts")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    step = args.prefill_step_size or STEP[args.size]
    models = {"dense": build(args.size, None), "hydrahead": build(args.size, FULL_RATIO)}
    for model in models.values():
        measure(model, step + 1, step, 2)
    rows = []
    for tokens in args.lengths:
        results: dict[str, dict] = {name: {} for name in models}
        for _ in range(args.repeats):
            for name, model in models.items():
                got = measure(model, tokens, step, args.decode_tokens)
                results[name] = fastest(results[name], got)
        rows.append(compare(tokens, results["dense"], results["hydrahead"]))
        print(json.dumps(rows[-1]), flush=True)
        record.write(args.out, size=args.size, prefill_step_size=step, results=rows)
    show(rows)


if __name__ == "__main__":
    main()
