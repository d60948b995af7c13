"""Perplexity of a text, in windows of a given length that are read with the model's cache."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, Union

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..needles import start_tokens
from .forward import batches, read

# Numbers in the logits of a step: 512 MiB in float32.
MAX_LOGITS = 1 << 27


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    digest: of the file, so that results tell which text they are of.
    start: the token that every window begins with, if the tokenizer has one.
    """

    name: str
    digest: str
    tokens: Sequence[int]
    start: Sequence[int]

    @classmethod
    def load(cls, path: Union[str, Path], tokenizer) -> "Text":
        """Read a text file.

        Raises:
            ValueError: it cannot be read, is not UTF-8, or is empty.
        """
        try:
            data = Path(path).read_bytes()
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--perplexity {path}: not UTF-8 text (byte {error.start} is "
                f"0x{error.object[error.start]:02x})."
            ) from error
        except OSError as error:
            raise ValueError(f"--perplexity {path}: {error.strerror}.") from error
        if not text.strip():
            raise ValueError(f"--perplexity {path}: it is empty.")
        return cls(
            name=Path(path).name,
            digest=hashlib.sha256(data).hexdigest(),
            # Not verbose: it would warn of every text over the model's trained length.
            tokens=tokenizer.encode(text, add_special_tokens=False, verbose=False),
            start=start_tokens(tokenizer),
        )

    def windows(self, cell: "TextCell") -> list[Sequence[int]]:
        """Windows of ``cell.length + 1`` tokens; each begins ``cell.stride`` after the one before.

        Raises:
            ValueError: the text is shorter than one.
        """
        size = cell.length + 1 - len(self.start)
        starts = range(0, len(self.tokens) - size + 1, cell.stride)[: cell.windows]
        if not starts:
            raise ValueError(
                f"--perplexity: {self.name} has {len(self.tokens):,} tokens, a window of --lengths "
                f"{cell.length} needs {size:,}."
            )
        return [[*self.start, *self.tokens[i : i + size]] for i in starts]


@dataclass(frozen=True)
class TextCell:
    """What of a text is scored.

    text: the digest of the file.
    length: tokens that a window reads; it predicts the ``length`` that follow its first.
    stride: tokens between the starts of windows. The first window's predictions all count, of the
        others the last ``stride``, so that no token counts twice.
    windows: the most windows that are read; None for all of the text.
    """

    text: str
    length: int
    stride: int
    windows: Optional[int] = None


def score_text(
    model: Callable[..., mx.array],
    tokenizer,
    text: Text,
    cell: TextCell,
    step: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """A cell and its scores, as they stand in the results.

    tokens: predictions that count.
    loss: mean negative log-likelihood of a token, in nats.
    perplexity: exp(loss); None where that is beyond a float.

    Raises:
        ValueError: the model's logits are not finite.

    Args:
        model: a model as mlx-lm calls it.
        step: tokens that are read at a time; fewer where the vocabulary is large.
        advance: told how many tokens were read.
    """
    first, *rest = text.windows(cell)
    step = min(step, max(1, MAX_LOGITS // len(tokenizer.get_vocab())))
    total = loss_of(model, [first], cell.length, step, advance)
    for batch in batches(rest, cell.length):
        total += loss_of(model, batch, cell.stride, step, advance)
    tokens = cell.length + len(rest) * cell.stride
    loss = total / tokens
    if not math.isfinite(loss):
        raise ValueError(
            f"--perplexity: the model gives logits that are not finite at length {cell.length}."
        )
    return {
        **asdict(cell),
        "file": text.name,
        "read": 1 + len(rest),
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
    }


def loss_of(
    model: Callable[..., mx.array],
    windows: Sequence[Sequence[int]],
    counted: int,
    step: int,
    advance: Callable[[int], None],
) -> float:
    """The negative log-likelihood of the last ``counted`` tokens of each window, in nats, added.

    A window's tokens go through the model once, in steps, with its cache; of a step's logits no
    more is kept than this sum.
    """
    tokens, cache = mx.array(windows), make_prompt_cache(model)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    before = inputs.shape[1] - counted
    read(model, inputs[:, :before], cache, step, advance)
    total, width = 0.0, max(1, step // len(windows))
    for start in range(before, inputs.shape[1], width):
        part = slice(start, start + width)
        logits = model(inputs[:, part], cache=cache).astype(mx.float32)
        chosen = mx.take_along_axis(logits, targets[:, part, None], axis=-1)[..., 0]
        loss = (mx.logsumexp(logits, axis=-1) - chosen).sum()
        mx.eval(loss, [c.state for c in cache])
        total += loss.item()
        advance(logits.shape[0] * logits.shape[1])
        del logits, chosen
        mx.clear_cache()
    return total
