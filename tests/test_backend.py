"""Who decides which implementation runs."""

import mlx.core as mx
import pytest

from mlx_hydra import kernels
from mlx_hydra.ops import backend, resolve_backend


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPU that is there, the backends proven on one, and the environment's wish."""

    def set_up(gpu=None, proven=(), environment=None):
        monkeypatch.setattr(kernels, "gpu_backend", lambda: gpu)
        monkeypatch.setattr(backend, "PROVEN", proven)
        monkeypatch.delenv("MLX_HYDRA_BACKEND", raising=False)
        if environment is not None:
            monkeypatch.setenv("MLX_HYDRA_BACKEND", environment)

    return set_up


@pytest.mark.parametrize(
    "asked, environment, supported, runs",
    [
        ("auto", None, ("ops",), "ops"),
        ("auto", None, ("metal", "ops"), "ops"),
        ("auto", None, ("cuda", "ops"), "cuda"),
        ("auto", None, ("ops", "cuda"), "ops"),
        ("auto", "auto", ("cuda", "ops"), "cuda"),
        ("auto", "ops", ("cuda", "ops"), "ops"),
        ("auto", "metal", ("metal", "ops"), "metal"),
        ("auto", "metal", ("ops", "metal"), "metal"),
        ("auto", "metal", ("ops",), "ops"),
        ("metal", "ops", ("metal", "ops"), "metal"),
        ("ops", "nonsense", ("ops",), "ops"),
    ],
)
def test_the_caller_decides_then_the_environment_then_what_is_proven(
    machine, asked, environment, supported, runs
):
    machine("metal", ("cuda",), environment)
    assert resolve_backend(asked, supported) == runs


@pytest.mark.parametrize(
    "asked, environment, message",
    [
        ("opencl", "ops", "backend='opencl': expected one of auto, ops, metal, cuda."),
        ("auto", "mps", "MLX_HYDRA_BACKEND='mps': expected one of auto, ops, metal, cuda."),
        ("cuda", "ops", "backend='cuda': this call runs on ops only; use 'ops' or 'auto'."),
        ("auto", "metal", "MLX_HYDRA_BACKEND='metal': this machine has no such GPU"),
    ],
)
def test_a_backend_that_is_not_there_is_refused_by_name(machine, asked, environment, message):
    machine(None, ("metal",), environment)
    with pytest.raises(ValueError) as error:
        resolve_backend(asked, ("ops",))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "capability, backend", [(7, None), (8, "cuda"), (9, "cuda"), (None, "cuda")]
)
def test_kernels_are_for_gpus_with_the_products_that_they_ask_for(monkeypatch, capability, backend):
    info = {} if capability is None else {"compute_capability_major": capability}
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    kernels._has_tensor_cores.cache_clear()
    try:
        assert kernels.gpu_backend() == backend
    finally:
        kernels._has_tensor_cores.cache_clear()
