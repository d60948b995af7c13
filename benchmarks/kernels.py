"""Each operation against its peers, in one run on one GPU.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h100.json --plot kernels.png

Peers are the ops backend (plain MLX), MLX's own fused operations, and for the delta rule a
sequential kernel of thirty lines. Beside each time stands its floor: the larger of the bytes that
must move at the device's bandwidth and the products that must be made at its rate.
"""

import argparse
import json
import math
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import record
from rich.console import Console
from rich.table import Table

from mlx_hydra import kernels
from mlx_hydra.models.positions import rotation_of
from mlx_hydra.ops import fuse_heads, gated_delta, head_attention
from mlx_hydra.ops.gated_delta_inputs import gated_delta_inputs
from mlx_hydra.ops.gated_delta_step import Weights
from mlx_hydra.ops.head_attention_inputs import head_attention_inputs
from mlx_hydra.ops.normed_linear import normed_linear

# Bytes a second, and products (multiply and add) a second in bfloat16: the makers' figures.
DEVICES = {
    "H100": (3.35e12, 495e12),
    "H200": (4.8e12, 495e12),
    "M1 Max": (400e9, 5.3e12),
    "M4 Max": (546e9, 9.2e12),
}

SEQUENTIAL = """
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.x * 4 + simdgroup_index_in_threadgroup;
const uint head = row / D;
const int H = k_shape[2];
const int T = k_shape[1];
float s[D / 32];
for (int i = 0; i < D / 32; i++) s[i] = state[row * D + lane + 32 * i];
for (int t = 0; t < T; t++) {
  const int at = (t * H + head) * D;
  const float decay = g[t * H + head];
  float recalled = 0;
  for (int i = 0; i < D / 32; i++) {
    s[i] *= decay;
    recalled += s[i] * float(k[at + lane + 32 * i]);
  }
  const float delta = beta[t * H + head] * (float(v[at + row % D]) - simd_sum(recalled));
  float read = 0;
  for (int i = 0; i < D / 32; i++) {
    s[i] += delta * float(k[at + lane + 32 * i]);
    read += s[i] * float(q[at + lane + 32 * i]);
  }
  read = simd_sum(read);
  if (lane == 0) y[at + row % D] = T_(read);
}
for (int i = 0; i < D / 32; i++) final_state[row * D + lane + 32 * i] = s[i];
"""


