"""Turn a Qwen3 checkpoint into a HydraHead one: each head keeps the weights that it had.

The recipes and the starting values of what Qwen3 does not have are choices of this project;
docs/checkpoints.md gives the reasons.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Optional

import mlx.core as mx

from ..config import MODEL_TYPE, ModelArgs
from .calibrate import Calibration
from .names import AS_IT_IS, SHIM, copy, layer_of, layout, reorder_columns
from .plan import Step

LINEAR = {"kind": "gated_delta", "conv_kernel_size": 4, "rope": True, "gate": True}
RECIPES = {
    # The paper's layer.
    "paper": {
        "full_attention": {"rope": False, "log_scale_base": 512, "gate": True},
        "linear_attention": LINEAR,
        "fusion": {"norm": True},
    },
    # Full heads are the teacher's own, to the bit.
    "exact": {
        "full_attention": {"rope": True, "log_scale_base": None, "gate": False},
        "linear_attention": LINEAR,
        "fusion": {"norm": "linear"},
    },
}

# The gates start at about 1: sigmoid(4) = 0.98, silu(1.278...) = 1.
FULL_GATE_BIAS = 4.0
LINEAR_GATE_BIAS = 1.278464542761074

# Ranges that Gated DeltaNet and Mamba-2 draw A and the step size from.
A_RANGE = (1.0, 16.0)
DT_RANGE = (1e-3, 1e-1)

# Fields of Qwen3's config that say which layers slide, and code that is not carried along.
DROPPED_FIELDS = (
    "_name_or_path",
    "auto_map",
    "layer_types",
    "max_window_layers",
    "sliding_window",
    "use_sliding_window",
)


def check_teacher(config: dict) -> None:
    """Raise a ValueError for a Qwen3 config that HydraHead cannot express."""
    layer_types = config.get("layer_types") or ()
    if config.get("use_sliding_window") or set(layer_types) - {"full_attention"}:
        raise ValueError(
            "use_sliding_window=true: HydraHead's full heads see everything before them; expected "
            "a Qwen3 model without sliding windows."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={config['hidden_act']!r}: expected 'silu'.")


def migrated_config(config: dict, heads: list[list[int]], recipe: str) -> dict:
    """The HydraHead config: Qwen3's own fields, the heads, and the switches of a recipe."""
    switches = RECIPES[recipe]
    kept = {name: value for name, value in config.items() if name not in DROPPED_FIELDS}
    return {
        **kept,
        **switches,
        "fusion": {**switches["fusion"], "eps": config.get("rms_norm_eps")},
        "model_type": MODEL_TYPE,
        "architectures": ["HydraHeadForCausalLM"],
        "model_file": SHIM,
        "head_order": "full_first",
        "full_attention_heads": heads,
    }


def migrate(args: ModelArgs, calibration: Optional[Calibration] = None) -> list[Step]:
    """Plan how each tensor of a HydraHead model comes from Qwen3's."""
    steps = []
    for target, shape in layout(args).items():
        before, attention, name = target.partition(".self_attn.")
        if attention:
            layer = LayerMigration(args, layer_of(target), before + attention, calibration)
            steps.append(layer.step(target, name, shape))
        else:
            steps.append(Step(target, shape, {target: shape}, copy, AS_IT_IS))
    return steps


