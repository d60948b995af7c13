"""Documents of exactly so many tokens, out of the demo's reports: a report, then questions on it.

Everything is drawn from a seed that names what it is for, so that what a model is asked stands in
nothing that it was trained on.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
TOKENIZER = DEMO.parent.parent / "mlx_hydra" / "demo" / "model"
# Last, because the demo has an evaluate.py, too.
sys.path.append(str(DEMO))

from questions import Encoder, prompt  # noqa: E402
from reports import ATTRIBUTES, Fact, filler, sentences  # noqa: E402

SEED = 20261123
BOS, EOS = "<s>", "</s>"

# The share of sentences that state a fact: of documents to learn from, and to be asked about.
# None: a single fact in the whole report. To each its share of the documents.
DENSITIES = {None: 0.1, 0.15: 0.1, 0.3: 0.25, 0.6: 0.3, 0.9: 0.25}
ASKED_DENSITY = 0.25
# Attributes whose value is a first and a last name.
PEOPLE = {name for name, draw in ATTRIBUTES.items() if draw is ATTRIBUTES["director"]}

# A report of the task "single" has one fact, so it is asked one question.
PER_REPORT = {"single": 1, "multi_key": 4}
TASKS = tuple(PER_REPORT)

# Successive depths fall into the widest gap, however many there will be.
GOLDEN_RATIO = (5**0.5 - 1) / 2


def drawn_for(purpose: str, length: int, number: int) -> random.Random:
    """The random numbers of one document; those of other purposes have nothing to do with them."""
    return random.Random(f"{SEED} {purpose} {length} {number}")


@dataclass(frozen=True)
class Piece:
    """A sentence or a heading, with the white space before it."""

    text: str
    ids: list[int]
    fact: Fact | None = None

    @property
    def is_filler(self) -> bool:
        return self.fact is None and self.text.startswith(" ")


@dataclass(frozen=True)
class Document:
    """A report and questions with their answers.

    text: without the end token of the last answer; the others are in it as ``</s>``.
    ids: all tokens, the last end token among them.
    answers: where each answer starts in ``ids`` and how many tokens it has, its end token too.
    report: tokens of the report, before the first question.
    """

    text: str
    ids: list[int]
    answers: list[tuple[int, int]]
    report: int


class Writer:
    """Writes documents whose length is exact to the token: filler sentences make up for the rest.

    encode: the demo's encoder.
    """

    def __init__(self, tokenizer: Path = TOKENIZER):
        self.encode = Encoder(tokenizer)

    @cached_property
    def fillers(self) -> dict[int, list[Piece]]:
        """Filler sentences by their length, from the shortest up while there are some."""
        rng = random.Random(f"{SEED} fillers")
        found: dict[int, dict[str, Piece]] = defaultdict(dict)
        for _ in range(6000):
            piece = self.piece(f" {filler(rng)}")
            found[len(piece.ids)][piece.text] = piece
        lengths = takewhile(lambda length: length in found, count(min(found)))
        return {length: list(found[length].values()) for length in lengths}

    def can_fill(self, tokens: int) -> bool:
        """Whether some filler sentences, or none, have so many tokens together."""
        return tokens >= 0 and -(-tokens // max(self.fillers)) * min(self.fillers) <= tokens

    def piece(self, text: str, fact: Fact | None = None) -> Piece:
        return Piece(text, self.encode(text), fact)

    def fact(self, rng: random.Random) -> Piece:
        """A sentence that states a fact, from inside a paragraph."""
        for text, fact in sentences(rng, 1.0):
            if fact is not None and text.startswith(" "):
                return self.piece(text, fact)

    def report(self, rng: random.Random, tokens: int, density: float | None) -> list[Piece]:
        """Sentences of at most ``tokens`` tokens, a filler and a fact among them."""
        pieces: list[Piece] = []
        added = [rng.choice(rng.choice(list(self.fillers.values())))]
        if density is None:
            added.append(self.fact(rng))
        left = tokens - 1 - size(added)
        for text, fact in sentences(rng, density or 0.0):
            piece = self.piece(text, fact)
            if len(piece.ids) > left:
                break
            left -= len(piece.ids)
            pieces.append(piece)
        for piece in added:
            put_inside(rng, pieces, piece)
        return pieces

    def fill(self, rng: random.Random, pieces: list[Piece], tokens: int) -> None:
        """Make a report longer by so many tokens."""
        while not self.can_fill(tokens):
            replaced = rng.choice([n for n, piece in enumerate(pieces) if piece.is_filler])
            tokens += len(pieces.pop(replaced).ids)
        while tokens:
            lengths = [n for n in self.fillers if self.can_fill(tokens - n)]
            [length] = rng.choices(lengths, [len(self.fillers[n]) for n in lengths])
            put_inside(rng, pieces, rng.choice(self.fillers[length]))
            tokens -= length

    def question(self, rng: random.Random, fact: Fact) -> tuple[str, str]:
        return prompt(fact.question(rng)), f" {fact.value}"

    def assemble(self, pieces: list[Piece], asked: list[tuple[str, str]]) -> Document:
        ids, answers = [self.encode.bos], []
        for piece in pieces:
            ids += piece.ids
        report = len(ids)
        for question, answer in asked:
            ids += self.encode(question)
            answer_ids = [*self.encode(answer), self.encode.eos]
            answers.append((len(ids), len(answer_ids)))
            ids += answer_ids
        text = BOS + "".join(piece.text for piece in pieces)
        text += EOS.join(question + answer for question, answer in asked)
        return Document(text, ids, answers, report)

    def tokens(self, question: str, answer: str) -> int:
        return len(self.encode(question)) + len(self.encode(answer)) + 1

    def by_last_name(self, piece: Piece) -> Piece:
        """The same fact with a person's last name alone."""
        fact = piece.fact
        last = fact.value.split()[-1]
        return self.piece(piece.text.replace(fact.value, last), replace(fact, value=last))

    def document(self, rng: random.Random, length: int, last_names: float = 0.0) -> Document:
        """A document to learn from: a report, and as many questions as fit into ``length``.

        last_names: the share of people who are called by their last name alone.
        """
        while True:
            for_questions = min(int(length * rng.uniform(0.25, 0.6)), 1600)
            [density] = rng.choices(list(DENSITIES), DENSITIES.values())
            pieces = self.report(rng, length - for_questions, density)
            for n, piece in enumerate(pieces):
                person = piece.fact is not None and piece.fact.attribute in PEOPLE
                if last_names and person and rng.random() < last_names:
                    pieces[n] = self.by_last_name(piece)
            facts = [piece.fact for piece in pieces if piece.fact is not None]
            rng.shuffle(facts)
            left, asked = length - 1 - size(pieces), []
            for fact in facts:
                question, answer = self.question(rng, fact)
                if self.tokens(question, answer) > left:
                    break
                left -= self.tokens(question, answer)
                asked.append((question, answer))
            # With two fillers to give up, any length can be had.
            if asked and (self.can_fill(left) or sum(p.is_filler for p in pieces) > 1):
                self.fill(rng, pieces, left)
                return self.assemble(pieces, asked)

    def exam_report(
        self, rng: random.Random, task: str, tokens: int, depth: float
    ) -> tuple[list[Piece], list[Fact]]:
        """A report of ``tokens`` tokens and the facts that may be asked for.

        task: "single", a single fact at ``depth`` (0..1) of the report, or "multi_key", many facts
            of the same form.
        """
        density = 0.0 if task == "single" else ASKED_DENSITY
        pieces = self.report(rng, tokens, density)
        needle = [self.fact(rng)] if task == "single" else []
        left = tokens - 1 - size(pieces) - size(needle)
        while left < 0:
            left += len(pieces.pop().ids)
        self.fill(rng, pieces, left)
        for piece in needle:
            pieces.insert(place_at(pieces, depth * tokens), piece)
        return pieces, [piece.fact for piece in pieces if piece.fact is not None]

    def exam(
        self, rng: random.Random, task: str, length: int, questions: int, depth: float
    ) -> Document:
        """A report of ``length`` tokens and questions on different facts of it, drawn evenly."""
        while True:
            pieces, facts = self.exam_report(rng, task, length, depth)
            if len(facts) >= questions:
                asked = rng.sample(facts, questions)
                return self.assemble(pieces, [self.question(rng, fact) for fact in asked])


def size(pieces: Iterable[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def put_inside(rng: random.Random, pieces: list[Piece], piece: Piece) -> None:
    """Put a sentence behind another one, never before a heading or its first sentence."""
    places = [n for n in range(2, len(pieces) + 1) if follows_a_sentence(pieces, n)]
    pieces.insert(rng.choice(places) if places else len(pieces), piece)


def follows_a_sentence(pieces: list[Piece], place: int) -> bool:
    return pieces[place - 1].text.endswith(".")


def place_at(pieces: list[Piece], tokens: float) -> int:
    """Where a sentence is to be put so that about so many tokens come before it."""
    before, places = 0, []
    for n, piece in enumerate(pieces, start=1):
        before += len(piece.ids)
        if follows_a_sentence(pieces, n):
            places.append((abs(before - tokens), n))
    return min(places)[1]


def exams(writer: Writer, task: str, length: int, numbers: Iterable[int]) -> list[Document]:
    """The exams of these numbers, the same for every model; depths are spread over the reports."""
    return [
        writer.exam(
            drawn_for(f"exam {task}", length, number),
            task,
            length,
            PER_REPORT[task],
            (0.5 + number * GOLDEN_RATIO) % 1,
        )
        for number in numbers
    ]
