"""What tests of and in the simulator share."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from .kernel import Kernel

TYPES = [mx.float32, mx.float16, mx.bfloat16]
ULP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


def evaluate(expressions, inputs, dtype=mx.float32, n=64, header="", before=""):
    """[len(expressions), n]: the value of each expression in each of n threads, as float."""
    lines = "\n".join(f"out[{r} * {n} + i] = float({e});" for r, e in enumerate(expressions))
    kernel = Kernel(
        "f",
        list(inputs),
        ["out"],
        source=f"uint i = thread_position_in_grid.x;\n{before}\n{lines}",
        header=header,
    )
    (out,) = kernel(
        inputs=list(inputs.values()),
        template=[("T", dtype)],
        grid=(n, 1, 1),
        threadgroup=(n, 1, 1),
        output_shapes=[(len(expressions), n)],
        output_dtypes=[mx.float32],
    )
    return np.array(out).astype(np.float64)


def to_float(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def apple(file, **constants):
    """A header of MLX's, with its function constants given or zero."""
    folder = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
    text = (folder / file).read_text().replace("#pragma once", "")
    return re.sub(
        r"^constant (\w+) (\w+)\s*\[\[function_constant\(\d+\)\]\];",
        lambda m: f"constant {m[1]} {m[2]} = {int(constants.get(m[2], 0))};",
        text,
        flags=re.MULTILINE,
    )


class AppleGatedDelta:
    """Apple's kernels of the gated delta rule: ``gated_delta_fused_chunk``, ``gated_delta_seq``."""

    def __init__(self, name):
        self.is_chunk = name == "gated_delta_fused_chunk"
        self.kernel = Kernel(
            name,
            ["q", "k", "v", "state", "g", "beta", "T"],
            ["y", "state_out"],
            header=apple("gated_delta_update.h"),
            source=f"""
                {name}<InT, D, D, H, H, 8>(q, k, v, state, g, beta, y, state_out, T,
                    {"" if self.is_chunk else "(device float*)nullptr,"} thread_position_in_grid,
                    thread_position_in_threadgroup, thread_index_in_simdgroup);
            """,
        )

    def __call__(self, q, k, v, g, beta, state):
        """y and the new state; all but the state in q's dtype, Dk equal to Dv."""
        _, T, H, D = q.shape
        return self.kernel(
            inputs=[q, k, v, state, g, beta, T],
            template=[("InT", q.dtype), ("D", D), ("H", H)],
            grid=(32, D // 8 if self.is_chunk else D, H),
            threadgroup=(32, 4, 1),
            output_shapes=[v.shape, state.shape],
            output_dtypes=[q.dtype, mx.float32],
        )

    @property
    def counters(self):
        return self.kernel.counters
