"""RoPE: mlx-lm's modules for it, and what they do in the words of the kernels."""

from typing import Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from ..config import ModelArgs
from ..ops.gated_delta_step import Rotation


def rope_for(args: ModelArgs) -> nn.Module:
    """mlx-lm's module for a config's RoPE.

    Raises:
        ValueError: ``rope_scaling`` lacks what its kind needs.
    """
    try:
        return initialize_rope(
            args.head_dim,
            base=args.rope_theta,
            traditional=False,
            scaling_config=args.rope_scaling,
            max_position_embeddings=args.max_position_embeddings,
        )
    except KeyError as error:
        raise ValueError(f"rope_scaling={args.rope_scaling!r}: {error} is missing.") from error


def rotation_of(rope: nn.Module, dim: int) -> Optional[Rotation]:
    """What a RoPE module does, for the kernels; None if that depends on the length."""
    if isinstance(rope, nn.RoPE):
        factor = 1.0
        frequencies = rope.scale * rope.base ** -(mx.arange(0, dim, 2, dtype=mx.float32) / dim)
    elif (periods := getattr(rope, "_freqs", None)) is not None:
        # YaRN's factor, or LongRoPE's.
        factor = getattr(rope, "mscale", getattr(rope, "_scale", 1.0))
        frequencies = 1 / periods
    else:
        return None
    # It is no parameter, which loading would evaluate, and no other thread could do so later.
    mx.eval(frequencies)
    return Rotation(frequencies, factor)
