"""What a long run needs in memory, before it starts, against what the machine has."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from .cli import ArgumentParser, command
from .config import MODEL_TYPE, LayerHeads, ModelArgs
from .loading import find_model, read_config, weight_sizes
from .ops.gated_delta import CHUNK
from .ops.head_attention import FUSED_HEAD_DIMS, SCORE_BYTES

# Model types whose layers are all a softmax attention and a gated MLP, without a window.
DENSE_TYPES = ("qwen3", "qwen2", "llama")

DENSE_SIZES = (
    "num_attention_heads",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)

# KVCache and QuantizedKVCache grow by so many tokens.
CACHE_STEP = 256

KV_BITS = (4, 8)
KV_GROUP_SIZES = (64, 32)

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Plan:
    """Bytes that a run needs at its largest, with ``tokens`` read and written.

    prefill: what a prefill step needs beside the rest.
    """

    tokens: int
    weights: int
    full_attention_cache: int
    linear_attention_state: int
    prefill: int

    @property
    def total(self) -> int:
        return self.weights + self.full_attention_cache + self.linear_attention_state + self.prefill


@dataclass(frozen=True)
class Planner:
    """The sizes of a model and how it is run.

    weights: bytes of the weights in memory.
    activation: bytes of one number of the activations.
    step: tokens of a prefill step.
    kv_bits: bits of quantised keys and values; None for plain ones.
    conv_inputs: inputs that a short convolution keeps for each of its channels.
    in_blocks: whether attention goes through blocks of queries where no fused kernel applies.
    """

    layers: Sequence[LayerHeads]
    hidden: int
    intermediate: int
    vocabulary: int
    head_dim: int
    weights: int
    activation: int
    step: int
    kv_bits: Optional[int] = None
    conv_inputs: int = 0
    in_blocks: bool = False

    @classmethod
    def for_model(
        cls, config: dict, weights: int, activation: int, step: int, kv_bits: Optional[int] = None
    ) -> Optional["Planner"]:
        """The planner of a model, or None for one whose memory is not known here."""
        run = {"weights": weights, "activation": activation, "step": step, "kv_bits": kv_bits}
        if config["model_type"] == MODEL_TYPE:
            args = ModelArgs.from_dict(config)
            layers = [args.layer_heads(layer) for layer in range(args.num_hidden_layers)]
            taps = args.linear_attention.conv_kernel_size or 1
            run |= {"conv_inputs": taps - 1, "in_blocks": True}
        elif config["model_type"] in DENSE_TYPES and not config.get("use_sliding_window"):
            for name in DENSE_SIZES:
                if name not in config:
                    raise ValueError(f"config.json lacks {name}, which this model type needs.")
            heads = config["num_attention_heads"]
            kv_heads = config.get("num_key_value_heads") or heads
            all_full = LayerHeads.split(range(heads), heads, kv_heads)
            layers = [all_full] * config["num_hidden_layers"]
        else:
            return None
        return cls(
            layers=layers,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            head_dim=head_dim(config),
            **run,
        )

    def plan(self, tokens: int) -> Plan:
        """What a run needs whose prompt and answer have so many tokens together."""
        return Plan(
            tokens=tokens,
            weights=self.weights,
            full_attention_cache=sum(self._kv_bytes(layer, tokens) for layer in self.layers),
            linear_attention_state=sum(map(self._state_bytes, self.layers)),
            prefill=self._prefill_bytes(tokens),
        )

    def largest_context(self, memory: int) -> int:
        """The most tokens, of prompt and answer together, whose plan is within ``memory``."""
        fits, too_many = 0, 1
        while self.plan(too_many).total <= memory and too_many < 1 << 40:
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.plan(middle).total <= memory:
                fits = middle
            else:
                too_many = middle
        return fits

    def check(self, tokens: int, memory: int) -> None:
        """Raise a ValueError if a run does not fit into ``memory``, with what would."""
        need = self.plan(tokens).total
        if need <= memory:
            return
        largest = self.largest_context(memory)
        smaller = []
        if self.kv_bits != KV_BITS[0] and self.head_dim % KV_GROUP_SIZES[-1] == 0:
            smaller.append(f"--kv-bits {KV_BITS[0]}")
        if self.step > CACHE_STEP:
            smaller.append(f"--prefill-step-size {CACHE_STEP}")
        advice = f"; {' or '.join(smaller)} needs less" if smaller else ""
        raise ValueError(
            f"{tokens:,} tokens need {in_bytes(need)}, {in_bytes(memory)} are there: "
            f"the largest context that fits is {largest:,} tokens{advice}."
        )

    def _kv_bytes(self, layer: LayerHeads, tokens: int) -> int:
        if not layer.kv_heads:
            return 0
        numbers = 2 * len(layer.kv_heads) * self.head_dim * (tokens + CACHE_STEP)
        if self.kv_bits is None:
            return numbers * self.activation
        groups = numbers // kv_group_size(self.head_dim)
        return numbers * self.kv_bits // 8 + 2 * groups * self.activation

    def _state_bytes(self, layer: LayerHeads) -> int:
        channels = len(layer.linear) * self.head_dim
        return 4 * channels * self.head_dim + 3 * channels * self.conv_inputs * self.activation

    def _prefill_bytes(self, tokens: int) -> int:
        """An upper estimate: MLX holds what the next operations need beside what the last left.

        The factors are counted from the code and set by measured peaks; tests compare the two.
        """
        step = min(self.step, tokens)
        # Of the last layer a step needs what is kept, and not what it gives.
        *layers, last = self.layers
        of_layers = [self._layer_bytes(layer, step, tokens) for layer in layers]
        of_layers.append(step * self._linear_bytes(last))
        growing = max(self._kv_bytes(layer, tokens) for layer in self.layers)
        logits = 3 * 4 * self.vocabulary
        return max(of_layers) + growing + logits

    def _layer_bytes(self, layer: LayerHeads, step: int, tokens: int) -> int:
        linear = step * self._linear_bytes(layer)
        full = step * self._full_bytes(layer) + self._score_bytes(layer, step, tokens)
        fusing_and_mlp = step * (7 * self.hidden + 2 * self.intermediate) * self.activation
        # One branch starts before all of the other is freed.
        return max(linear, full) + min(linear, full) // 2 + fusing_and_mlp

    def _linear_bytes(self, layer: LayerHeads) -> int:
        """A token's share in the branch of linear heads: its inputs, or the delta rule's chunks."""
        heads, channels = len(layer.linear), len(layer.linear) * self.head_dim
        convolution = 26 * channels * self.activation
        delta_rule = 4 * (6 * CHUNK * heads + 15 * channels)
        return max(convolution, delta_rule)

    def _full_bytes(self, layer: LayerHeads) -> int:
        channels = (8 * len(layer.full) + 2 * len(layer.kv_heads)) * self.head_dim
        return channels * self.activation

    def _score_bytes(self, layer: LayerHeads, step: int, tokens: int) -> int:
        """Attention scores, where MLX writes them to memory."""
        if not layer.full:
            return 0
        gpu = mx.default_device() == mx.gpu and self.kv_bits is None
        if gpu and self.activation == 2 and self.head_dim in FUSED_HEAD_DIMS:
            return 0
        row = len(layer.full) * tokens * self.activation
        if not self.in_blocks:
            return step * row
        # MLX is up to four arrays ahead of what it has freed.
        return min(step * row, 4 * max(16 * row, SCORE_BYTES))


def head_dim(config: dict) -> int:
    """The size of a head.

    Raises:
        ValueError: the configuration does not tell.
    """
    sizes = config.get("text_config", config)
    if sizes.get("head_dim"):
        return sizes["head_dim"]
    if "hidden_size" in sizes and "num_attention_heads" in sizes:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    raise ValueError("--kv-bits: the config of this model does not tell its head_dim.")


def kv_group_size(dim: int) -> int:
    """The group size in which keys and values of a head are quantised.

    Raises:
        ValueError: MLX has none for this size of a head.
    """
    for size in KV_GROUP_SIZES:
        if dim % size == 0:
            return size
    raise ValueError(
        f"--kv-bits: this model's head_dim={dim} is not a multiple of 32, so its keys and values "
        "cannot be quantised; leave --kv-bits out."
    )


def default_step() -> int:
    """Tokens of a prefill step: mlx-lm's 2048, fewer on a CPU, where 512 measured fastest."""
    return 512 if mx.default_device() == mx.cpu else 2048


