"""Counterfactual pairs: a prompt, and the same prompt with its answer swapped in the text."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Optional, Union

from ..needles import Needles, encode

CAPABILITIES = ("single", "multi_key")
FIELDS = ("prompt", "answer", "counterfactual_prompt", "distractor")

# What JSON can write, and UTF-8 and tokenizers cannot.
SURROGATE = re.compile("[\ud800-\udfff]")

# Successive depths fall into the widest gap, however many there will be.
GOLDEN_RATIO = (5**0.5 - 1) / 2

# Tokens after the swapped ones that may have taken them in, as the full stop of a sentence does.
MARGIN = 4


@dataclass(frozen=True)
class Pair:
    """A prompt and its counterfactual, as token ids.

    prompt, counterfactual: of equal length; they differ in the answer that stands in the text.
    answer, distractor: of equal length; what follows ``prompt``, and what would follow
        ``counterfactual``.
    capability: scores are brought to one scale within each.
    """

    prompt: list[int]
    counterfactual: list[int]
    answer: list[int]
    distractor: list[int]
    capability: str

    @property
    def clean_tokens(self) -> list[int]:
        """What the model reads: the prompt and the answer, teacher-forced."""
        return self.prompt + self.answer[:-1]

    @property
    def counterfactual_tokens(self) -> list[int]:
        """The other prompt with the same answer forced, so that the text alone differs."""
        return self.counterfactual + self.answer[:-1]

    @property
    def changed(self) -> list[int]:
        """The positions in which the prompts differ."""
        return [i for i, (a, b) in enumerate(zip(self.prompt, self.counterfactual)) if a != b]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """``[start, end)`` of the swapped tokens with what follows them, then of the answer.

        The answer's are the positions that predict it: the prompt's last and on.
        """
        last = len(self.prompt) - 1
        segments: list[tuple[int, int]] = []
        for position in self.changed:
            end = min(position + 1 + MARGIN, last)
            if segments and position <= segments[-1][1]:
                segments[-1] = (segments[-1][0], end)
            else:
                segments.append((position, end))
        return [(a, b) for a, b in segments if a < b] + [(last, last + len(self.answer))]


def builtin_pairs(tokenizer, context: int, count: int, seed: int) -> list[Pair]:
    """Needles of each capability, ``count`` of either, at depths all over the context.

    The first pairs are the same whatever ``count`` is.

    Args:
        context: tokens of a prompt.

    Raises:
        ValueError: the tokenizer cannot write needles, or the context is too short.
    """
    needles = Needles(tokenizer, seed)
    pairs = []
    for i in range(count):
        for kind in CAPABILITIES:
            try:
                needle = needles.sample(kind, context, (0.5 + i * GOLDEN_RATIO) % 1)
            except ValueError as error:
                message = str(error).replace(f"length={context}", f"--context {context}")
                raise ValueError(message) from error
            pairs.append(
                Pair(
                    needle.prompt,
                    needle.with_answer(needle.distractor),
                    needle.answer,
                    needle.distractor,
                    kind,
                )
            )
    return pairs


def pairs_from_file(path: Union[str, Path], tokenizer) -> list[Pair]:
    """Pairs from a file of a JSON object a line, the capabilities in turns.

    An object has the strings prompt, answer, counterfactual_prompt and distractor, and may name a
    capability; answer and distractor begin with the space that sets them off, where there is one.

    Raises:
        ValueError: no such file, not UTF-8, no pair in it; or, with its line, one that is not as
            described, or whose prompts or answers differ in tokens' number.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"--probes {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--probes {path}: not UTF-8 text (byte {error.start}).") from error
    # Not splitlines, for which a line may also end within a JSON string.
    pairs = [
        read_pair(line, tokenizer, f"--probes {path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not pairs:
        raise ValueError(f"--probes {path}: it holds no probe.")
    return in_turns(pairs)


def in_turns(pairs: Iterable[Pair], count: Optional[int] = None) -> list[Pair]:
    """One of each capability, then the next of each, so that what is done first has all kinds.

    Args:
        count: at most so many of each; all for None.
    """
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.capability, []).append(pair)
    turns = zip_longest(*(of_kind[:count] for of_kind in found.values()))
    return [pair for turn in turns for pair in turn if pair is not None]


def read_pair(line: str, tokenizer, where: str) -> Pair:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(FIELDS)}.")
    for name in FIELDS:
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise ValueError(f"{where}: {name}={entry.get(name)!r}: expected a text.")
    capability = entry.get("capability", "probes")
    if not isinstance(capability, str):
        raise ValueError(f"{where}: capability={capability!r}: expected a text.")
    for name in (*FIELDS, "capability"):
        if half := SURROGATE.search(entry.get(name, "")):
            raise ValueError(
                f"{where}: {name} has {half[0]!r}, half of a character, at {half.start()}: "
                "expected whole ones."
            )
    prompt, other = (list(tokenizer.encode(entry[name])) for name in FIELDS[::2])
    answer, distractor = (encode(tokenizer, entry[name]) for name in FIELDS[1::2])
    for (name, first), (other_name, second) in (
        (("answer", answer), ("distractor", distractor)),
        (("prompt", prompt), ("counterfactual_prompt", other)),
    ):
        if len(first) != len(second):
            raise ValueError(
                f"{where}: {name} has {len(first)} tokens and {other_name} {len(second)}: "
                "expected as many."
            )
    if answer == distractor:
        raise ValueError(f"{where}: answer and distractor are the same.")
    if prompt == other:
        raise ValueError(f"{where}: prompt and counterfactual_prompt are the same.")
    return Pair(prompt, other, answer, distractor, capability)
