"""How many kernels a decode step starts, layer by layer: HydraHead's and mlx-lm's dense Qwen3.

Counts the primitives of the graph that a layer builds for one token, on any machine: nothing is
run. Views (reshapes, slices, transposes, broadcasts) start no kernel. What MLX runs as one kernel
on a GPU counts as one: its fast operations, and functions that it compiles.

    python benchmarks/dispatches.py [--full-heads 0 1] [--json]
"""

import argparse
import contextlib
import json
import os
from collections import Counter
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache

from mlx_hydra import kernels
from mlx_hydra.models import hydrahead, side_by_side
from mlx_hydra.models.cache import full_part, linear_part, make_cache
from mlx_hydra.models.compiled_step import traceable
from mlx_hydra.models.hydrahead import HydraHeadModel, ModelArgs, is_ours

VIEWS = {
    *("Broadcast", "BroadcastAxes", "AsStrided", "ExpandDims", "Squeeze", "Flatten", "Unflatten"),
    *("Reshape", "Transpose", "Slice", "Split", "Depends", "CustomTransforms", "StopGradient"),
    *("Contiguous", "View"),
}

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 16, 8, 64, 128


def settings(full_heads: list[int]) -> dict:
    """Qwen3-1.7B's layer in small: the count does not depend on its width."""
    return {
        "model_type": "hydrahead",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 64,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        # The first layer is counted; the second is there since some head must be full.
        "full_attention_heads": [full_heads, [0]],
        "full_attention": {"rope": False, "log_scale_base": 1000, "gate": True},
    }


