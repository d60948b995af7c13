"""What a HydraHead model is made of: its configuration, and which heads keep full attention."""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from mlx_lm.models.base import BaseModelArgs

MODEL_TYPE = "hydrahead"

# Where o_proj's columns and gamma stand: "full_first" in MLX checkpoints, "teacher" in PyTorch's.
HEAD_ORDERS = ("full_first", "teacher")

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)


def from_known_fields(cls, values: dict, where: str):
    """Build a dataclass from a dictionary; a ValueError names a field it does not have."""
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0) or known
            raise ValueError(f"{where}.{name} is not a field; did you mean {nearest[0]!r}?")
    return cls(**values)


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names the field, its value and what it should be."""
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}.")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def expect_switches(branch: Any, where: str) -> None:
    """The switches that both branches have are true or false."""
    for name in ("rope", "gate"):
        value = getattr(branch, name)
        expect(isinstance(value, bool), f"{where}.{name}", value, "true or false")


@dataclass(frozen=True)
class FullAttentionArgs:
    """Switches of the full-attention branch.

    rope: rotary embedding on q and k; the paper drops it.
    log_scale_base: a in s_t = log(t + a) / log(a), which multiplies the query at position t; None
        for no scaling.
    gate: an elementwise sigmoid gate on the head outputs.
    """

    rope: bool = False
    log_scale_base: Optional[float] = None
    gate: bool = True

    def __post_init__(self):
        expect_switches(self, "full_attention")
        a = self.log_scale_base
        holds = a is None or (is_number(a) and a > 1)
        expect(holds, "full_attention.log_scale_base", a, "a number over 1, or null for none")


@dataclass(frozen=True)
class LinearAttentionArgs:
    """Switches of the linear-attention branch.

    conv_kernel_size: taps of the short causal convolution; None for no convolution and no SiLU.
    rope: rotary embedding on q and k.
    gate: an elementwise SiLU gate on the head outputs.
    """

    kind: str = "gated_delta"
    conv_kernel_size: Optional[int] = 4
    rope: bool = True
    gate: bool = True

    def __post_init__(self):
        expect_switches(self, "linear_attention")
        expect(self.kind == "gated_delta", "linear_attention.kind", self.kind, "'gated_delta'")
        K = self.conv_kernel_size
        holds = K is None or (isinstance(K, int) and K >= 2)
        name = "linear_attention.conv_kernel_size"
        expect(holds, name, K, "an integer from 2 up, or null for no convolution")


@dataclass(frozen=True)
class FusionArgs:
    """How head outputs are brought together.

    norm: True for an RMSNorm on every head (the paper's), "linear" for the linear heads alone (so
        that full heads stay the teacher's own), False for none.
    """

    norm: Union[bool, str] = True
    eps: float = 1e-6

    def __post_init__(self):
        # Not by equality alone: 1 == True, and the model asks for True itself.
        holds = isinstance(self.norm, bool) or self.norm == "linear"
        expect(holds, "fusion.norm", self.norm, "true, false or 'linear'")
        expect(is_number(self.eps) and self.eps >= 0, "fusion.eps", self.eps, "a number from 0 up")


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer, by the teacher's numbers.

    full, linear: query heads of each branch, ascending.
    kv_heads: the teacher's KV heads that some full head reads, ascending; those are cached.
    kv_index: for each full head its place in kv_heads.
    """

    full: tuple[int, ...]
    linear: tuple[int, ...]
    kv_heads: tuple[int, ...]
    kv_index: tuple[int, ...]

    @classmethod
    def split(cls, full: Sequence[int], num_heads: int, num_kv_heads: int) -> "LayerHeads":
        full = tuple(sorted(full))
        group = num_heads // num_kv_heads
        kv_heads = tuple(sorted({h // group for h in full}))
        return cls(
            full=full,
            linear=tuple(h for h in range(num_heads) if h not in full),
            kv_heads=kv_heads,
            kv_index=tuple(kv_heads.index(h // group) for h in full),
        )

    @property
    def order(self) -> tuple[int, ...]:
        """The teacher's head at each place of an MLX checkpoint: full heads first."""
        return self.full + self.linear


@dataclass
class ModelArgs(BaseModelArgs):
    """Qwen3's configuration, and with it the heads and the switches of HydraHead.

    Raises:
        ValueError: a head out of range or named twice, no full head in the whole model, sizes
            that do not divide, a field that is not there or not of its kind.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    head_dim: int
    tie_word_embeddings: bool
    full_attention_heads: list[list[int]]
    rope_theta: Optional[float] = None
    rope_scaling: Optional[dict] = None
    rope_parameters: Optional[dict] = None
    attention_bias: bool = False
    head_order: str = "full_first"
    full_attention: Any = field(default_factory=FullAttentionArgs)
    linear_attention: Any = field(default_factory=LinearAttentionArgs)
    fusion: Any = field(default_factory=FusionArgs)

    @classmethod
    def from_dict(cls, params: dict) -> "ModelArgs":
        for f in fields(cls):
            if f.default is MISSING and f.default_factory is MISSING and f.name not in params:
                raise ValueError(f"{f.name} is missing from the model's config.")
        return super().from_dict(params)

    def __post_init__(self):
        for name in SIZES:
            size = getattr(self, name)
            holds = isinstance(size, int) and not isinstance(size, bool) and size > 0
            expect(holds, name, size, "an integer from 1 up")
        eps, tied = self.rms_norm_eps, self.tie_word_embeddings
        expect(is_number(eps) and eps >= 0, "rms_norm_eps", eps, "a number from 0 up")
        expect(isinstance(tied, bool), "tie_word_embeddings", tied, "true or false")
        for name in ("rope_scaling", "rope_parameters"):
            value = getattr(self, name)
            expect(value is None or isinstance(value, dict), name, value, "an object, or null")
        # transformers >= 5 nests rope_theta and rope_scaling under rope_parameters.
        if self.rope_parameters:
            if self.rope_theta is None:
                self.rope_theta = self.rope_parameters.get("rope_theta")
            if self.rope_scaling is None:
                self.rope_scaling = self.rope_parameters
        if self.rope_theta is None:
            raise ValueError("rope_theta is missing from the model's config.")
        theta = self.rope_theta
        expect(is_number(theta) and theta > 0, "rope_theta", theta, "a number over 0")
        if self.attention_bias:
            raise ValueError("attention_bias=true: HydraHead has no biases on q, k, v and o.")
        order = self.head_order
        expect(order in HEAD_ORDERS, "head_order", order, f"one of {', '.join(HEAD_ORDERS)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        for name, cls in (
            ("full_attention", FullAttentionArgs),
            ("linear_attention", LinearAttentionArgs),
            ("fusion", FusionArgs),
        ):
            if isinstance(value := getattr(self, name), dict):
                setattr(self, name, from_known_fields(cls, value, name))
            else:
                expect(isinstance(value, cls), name, value, "an object with its switches")
        check_heads(self.full_attention_heads, self.num_hidden_layers, self.num_attention_heads)

    def layer_heads(self, layer: int) -> LayerHeads:
        return LayerHeads.split(
            self.full_attention_heads[layer], self.num_attention_heads, self.num_key_value_heads
        )

    def is_fused(self, layer: int) -> bool:
        """Whether a layer has gamma: not where every head is full and no head is normed."""
        return self.fusion.norm is True or len(self.layer_heads(layer).linear) > 0


def check_heads(heads: Sequence[Sequence[int]], num_layers: int, num_heads: int) -> None:
    """Raise a ValueError unless ``heads`` names full heads for each layer of such a model."""
    if not isinstance(heads, (list, tuple)) or not all(
        isinstance(chosen, (list, tuple)) for chosen in heads
    ):
        raise ValueError(f"full_attention_heads={heads!r}: expected a list of heads a layer.")
    if len(heads) != num_layers:
        raise ValueError(
            f"full_attention_heads has {len(heads)} layers, the model has {num_layers}."
        )
    for layer, chosen in enumerate(heads):
        for head in chosen:
            if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < num_heads:
                raise ValueError(
                    f"full_attention_heads: layer {layer} names head {head!r}; "
                    f"heads go from 0 to {num_heads - 1}."
                )
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"full_attention_heads: layer {layer} names a head twice: {chosen}.")
    if not any(heads):
        raise ValueError("full_attention_heads is empty: at least one head must stay full.")


def load_heads(path: Union[str, Path], num_layers: int, num_heads: int) -> list[list[int]]:
    """Read the full-attention heads of each layer from a heads.json.

    The file holds ``{"num_layers", "num_heads", "full_attention_heads": [[...], ...]}`` and may
    hold how they were found (``method``, ``scores``).

    Raises:
        ValueError: not such a file, or made for a model of other sizes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--heads {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"--heads {path}: not JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("full_attention_heads"), list):
        raise ValueError(f"--heads {path}: expected an object with 'full_attention_heads'.")
    for name, expected in (("num_layers", num_layers), ("num_heads", num_heads)):
        if content.get(name, expected) != expected:
            raise ValueError(
                f"--heads {path}: made for another model: {name} is {content[name]}, "
                f"this model has {expected}."
            )
    heads = content["full_attention_heads"]
    try:
        check_heads(heads, num_layers, num_heads)
    except ValueError as error:
        raise ValueError(f"--heads {path}: {error}") from error
    return [sorted(chosen) for chosen in heads]


def spread_heads(
    ratio: float, num_layers: int, num_heads: int, num_kv_heads: int
) -> list[list[int]]:
    """Spread a share of all heads evenly over the layers, at least one a layer.

    Whole KV groups are filled first, so that no cached KV head serves fewer query heads than it
    could. The number of full heads is ``round(ratio * num_layers * num_heads)``, or one a layer
    where that is more; layers that take the remainder are spread evenly, and the group where a
    layer starts moves on from layer to layer.

    Raises:
        ValueError: the ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"--full-ratio {ratio}: expected a number over 0 and up to 1.")
    total = max(num_layers, round(ratio * num_layers * num_heads))
    group = num_heads // num_kv_heads
    heads = []
    for layer in range(num_layers):
        count = total * (layer + 1) // num_layers - total * layer // num_layers
        first = layer % num_kv_heads * group
        heads.append(sorted((first + i) % num_heads for i in range(count)))
    return heads
