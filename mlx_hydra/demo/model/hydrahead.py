"""The architecture of this model, for mlx-lm: it is in the package mlx-hydra."""

try:
    from mlx_hydra.models.hydrahead import Model, ModelArgs
except ImportError as error:
    raise ImportError("This is a HydraHead model: pip install mlx-hydra") from error

__all__ = ["Model", "ModelArgs"]