def sequential(backend):
    """The delta rule a token at a time, a SIMD-group for each row of the state; one sequence."""
    names = {"name": "sequential_gated_delta", "output_names": ["y", "final_state"]}
    names["input_names"] = ["q", "k", "v", "g", "beta", "state"]
    if backend == "metal":
        kernel = mx.fast.metal_kernel(**names, source=SEQUENTIAL)
    else:
        header = kernels.read_text("compat/cuda.h")
        kernel = mx.fast.cuda_kernel(**names, source=SEQUENTIAL, header=header)

    def run(q, k, v, g, beta, state):
        rows = state.shape[1] * state.shape[2]
        return kernel(
            inputs=[q, k, v, g, beta, state],
            template=[("T_", q.dtype), ("D", q.shape[-1])],
            grid=(rows * 32, 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[v.shape, state.shape],
            output_dtypes=[v.dtype, mx.float32],
        )

    return run


def seconds(f, *args, budget: float = 0.4) -> float:
    """The median time of a call, after two that build and warm it."""
    for _ in range(2):
        started = time.perf_counter()
        mx.eval(f(*args))
        mx.synchronize()
        once = time.perf_counter() - started
    times = []
    # Several calls at once where one is as short as its launch.
    batch = max(1, min(20, int(2e-3 / once)))
    for _ in range(max(3, min(30, int(budget / (once * batch))))):
        started = time.perf_counter()
        for _ in range(batch):
            mx.async_eval(f(*args))
        mx.synchronize()
        times.append((time.perf_counter() - started) / batch)
    return sorted(times)[len(times) // 2]


def delta_inputs(T, H=14, D=128, dtype=mx.bfloat16):
    q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = mx.random.uniform(0.9, 1, (1, T, H)), mx.random.uniform(0, 1, (1, T, H))
    args = [x.astype(dtype) for x in (q * D**-0.5, k, v)] + [g, beta, mx.zeros((1, H, D, D))]
    mx.eval(args)
    return args


def delta_floor(T, H=14, D=128):
    moved = T * H * (4 * D * 2 + 8) + 2 * H * D * D * 4
    # Reading with k and with q, and writing, a row of the state each.
    return moved, 3 * T * H * D * D


def projected(T, H=14, D=128, taps=4, dtype=mx.bfloat16):
    """Arguments of gated_delta_inputs."""
    projections = [mx.random.normal((1, T, n)).astype(dtype) for n in (H * D,) * 3 + (H,) * 2]
    convolution = tuple(mx.random.normal((H * D, taps, 1)).astype(dtype) for _ in range(3))
    norms = mx.ones(D, dtype), mx.ones(D, dtype)
    weights = Weights(*norms, mx.zeros(H), mx.zeros(H), 1e-6, convolution)
    past = mx.zeros((1, taps - 1, 3 * H * D), dtype)
    mx.eval(projections, weights, past)
    return *projections, weights, past


def cases(backend):
    """Rows of (operation, shape, bytes, products, {peer: (f, args)})."""
    mlx_delta = mx.fast.gated_delta_update
    for T in (1, 512, 4096):
        args = delta_inputs(T)
        peers = {
            "ours": (lambda *a: gated_delta(*a, backend=backend), args),
            "ops": (lambda *a: gated_delta(*a, backend="ops"), args),
            "sequential kernel": (sequential(backend), args),
            "mx.fast.gated_delta_update": (mlx_delta, args),
        }
        yield "gated_delta", f"T={T} H=14 D=128", *delta_floor(T), peers

    args = delta_inputs(4096)

    def trained(backend):
        def loss(*args):
            y, state = gated_delta(*args, backend=backend)
            return y.astype(mx.float32).square().sum() + state.square().sum()

        return mx.grad(loss, argnums=tuple(range(6)))

    moved, products = delta_floor(4096)
    peers = {name: (trained(b), args) for name, b in (("ours", backend), ("ops", "ops"))}
    yield "gated_delta, forward and backward", "T=4096 H=14 D=128", 3 * moved, 3 * products, peers

    T, H, D = 2048, 14, 128
    rope = nn.RoPE(D, base=1e6)
    rotation, args = rotation_of(rope, D), projected(T)

    def prepared(backend):
        return lambda *a: gated_delta_inputs(
            *a, offset=4096, rope=rope, rotation=rotation, backend=backend
        )

    def prepared_gradient(backend):
        *_, weights, past = args

        def loss(*projections):
            outputs = prepared(backend)(*projections, weights, past)
            return sum(x.astype(mx.float32).square().sum() for x in outputs)

        return mx.grad(loss, argnums=tuple(range(5)))

    moved = T * H * (6 * D * 2 + 2 * 2 + 2 * 4)
    # Taps, two norms, rotation.
    products = T * H * D * (3 * 4 + 2 * 4 + 2 * 2)
    for name, form, passes, given in (
        ("", prepared, 1, args),
        (", forward and backward", prepared_gradient, 2.5, args[:5]),
    ):
        peers = {n: (form(b), given) for n, b in (("ours", backend), ("ops", "ops"))}
        shape = f"T={T} H={H} D={D}"
        yield f"gated_delta_inputs{name}", shape, passes * moved, passes * products, peers

    Hf, Hk = 2, 1
    args = [mx.random.normal((1, T, n * D)).astype(mx.bfloat16) for n in (Hf, Hk, Hk)]
    args += [mx.ones(D, mx.bfloat16)] * 2
    mx.eval(args)

    def laid_out(backend):
        return lambda *a: head_attention_inputs(
            *a, eps=1e-6, offset=4096, log_scale_base=1000.0, backend=backend
        )

    moved, products = 2 * T * (Hf + 2 * Hk) * D * 2, 3 * T * (Hf + Hk) * D
    peers = {n: (laid_out(b), args) for n, b in (("ours", backend), ("ops", "ops"))}
    shape = f"T={T} heads={Hf} KV heads={Hk} D={D}"
    yield "head_attention_inputs", shape, moved, products, peers

    h, update = (mx.random.normal((1, 2048)).astype(mx.bfloat16) for _ in range(2))
    norm = mx.ones(2048, mx.bfloat16)
    for name, N, bits in (("", 7968, None), (", SwiGLU", 12288, None), (", 4 bits", 7968, 4)):
        weight = mx.random.normal((N, 2048)).astype(mx.bfloat16)
        options = {"eps": 1e-6, "swiglu": N == 12288}
        if bits is not None:
            options |= {"group_size": 64, "bits": bits}
            weight = mx.quantize(weight, group_size=64, bits=bits)
        mx.eval(h, update, norm, weight)

        def linear(backend, options=options):
            return lambda *a: normed_linear(*a, **options, backend=backend)

        args = h, update, norm, weight
        peers = {n: (linear(b), args) for n, b in (("ours", backend), ("ops", "ops"))}
        moved = sum(w.nbytes for w in ([weight] if bits is None else weight))
        yield f"normed_linear{name}", f"1 row of 2,048 to {N:,}", moved, N * 2048, peers

    S, D = 131072, 128
    for Hf, Hk in ((2, 1), (16, 8)):
        q = mx.random.normal((1, Hf, 1, D)).astype(mx.bfloat16)
        k, v = (mx.random.normal((1, Hk, S, D)).astype(mx.bfloat16) for _ in range(2))
        index = [h * Hk // Hf for h in range(Hf)]
        repeated = [mx.repeat(x, Hf // Hk, axis=1) for x in (k, v)]
        mx.eval(q, k, v, repeated)

        def attend(q, k, v, index=index, S=S, backend=backend, **bits):
            return head_attention(
                q, k, v, index, scale=D**-0.5, offset=S - 1, backend=backend, **bits
            )

        def mlx_attend(q, k, v):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5)

        peers = {
            "ours": (attend, (q, k, v)),
            "mx.fast, repeated KV": (mlx_attend, (q, *repeated)),
            "mx.fast": (mlx_attend, (q, k, v)),
        }
        shape = f"S=128K heads={Hf} KV heads={Hk} D=128"
        products = 2 * Hf * S * D
        yield "head_attention, decode", shape, 2 * Hk * S * D * 2, products, peers
        for bits in (8, 4):
            packed = [mx.quantize(x, group_size=64, bits=bits) for x in (k, v)]
            mx.eval(packed)

            def quantised(q, k, v, attend=attend, bits=bits):
                return attend(q, k, v, group_size=64, bits=bits)

            peers = {
                f"ours, {bits} bits": (quantised, (q, *packed)),
                "mx.fast, repeated KV": (mlx_attend, (q, *repeated)),
            }
            moved = sum(part.nbytes for x in packed for part in x)
            yield f"head_attention, decode, {bits} bits", shape, moved, products, peers

    T = 2048
    for offset in (0, 30720):
        S = offset + T
        q = mx.random.normal((1, 2, T, D)).astype(mx.bfloat16)
        k, v = (mx.random.normal((1, 1, S, D)).astype(mx.bfloat16) for _ in range(2))
        mx.eval(q, k, v)

        def prefill(q, k, v, offset=offset, backend=backend):
            return head_attention(q, k, v, [0, 0], scale=D**-0.5, offset=offset, backend=backend)

        def mlx_prefill(q, k, v):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask="causal")

        peers = {"ours": (prefill, (q, k, v)), "mx.fast": (mlx_prefill, (q, k, v))}
        moved, products = 2 * (4 * T + 2 * S) * D, 4 * D * T * (offset + T / 2)
        shape = f"T=2048 at {offset:,} heads=2 KV heads=1 D=128"
        yield "head_attention, prefill", shape, moved, products, peers

    o = mx.random.normal((1, 2048, 16, 128)).astype(mx.bfloat16)
    gate, gamma = mx.random.uniform(0, 1, (1, 2048, 2048)).astype(mx.bfloat16), mx.ones((16,))
    mx.eval(o, gate, gamma)

    def fused(backend):
        return lambda o, gamma, gate: fuse_heads(o, gamma, gate, eps=1e-6, backend=backend)

    def fused_gradient(backend):
        f = fused(backend)
        return mx.grad(lambda *a: f(*a).astype(mx.float32).square().sum(), argnums=(0, 1, 2))

    for name, form, passes in (("", fused, 3), (", forward and backward", fused_gradient, 8)):
        peers = {n: (form(b), (o, gamma, gate)) for n, b in (("ours", backend), ("ops", "ops"))}
        yield f"fuse_heads{name}", "T=2048 H=16 D=128", passes * o.nbytes, o.size, peers


def plot(rows, device, file) -> None:
    from matplotlib import pyplot as plt

    ratios = [
        (f"{row['operation']}\n{row['shape']}\nvs {peer}", t / row["seconds"][ours])
        for row in rows
        for ours in [next(iter(row["seconds"]))]
        for peer, t in row["seconds"].items()
        if peer != ours
    ]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(ratios)), layout="constrained")
    axes.barh([name for name, _ in ratios][::-1], [r for _, r in ratios][::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"times as fast as the peer, {device}")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--plot", type=Path, help="draw the ratios here; needs matplotlib")
    args = parser.parse_args()

    backend = kernels.gpu_backend()
    if backend is None:
        parser.error("the kernels need an Apple or NVIDIA GPU; none is here.")
    mx.random.seed(0)
    device = record.device()
    rates = next((r for name, r in DEVICES.items() if name in device), (math.nan, math.nan))
    rows = []
    table = Table("operation", "shape", "peer", "ms", "ours is", "floor ms")
    for operation, shape, moved, products, peers in cases(backend):
        times = {name: seconds(f, *a) for name, (f, a) in peers.items()}
        floor = max(moved / rates[0], products / rates[1])
        rows.append(
            {
                "operation": operation,
                "shape": shape,
                "seconds": times,
                "floor_seconds": None if math.isnan(floor) else floor,
                "bytes": moved,
                "products": products,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        ours = next(iter(times.values()))
        for name, t in times.items():
            ratio = "" if t == ours else f"{t / ours:.2f}x"
            table.add_row(operation, shape, name, f"{1e3 * t:.3f}", ratio, f"{1e3 * floor:.3f}")
            operation = shape = ""
        record.write(args.out, results=rows)
    Console(width=160).print(table)
    if args.plot is not None:
        plot(rows, device, args.plot)


if __name__ == "__main__":
    main()
