"""Needles in a haystack: how many values a model finds again, by kind, length and depth."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..needles import Needle, Needles
from .forward import answer, batches

# An answer may begin in other words than the expected ones: so many more tokens are read of it.
EXTRA_TOKENS = 32


@dataclass(frozen=True)
class NeedleCell:
    """A cell of a grid: its prompts follow from these values and the tokenizer alone.

    kind: one of mlx_hydra.needles.KINDS.
    length: of the prompts, in tokens.
    depth: where in the text the needle stands, 0 to 1.
    samples: prompts.
    """

    kind: str
    length: int
    depth: float
    samples: int
    seed: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def needles(self, tokenizer) -> list[Needle]:
        """The prompts, whichever other cells are evaluated.

        Raises:
            ValueError: the tokenizer cannot write them, or the length is too short.
        """
        name = f"{self.seed} {self.kind} {self.length} {float(self.depth)}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        source = Needles(tokenizer, seed)
        return [source.sample(self.kind, self.length, self.depth) for _ in range(self.samples)]


def score_needles(
    model: Callable[..., mx.array],
    tokenizer,
    cell: NeedleCell,
    step: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """A cell and its scores, as they stand in the results.

    exact: the share of prompts whose greedy answer begins with the expected tokens.
    found: the mean share of the expected values that stand in the answer's text as whole words,
        in any order: RULER's measure.
    example: the first prompt's expected values and the text that the model gave.

    Raises:
        ValueError: the model's logits are not finite.

    Args:
        model: a model as mlx-lm calls it.
        step: tokens that are read at a time.
        advance: told how many tokens were read.
    """
    exact, found, texts = 0, 0.0, []
    needles = cell.needles(tokenizer)
    ends = set(tokenizer.eos_token_ids)
    for batch in batches(needles, cell.length):
        count = max(len(needle.answer) for needle in batch) + EXTRA_TOKENS
        prompts = [needle.prompt for needle in batch]
        for needle, tokens in zip(batch, answer(model, prompts, count, ends, step, advance)):
            exact += tokens[: len(needle.answer)] == needle.answer
            texts.append(tokenizer.decode(tokens))
            found += sum(stands_in(text, texts[-1]) for text in needle.texts) / len(needle.texts)
    return {
        **asdict(cell),
        "exact": exact / cell.samples,
        "found": found / cell.samples,
        "example": {"expected": needles[0].texts, "text": texts[0]},
    }


def stands_in(value: str, text: str) -> bool:
    """Whether a value stands in a text as whole words."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None
