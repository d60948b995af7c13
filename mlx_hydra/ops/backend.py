"""Which implementation of an operation runs: plain MLX ops, Metal kernels or CUDA kernels."""

import os

BACKENDS = ("auto", "ops", "metal", "cuda")
ENVIRONMENT_VARIABLE = "MLX_HYDRA_BACKEND"


def resolve_backend(backend: str = "auto", supported: tuple[str, ...] = ("ops",)) -> str:
    """Name the implementation that a call runs.

    Args:
        backend: what the caller asked for. ``"auto"`` defers to the environment variable
            ``MLX_HYDRA_BACKEND`` where it is set, and else takes the fastest of ``supported``.
        supported: the implementations the operation has for this call, fastest first.

    Returns:
        One of ``supported``.

    Raises:
        ValueError: the name is unknown, or the operation has no such implementation.
    """
    source = "backend"
    if backend == "auto":
        source, backend = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r}: expected one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        return supported[0]
    if backend not in supported:
        raise ValueError(
            f"{source}={backend!r}: this call runs on {' or '.join(supported)} only; "
            f"use {supported[0]!r} or 'auto'."
        )
    return backend