def machine_memory() -> int:
    """Bytes that a run may take: what the GPU recommends or has, or what the system has free."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        for name in ("max_recommended_working_set_size", "free_memory", "total_memory"):
            if info.get(name):
                return info[name]
    if not MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    try:
        limit, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):
        # No container, or one without a limit ("max").
        return available


def in_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def table(planner: Planner, token_counts: Sequence[int], memory: int) -> Table:
    """A column for each number of tokens, a row for each part of its plan."""
    plans = [planner.plan(tokens) for tokens in token_counts]
    built = Table(title="Memory of a run")
    built.add_column("")
    for plan in plans:
        built.add_column(f"{plan.tokens:,} tokens", justify="right")
    for label, name in (
        ("weights", "weights"),
        ("full-attention cache", "full_attention_cache"),
        ("linear-attention state", "linear_attention_state"),
        (f"prefill in steps of {planner.step:,}", "prefill"),
        ("together", "total"),
    ):
        built.add_row(label, *(in_bytes(getattr(plan, name)) for plan in plans))
    built.add_row(
        f"fits into {in_bytes(memory)}",
        *("yes" if plan.total <= memory else "no" for plan in plans),
    )
    return built


def show_plan(planner: Optional[Planner], token_counts: Sequence[int], as_json: bool) -> None:
    """Print what runs of so many tokens need, as a table or as a line of JSON for each.

    Raises:
        ValueError: the memory of this type of model is not known.
    """
    if planner is None:
        raise ValueError(
            f"No plan for this model type: it is known for {MODEL_TYPE}, {', '.join(DENSE_TYPES)}."
        )
    memory = machine_memory()
    if not as_json:
        Console().print(table(planner, token_counts, memory))
        print(f"The largest context that fits is {planner.largest_context(memory):,} tokens.")
        return
    found = {"memory": memory, "largest_context": planner.largest_context(memory)}
    for tokens in token_counts:
        plan = planner.plan(tokens)
        print(json.dumps({**asdict(plan), "total": plan.total, **found}))


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = ArgumentParser(description="What a run needs in memory.")
    parser.add_argument("--model", required=True, help="model folder or hub repository")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[8_192, 32_768, 131_072],
        help="tokens of prompt and answer together (default: 8192 32768 131072)",
    )
    parser.add_argument("--adapter-path", help="folder of trained adapters")
    parser.add_argument("--prefill-step-size", type=int, default=default_step())
    parser.add_argument("--kv-bits", type=int, choices=KV_BITS, help="quantised keys and values")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each of --tokens")
    args = parser.parse_args(argv)
    for name, values in (
        ("--tokens", args.tokens),
        ("--prefill-step-size", [args.prefill_step_size]),
    ):
        if min(values) < 1:
            raise ValueError(f"{name} {min(values)}: expected 1 or more.")
    path = find_model(args.model)
    planner = Planner.for_model(
        read_config(path),
        *weight_sizes(path, args.adapter_path),
        args.prefill_step_size,
        args.kv_bits,
    )
    show_plan(planner, args.tokens, args.json)