class LayerMigration:
    """How the tensors of one attention layer are made."""

    def __init__(
        self, args: ModelArgs, layer: int, prefix: str, calibration: Optional[Calibration]
    ):
        self.args, self.layer, self.prefix, self.calibration = args, layer, prefix, calibration
        self.heads = args.layer_heads(layer)

    def step(self, target: str, name: str, shape: tuple[int, ...]) -> Step:
        """How ``target`` is made; ``name`` is the part after ``self_attn.``."""
        full, linear = self.heads.full, self.heads.linear
        num_heads, num_kv_heads = self.args.num_attention_heads, self.args.num_key_value_heads

        def rows(source, chosen, count, kind):
            """Rows of the chosen heads of a projection that has ``count`` of them."""
            size = self.args.head_dim
            return Step(
                target,
                shape,
                {f"{self.prefix}{source}.weight": (count * size, self.args.hidden_size)},
                lambda x: x.reshape(count, size, -1)[mx.array(chosen)].reshape(shape),
                f"rows of {kind} {in_words(chosen)}",
            )

        def new(make, what):
            return Step(target, shape, {}, make, what, like=f"{self.prefix}q_proj.weight")

        def new_float32(make, what):
            return Step(target, shape, {}, make, what, dtype=mx.float32)

        match name.split("."):
            case ["full", "q_proj", _]:
                return rows("q_proj", full, num_heads, "heads")
            case ["full", "k_proj" | "v_proj" as source, _]:
                return rows(source, self.heads.kv_heads, num_kv_heads, "KV heads")
            case ["linear", "q_proj", _]:
                return rows("q_proj", linear, num_heads, "heads")
            case ["linear", "k_proj" | "v_proj" as source, _]:
                read = [head // (num_heads // num_kv_heads) for head in linear]
                return rows(source, read, num_kv_heads, "KV heads")
            case [_, "q_norm" | "k_norm" as source, _]:
                return Step(target, shape, {f"{self.prefix}{source}.weight": shape}, copy, AS_IT_IS)
            case ["o_proj", _]:
                order = self.heads.order
                make = partial(reorder_columns, order=order)
                what = f"columns of heads {in_words(order)}"
                return Step(target, shape, {target: shape}, make, what)
            case ["linear", "a_proj" | "b_proj", _] | [_, "g_proj", "weight"]:
                return new(lambda: mx.zeros(shape), "new: 0")
            case ["full", "g_proj", "bias"]:
                return new(lambda: mx.full(shape, FULL_GATE_BIAS), "new: the gate starts at 0.98")
            case ["linear", "g_proj", "bias"]:
                return new(lambda: mx.full(shape, LINEAR_GATE_BIAS), "new: the gate starts at 1")
            case ["linear", "q_conv1d" | "k_conv1d" | "v_conv1d", _]:
                return new(lambda: identity_taps(shape), "new: the last tap is 1")
            case ["linear", "A_log"]:
                return new_float32(lambda: mx.log(spread_decay(*shape)), "new: A spread over heads")
            case ["linear", "dt_bias"]:
                return new_float32(
                    lambda: inverse_softplus(spread_step_sizes(*shape)),
                    "new: step sizes spread over heads",
                )
            case ["fusion", "gamma"]:
                if self.calibration is None:
                    return new_float32(lambda: mx.ones(shape), "new: 1")
                return new_float32(self._calibrated_gamma, "new: RMS of the teacher's heads")
        raise LookupError(f"no rule for {target}")

    def _calibrated_gamma(self) -> mx.array:
        """The RMS of the teacher's outputs for the heads that are normed, 1 for the others."""
        rms = self.calibration.head_rms[self.layer]
        normed = self.heads.order if self.args.fusion.norm is True else self.heads.linear
        return mx.array([rms[head] if head in normed else 1.0 for head in self.heads.order])


def identity_taps(shape: tuple[int, ...]) -> mx.array:
    """Weights ``[C, K, 1]`` of a causal convolution that gives its input back."""
    taps = mx.zeros(shape)
    taps[:, -1] = 1
    return taps


def spread_decay(num_heads: int) -> mx.array:
    """A of each head, float32: even over its range, rising from head to head."""
    low, high = A_RANGE
    return low + (high - low) * (mx.arange(num_heads) + 0.5) / num_heads


def spread_step_sizes(num_heads: int) -> mx.array:
    """The step size of each head, float32: even in its logarithm.

    Neighbours, which share the teacher's keys and values, get sizes far apart: the places follow
    the golden ratio.
    """
    golden = [head * (math.sqrt(5) - 1) / 2 % 1 for head in range(num_heads)]
    place = mx.array([sorted(golden).index(g) for g in golden])
    low, high = (math.log(bound) for bound in DT_RANGE)
    return mx.exp(low + (high - low) * (place + 0.5) / num_heads)


def inverse_softplus(x: mx.array) -> mx.array:
    return x + mx.log(-mx.expm1(-x))


def in_words(heads: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2, 5"``, ``[0, 0, 1]`` as ``"0 (2 times), 1"``."""
    runs = []
    for head, times in Counter(heads).items():
        if runs and times == 1 and runs[-1][1:] == (head - 1, 1):
            runs[-1] = (runs[-1][0], head, 1)
        else:
            runs.append((head, head, times))
    return ", ".join(
        (f"{first}" if first == last else f"{first}-{last}")
        + (f" ({times} times)" if times > 1 else "")
        for first, last, times in runs
    )
