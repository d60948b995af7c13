"""The operations that HydraHead adds to MLX."""

from .backend import resolve_backend
from .fuse_heads import fuse_heads
from .gated_delta import gated_delta
from .head_attention import head_attention

__all__ = ["fuse_heads", "gated_delta", "head_attention", "resolve_backend"]
