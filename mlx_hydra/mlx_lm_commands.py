"""mlx-lm's own commands, which load HydraHead models with this package."""

import mlx_lm.chat
import mlx_lm.server

from .cli import command
from .loading import load


def _load(path_or_repo, *, return_config=False, **options):
    loaded = load(path_or_repo, **options)
    return loaded if return_config else loaded[:2]


@command
def server() -> None:
    """``mlx_lm.server``; it does not run the file that a model's folder may hold."""
    mlx_lm.server.load = _load
    mlx_lm.server.main()


@command
def chat() -> None:
    """``mlx_lm.chat``; it does not run the file that a model's folder may hold."""
    mlx_lm.chat.load = _load
    mlx_lm.chat.main()
