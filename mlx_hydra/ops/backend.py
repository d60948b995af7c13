"""Which implementation of an operation runs: plain MLX ops, Metal kernels or CUDA kernels."""

import os

from .. import kernels

BACKENDS = ("auto", "ops", "metal", "cuda")
ENVIRONMENT_VARIABLE = "MLX_HYDRA_BACKEND"

# The backends whose kernels have passed their tests on a real GPU: "auto" takes no others.
PROVEN: tuple[str, ...] = ("cuda",)


def resolve_backend(backend: str = "auto", supported: tuple[str, ...] = ("ops",)) -> str:
    """Name the implementation that a call runs.

    Args:
        backend: what the caller asked for. ``"auto"`` defers to the environment variable
            ``MLX_HYDRA_BACKEND`` where it is set: ``"ops"``, or the kernels of this machine's GPU
            for every call that they support. Else it takes the fastest of ``supported`` that has
            been proven on a GPU.
        supported: the implementations the operation has for this call, ``"ops"`` among them, the
            fastest first.

    Returns:
        One of ``supported``.

    Raises:
        ValueError: the name is unknown, the operation has no such implementation, or the
            variable names a GPU that is not here.
    """
    if backend == "auto":
        return _automatic(supported)
    _check_name("backend", backend)
    if backend not in supported:
        raise ValueError(
            f"backend={backend!r}: this call runs on {' or '.join(supported)} only; "
            f"use {supported[0]!r} or 'auto'."
        )
    return backend


def kernels_run() -> bool:
    """Whether ``"auto"`` takes the kernels of this machine's GPU, for calls that they support."""
    gpu = kernels.gpu_backend()
    return gpu is not None and _automatic((gpu, "ops")) != "ops"


def _automatic(supported):
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    _check_name(ENVIRONMENT_VARIABLE, wanted)
    if wanted == "auto":
        return next(name for name in supported if name == "ops" or name in PROVEN)
    if wanted in supported:
        return wanted
    if wanted != kernels.gpu_backend():
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={wanted!r}: this machine has no such GPU that MLX uses; "
            "use 'ops' or 'auto'."
        )
    return "ops"


def _check_name(source, name):
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(BACKENDS)}.")
