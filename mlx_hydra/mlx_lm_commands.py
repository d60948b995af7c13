"""mlx-lm's own commands, which load HydraHead models with this package."""

import mlx_lm.chat
import mlx_lm.server

from .cli import ArgumentParser, command
from .loading import find_model, load


def _load(path_or_repo, *, return_config=False, **options):
    loaded = load(path_or_repo, **options)
    return loaded if return_config else loaded[:2]


def _check_model() -> None:
    """Look for --model before mlx-lm does, which tells of a missing one from a thread."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    model = parser.parse_known_args()[0].model
    if model is not None:
        find_model(model)


@command
def server() -> None:
    """``mlx_lm.server``; it does not run the file that a model's folder may hold."""
    _check_model()
    mlx_lm.server.load = _load
    mlx_lm.server.main()


@command
def chat() -> None:
    """``mlx_lm.chat``; it does not run the file that a model's folder may hold."""
    _check_model()
    mlx_lm.chat.load = _load
    mlx_lm.chat.main()