def marker(name: str):
    """A stand-in for a function that is one kernel on a GPU: its output is like its input."""

    def call(x, *arguments, **_):
        inputs = [x, *(y for y in arguments if isinstance(y, mx.array))]
        kernel = mx.fast.metal_kernel(
            name=name,
            input_names=[f"x{i}" for i in range(len(inputs))],
            output_names=["y"],
            source="",
        )
        return kernel(
            inputs=inputs,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    return call


class Undifferentiable:
    """mx.custom_function without its gradient, which the export of a graph does not know."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def vjp(self, function):
        return function


@contextlib.contextmanager
def as_on_a_gpu(backend: str):
    """Build graphs as Metal would get them."""
    patches = [
        mock.patch.object(mx.fast, "rms_norm", marker("rms_norm")),
        mock.patch.object(mx.fast, "rope", marker("rope")),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", marker("attention")),
        # What is contiguous already it leaves alone, as it finds all of this; no export knows it.
        mock.patch.object(mx, "contiguous", lambda x: x),
        mock.patch.object(mx, "custom_function", Undifferentiable),
        mock.patch.object(nn, "silu", marker("silu")),
        mock.patch.object(nn, "softplus", marker("softplus")),
        mock.patch.object(qwen3, "swiglu", marker("swiglu")),
        mock.patch.object(hydrahead, "swiglu", marker("swiglu")),
        mock.patch.object(side_by_side, "swiglu", marker("swiglu")),
        mock.patch.object(kernels, "gpu_backend", lambda: "metal"),
        mock.patch.object(hydrahead, "runs_on_gpu", lambda: True),
        mock.patch.dict(os.environ, {"MLX_HYDRA_BACKEND": backend}),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        kernels.cache_clear()
        yield
    kernels.cache_clear()


def count(step, x: mx.array) -> tuple[Counter, int]:
    """The kernels that a function of x starts, by name, and how many views it takes."""
    started, views = Counter(), 0

    def see(node):
        nonlocal views
        if node["type"] != "primitive":
            return
        name = node["name"]
        if name == "CustomKernel":
            name = node["arguments"][0].removeprefix("custom_kernel_").removeprefix("mlx_hydra_")
            name = name.partition("_float")[0].rstrip("_0123456789")
        if name in VIEWS:
            views += 1
        else:
            started[name] += 1

    mx.export_function(see, step, x)
    return started, views


def hydrahead_layer(full_heads: list[int], backend: str) -> tuple[Counter, int]:
    """One decode step of a layer with these full heads."""
    args = ModelArgs.from_dict(settings(full_heads))
    model = HydraHeadModel(args)
    mx.eval(model.eval().state)
    cache = make_cache(args)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache), [c.state for c in cache])
    layer, own = model.layers[0], cache[0]

    def step(x):
        y = layer(x, None, None, own, 3)
        kv, states = full_part(own), linear_part(own)
        kept = [] if kv is None else [kv.keys, kv.values]
        return y, *kept, *([] if states is None else states.cache)

    with as_on_a_gpu(backend):
        return count(step, mx.zeros((1, 1, HIDDEN)))


def compiled_layer(full_heads: list[int], backend: str) -> tuple[Counter, int]:
    """What a further layer adds to a compiled decode step.

    Not yet fused: mx.compile makes one kernel of several elementwise operations.
    """
    args = ModelArgs.from_dict(
        settings(full_heads) | {"num_hidden_layers": 3, "full_attention_heads": [full_heads] * 3}
    )
    model = HydraHeadModel(args)
    mx.eval(model.eval().state)
    cache = make_cache(args)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache), [c.state for c in cache])
    kv = full_part(cache[0])
    arrays = [
        ((full_part(c).keys, full_part(c).values), tuple(linear_part(c).cache)) for c in cache
    ]

    def upto(layers):
        def step(x):
            y, left = traceable(model.layers[:layers], is_ours)(x, where, arrays[:layers])
            return [y, *(array for parts in left for part in parts for array in part)]

        return count(step, mx.zeros((1, 1, HIDDEN)))

    where = [mx.array([3])]
    if backend == "ops":
        where.append(mx.zeros((1, 1, 1, kv.keys.shape[2]), mx.bool_))
    with as_on_a_gpu(backend):
        (fewer, few_views), (more, more_views) = upto(2), upto(3)
    return more - fewer, more_views - few_views


def dense_layer() -> tuple[Counter, int]:
    """One decode step of a layer of mlx-lm's Qwen3."""
    known = qwen3.ModelArgs.__dataclass_fields__
    values = {k: v for k, v in settings([0]).items() if k in known} | {"model_type": "qwen3"}
    model = qwen3.Qwen3Model(qwen3.ModelArgs.from_dict(values))
    mx.eval(model.parameters())
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache), [c.state for c in cache])

    def step(x):
        y = model.layers[0](x, None, cache[0])
        return y, cache[0].keys, cache[0].values

    with as_on_a_gpu("metal"):
        return count(step, mx.zeros((1, 1, HIDDEN)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full-heads", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    mixed, every = options.full_heads, list(range(HEADS))
    rows = {
        "dense Qwen3 of mlx-lm": dense_layer(),
        f"{len(mixed)} full heads of {HEADS}, kernels": hydrahead_layer(mixed, "metal"),
        f"{len(mixed)} full heads of {HEADS}, kernels, compiled": compiled_layer(mixed, "metal"),
        f"{len(mixed)} full heads of {HEADS}, ops": hydrahead_layer(mixed, "ops"),
        f"{len(mixed)} full heads of {HEADS}, ops, compiled": compiled_layer(mixed, "ops"),
        "linear heads alone, kernels": hydrahead_layer([], "metal"),
        "linear heads alone, ops": hydrahead_layer([], "ops"),
        "full heads alone, kernels": hydrahead_layer(every, "metal"),
        "full heads alone, ops": hydrahead_layer(every, "ops"),
    }
    if options.json:
        table = {
            name: {"dispatches": started.total(), "views": views, "by_name": dict(started)}
            for name, (started, views) in rows.items()
        }
        print(json.dumps(table, indent=2))
        return
    print("| a layer, one token | dispatches | views | what |")
    print("|---|---|---|---|")
    for name, (started, views) in rows.items():
        parts = ", ".join(f"{n} {kind}" for kind, n in started.most_common())
        print(f"| {name} | {sum(started.values())} | {views} | {parts} |")


if __name__ == "__main__":
    main()
