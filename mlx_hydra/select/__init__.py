"""Choose the heads that keep full attention, by measuring what retrieval depends on."""

from .command import main

__all__ = ["main"]
