"""Token sequences out of reports: a report, then questions about it with their answers."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from reports import Fact, sentences

WORD = re.compile(r"\n| ?[^ \n]+| ")
IGNORED = -1


class Encoder:
    """Encodes a word at a time, and remembers each: pieces never cross a word's boundary."""

    def __init__(self, tokenizer: Path):
        self.pieces = sentencepiece.SentencePieceProcessor(str(tokenizer / "tokenizer.model"))
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids = []
        for word in WORD.findall(text):
            if word not in self.known:
                self.known[word] = self.pieces.encode(word)
            ids += self.known[word]
        return ids


@dataclass
class Report:
    """A report of a wanted length, and its facts with the token at which each starts."""

    text: str
    ids: list[int]
    facts: list[tuple[int, Fact]]


def make_report(rng: random.Random, encode: Encoder, length: int, density: float) -> Report:
    text, ids, facts = [], [encode.bos], []
    for sentence, fact in sentences(rng, density):
        if fact is not None:
            facts.append((len(ids), fact))
        text.append(sentence)
        ids += encode(sentence)
        if len(ids) >= length:
            break
    return Report("".join(text), ids, facts)


def prompt(question: str) -> str:
    """What the chat template puts between the report and the answer."""
    return f"\n\n{question}\nAnswer:"


def training_batch(
    encode: Encoder, seed: int, batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets ``[batch_size, length]`` int32; targets are IGNORED but in the answers.

    Each row is a report of random length and density, then as many questions about it as fit.
    """
    rng = random.Random(seed)
    inputs = np.zeros((batch_size, length), np.int32)
    targets = np.full((batch_size, length), IGNORED, np.int32)
    for row in range(batch_size):
        for_questions = min(int(length * rng.uniform(0.25, 0.6)), 1600)
        density = rng.choice((0.3, 0.6, 0.9) if length < 1000 else (0.15, 0.3, 0.6, 0.9))
        report = make_report(rng, encode, length - for_questions, density)
        ids, answers = report.ids, []
        facts = [fact for _, fact in report.facts]
        rng.shuffle(facts)
        for fact in facts:
            ids = ids + encode(prompt(fact.question(rng)))
            answer = [*encode(f" {fact.value}"), encode.eos]
            if len(ids) + len(answer) > length + 1:
                break
            answers.append((len(ids), len(answer)))
            ids = ids + answer
        ids = ids[: length + 1]
        inputs[row, : len(ids) - 1] = ids[:-1]
        for start, size in answers:
            targets[row, start - 1 : start - 1 + size] = ids[start : start + size]
    return inputs, targets
