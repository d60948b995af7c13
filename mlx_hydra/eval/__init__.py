"""Evaluation of any mlx-lm or HydraHead model: grids of needles, and perplexity."""

from .command import main
from .needle_grid import NeedleCell, score_needles
from .perplexity import TextCell, score_text

__all__ = ["NeedleCell", "TextCell", "main", "score_needles", "score_text"]
