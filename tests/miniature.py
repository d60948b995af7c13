"""A tiny teacher for examples/reproduction."""

from pathlib import Path

import teacher
from mlx.utils import tree_map

REPRODUCTION = Path(__file__).parents[1] / "examples" / "reproduction"

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def save_tiny_teacher(folder: Path) -> Path:
    """A random model whose logits are far enough apart to have answers and scores."""
    model = teacher.new_model(SIZES)
    model.update(tree_map(lambda a: 4 * a if a.ndim == 2 else a, model.parameters()))
    teacher.save_model(folder, model, SIZES)
    return folder
