"""HydraHead's tensors under PyTorch and under MLX: names, shapes and the order of heads.

Both use the same names. docs/checkpoints.md tells how the contents differ.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Optional

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import ModelArgs
from ..models.hydrahead import Model, may_cast
from .plan import Step
from .reader import CheckpointReader

SHIM = "hydrahead.py"
AS_IT_IS = "as it is"

LAYER = re.compile(r"model\.layers\.(\d+)\.")

# Other names that PyTorch checkpoints may use. The module names of a branch are also those of
# flash-linear-attention and of transformers' hybrid models.
LINEAR_BRANCH = r"(?:linear_attn|linear_attention|gated_deltanet|gated_delta_net|gdn)"
FULL_BRANCH = r"(?:full_attn|full_attention|softmax_attn)"
ALIASES = (
    (rf"(layers\.\d+)\.(?:(?:self_)?attn\.)?{LINEAR_BRANCH}\.", r"\1.self_attn.linear."),
    (rf"(layers\.\d+)\.(?:(?:self_)?attn\.)?{FULL_BRANCH}\.", r"\1.self_attn.full."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
)

# flash-linear-attention's GatedDeltaNet has no norm weights on q and k, as its L2 norm comes next,
# and no bias on its gate. These values say the same.
FILLS = {"q_norm.weight": 1.0, "k_norm.weight": 1.0, "g_proj.bias": 0.0}


def swap_last_axes(x: mx.array, order: Sequence[int]) -> mx.array:
    return x.swapaxes(-1, -2)


def reorder_columns(x: mx.array, order: Sequence[int]) -> mx.array:
    """``[out, heads * D]`` with the blocks of columns in another order."""
    return x.reshape(len(x), len(order), -1)[:, mx.array(order)].reshape(x.shape)


def reorder(x: mx.array, order: Sequence[int]) -> mx.array:
    return x[mx.array(order)]


# What differs between PyTorch and MLX, by the end of a tensor's name; the rest is the same.
TRANSFORMS: dict[str, tuple[Callable[[mx.array, Sequence[int]], mx.array], str]] = {
    "_conv1d.weight": (swap_last_axes, "taps and input channel swapped"),
    "self_attn.o_proj.weight": (reorder_columns, "columns of heads reordered"),
    "fusion.gamma": (reorder, "heads reordered"),
}


def layout(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The tensors of an MLX checkpoint and their shapes."""
    return {name: array.shape for name, array in tree_flatten(Model(args).parameters())}


def pytorch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under PyTorch of a tensor of ``layout``: ``[C, K, 1]`` is ``[C, 1, K]`` there."""
    return (shape[0], shape[2], shape[1]) if name.endswith("_conv1d.weight") else shape


def canonical(name: str) -> str:
    """The name that the table above gives to a tensor of a PyTorch checkpoint."""
    for pattern, replacement in ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def to_mlx(reader: CheckpointReader, args: ModelArgs) -> list[Step]:
    """Plan the way from PyTorch's layout (heads in the teacher's order) to MLX's (full first).

    Raises:
        ValueError: two names for one tensor, or an output norm that the config does not have.
    """
    found = {}
    for name in reader.tensors:
        if (twin := found.setdefault(canonical(name), name)) != name:
            raise ValueError(f"{reader.folder}: {twin} and {name} are names of the same tensor.")

    steps = []
    for target, shape in layout(args).items():
        step = filled(target, shape, found)
        if step is None:
            make, what = transform(target, args)
            source = found.get(target, target)
            step = Step(target, shape, {source: pytorch_shape(target, shape)}, make, what)
        if target.endswith("self_attn.o_proj.weight"):
            step = with_output_norm(step, found, args)
        if not may_cast(target):
            step = replace(step, dtype=mx.float32)
        steps.append(step)
    return steps


def to_pytorch(args: ModelArgs) -> list[Step]:
    """Plan the way from MLX's layout to PyTorch's; the inverse of ``to_mlx``, to the byte."""
    steps = []
    for target, shape in layout(args).items():
        make, what = transform(target, args, inverse=True)
        steps.append(Step(target, pytorch_shape(target, shape), {target: shape}, make, what))
    return steps


def mlx_config(config: dict) -> dict:
    """The config of an MLX checkpoint, from PyTorch's."""
    # auto_map names Python files of the source, which are never carried along.
    config = {name: value for name, value in config.items() if name != "auto_map"}
    return {**config, "head_order": "full_first", "model_file": SHIM}


def pytorch_config(config: dict) -> dict:
    """The config of a PyTorch checkpoint, from MLX's."""
    config = {name: value for name, value in config.items() if name != "model_file"}
    return {**config, "head_order": "teacher"}


def transform(target: str, args: ModelArgs, *, inverse: bool = False):
    """What turns PyTorch's tensor into MLX's, or MLX's into PyTorch's, and the same in words."""
    for ending, (function, what) in TRANSFORMS.items():
        if target.endswith(ending):
            order = args.layer_heads(layer_of(target)).order
            if inverse:
                order = tuple(order.index(head) for head in range(len(order)))
            return partial(function, order=order), what
    return copy, AS_IT_IS


def copy(x: mx.array) -> mx.array:
    return x


def layer_of(name: str) -> int:
    return int(LAYER.match(name)[1])


def filled(target: str, shape: tuple[int, ...], found: dict[str, str]) -> Optional[Step]:
    """A step for a tensor that flash-linear-attention's layer does without; None for any other."""
    prefix, _, parameter = target.partition(".linear.")
    q_proj = found.get(f"{prefix}.linear.q_proj.weight", "")
    if target in found or parameter not in FILLS or not re.search(rf"\.{LINEAR_BRANCH}\.", q_proj):
        return None
    value = FILLS[parameter]
    what = f"{value:g}, which this form of the layer implies"
    return Step(target, shape, {}, lambda: mx.full(shape, value), what, like=q_proj)


def with_output_norm(step: Step, found: dict[str, str], args: ModelArgs) -> Step:
    """Fold the weight ``[D]`` of the linear heads' output norm, if any, into columns of o_proj.

    Raises:
        ValueError: there is one, but the config has no norm there.
    """
    norm = found.get(step.target.replace("o_proj.weight", "linear.o_norm.weight"))
    num_linear = len(args.layer_heads(layer_of(step.target)).linear)
    if norm is None or num_linear == 0:
        return step
    if not args.fusion.norm:
        raise ValueError(f"{norm} is there, but fusion.norm is false: expected true or 'linear'.")

    def make(o_proj, weight):
        o_proj = step.make(o_proj)
        ones = mx.ones(o_proj.shape[1] - num_linear * len(weight), weight.dtype)
        scale = mx.concatenate([ones, mx.tile(weight, num_linear)])
        return (o_proj * scale).astype(o_proj.dtype)

    sources = {**step.sources, norm: (args.head_dim,)}
    return replace(step, sources=sources, make=make, what=f"{step.what}, times o_norm")
