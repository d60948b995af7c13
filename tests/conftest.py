import os

import hypothesis
import metalsim
import pytest

from mlx_hydra import kernels
from mlx_hydra.ops.backend import ENVIRONMENT_VARIABLE

# Where a GPU has TF32, MLX rounds float32 products to 10 bits unless told otherwise.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# The same examples on every run: a failure here is a failure everywhere.
hypothesis.settings.register_profile(
    "mlx_hydra", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis.settings.load_profile("mlx_hydra")


@pytest.fixture
def kernel_backend(monkeypatch):
    """The backend whose kernels this machine runs: its GPU's, else Metal's in the simulator.

    Calls that name no backend take its kernels too.
    """
    backend = kernels.gpu_backend()
    if backend is not None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        yield backend
        return
    if not metalsim.available():
        pytest.skip("needs an Apple or NVIDIA GPU, or the simulator (Linux and ziglang)")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "metal")
    with metalsim.metal(checked=True):
        yield "metal"
