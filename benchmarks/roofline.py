"""What the kernels move and multiply, counted in the simulator, and the time that takes on paper.

    python benchmarks/roofline.py [--out benchmarks/results/roofline.json]

An estimate for machines that nobody has measured: the larger of the counted device bytes at the
chip's memory bandwidth and of the counted matrix products at its float rate. Launches, caches,
latency and all arithmetic outside matrix products are left out, so a real chip is slower. Runs on
Linux without a GPU; needs the dev extra (the simulator's compiler).
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import metalsim
from metalsim.testing import AppleGatedDelta

from mlx_hydra.ops import fuse_heads, gated_delta, head_attention
from mlx_hydra.ops.normed_linear import normed_linear

# Bytes a second as Apple tells them, and float32 products (multiply and add) a second: GPU cores
# times 128 lanes times the clock. The matrix units of M5's GPU cores are not counted: our kernels
# do not use them.
CHIPS = {
    "M1 Max": (400e9, 32 * 128 * 1.296e9),
    "M4 Max": (546e9, 40 * 128 * 1.578e9),
    "M5 Max": (614e9, 40 * 128 * 1.578e9),
}
D, DTYPE = 128, mx.bfloat16


def delta_inputs(T, H):
    q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = mx.random.uniform(0.9, 1, (1, T, H)), mx.random.uniform(0, 1, (1, T, H))
    return [*(x.astype(DTYPE) for x in (q * D**-0.5, k, v)), g, beta]


def delta(T, H):
    args = delta_inputs(T, H)
    return lambda: gated_delta(*args, backend="metal")


def apple_delta(T, H):
    *args, g, beta = delta_inputs(T, H)
    # Apple's kernel takes both in the type of q.
    args += [g.astype(DTYPE), beta.astype(DTYPE), mx.zeros((1, H, D, D))]
    return lambda: AppleGatedDelta("gated_delta_fused_chunk")(*args)


def attention(T, S, bits=None):
    q = mx.random.normal((1, 2, T, D)).astype(DTYPE)
    k, v = (mx.random.normal((1, 1, S, D)).astype(DTYPE) for _ in range(2))
    packed = {}
    if bits is not None:
        k, v = (mx.quantize(x, group_size=64, bits=bits) for x in (k, v))
        packed = {"group_size": 64, "bits": bits}
    options = {"scale": D**-0.5, "offset": S - T, "backend": "metal", **packed}
    return lambda: head_attention(q, k, v, [0, 0], **options)


def fusion(T):
    o = mx.random.normal((1, T, 16, D)).astype(DTYPE)
    gate, gamma = mx.random.normal((1, T, 16 * D)).astype(DTYPE), mx.ones((16,))
    return lambda: fuse_heads(o, gamma, gate, eps=1e-6, backend="metal")


def linear(N, bits=None):
    h, update = (mx.random.normal((1, 2048)).astype(DTYPE) for _ in range(2))
    weight, options = mx.random.normal((N, 2048)).astype(DTYPE), {"eps": 1e-6, "backend": "metal"}
    if bits is not None:
        weight = mx.quantize(weight, group_size=64, bits=bits)
        options |= {"group_size": 64, "bits": bits}
    return lambda: normed_linear(h, update, mx.ones(2048, DTYPE), weight, **options)


CASES = {
    "gated_delta, T=2048, 16 heads": (2048, lambda: delta(2048, 16)),
    "Apple's gated_delta_fused_chunk, the same": (2048, lambda: apple_delta(2048, 16)),
    "head_attention prefill, T=256 at 4096, 2 heads of a group": (
        256,
        lambda: attention(256, 4352),
    ),
    "head_attention decode over 16K, 2 heads of a group": (1, lambda: attention(1, 16384)),
    "the same, 8-bit keys and values": (1, lambda: attention(1, 16384, 8)),
    "the same, 4-bit keys and values": (1, lambda: attention(1, 16384, 4)),
    "fuse_heads, T=256, 16 heads": (256, lambda: fusion(256)),
    "normed_linear, 2,048 to 7,968": (1, lambda: linear(7968)),
    "the same, 4-bit weights": (1, lambda: linear(7968, 4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    chips = (f"us a token, {chip}" for chip in CHIPS)
    table = Table("operation", "read KB", "written KB", "products", *chips)
    rows = []
    for name, (tokens, make) in CASES.items():
        call = make()
        with metalsim.metal(checked=False) as sim:
            mx.eval(call())
            counted = sim.counters
        moved = counted.device_bytes_read + counted.device_bytes_written
        # One matrix product is of 8 x 8 matrices.
        products = 512 * counted.matrix_products
        seconds = {
            chip: max(moved / bandwidth, products / rate)
            for chip, (bandwidth, rate) in CHIPS.items()
        }
        row = {"operation": name, "tokens": tokens, "seconds": seconds, **vars(counted)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        table.add_row(
            name,
            f"{counted.device_bytes_read / 1e3:,.0f}",
            f"{counted.device_bytes_written / 1e3:,.0f}",
            f"{products:.2e}",
            *(f"{1e6 * s / tokens:.3f}" for s in seconds.values()),
        )
    Console(width=170).print(table)
    if args.out is not None:
        content = {"date": date.today().isoformat(), "simulated": True, "results": rows}
        args.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
