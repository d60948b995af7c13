"""Seeded synthetic reports: facts to be asked for, distractor facts of the same form, filler prose.

Every fact binds an attribute of an entity to a value ("The access code of the Falcon archive is
4 digits"). Entities share attributes and attributes share entities, so that a question is answered
only by a fact that matches in both. Values stand last in a fact, and no pair is stated twice.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = json.loads((Path(__file__).parent / "words.json").read_text())

Value = Callable[[random.Random], str]


def _digits(count: int) -> Value:
    return lambda rng: "".join(rng.choice("0123456789") for _ in range(count))


def _person(rng: random.Random) -> str:
    return f"{rng.choice(WORDS['first_names'])} {rng.choice(WORDS['last_names'])}"


def _signal(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS["signals"]) for _ in range(3))


def _date(rng: random.Random) -> str:
    return f"{rng.choice(WORDS['months'])} {rng.randint(1, 28)}"


def _license(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(2)) + _digits(3)(rng)


ATTRIBUTES: dict[str, Value] = {
    "access code": _digits(4),
    "budget line": _digits(5),
    "room number": _digits(3),
    "founding year": lambda rng: str(rng.randint(1700, 2020)),
    "telephone extension": _digits(4),
    "license plate": _license,
    "permit number": _license,
    "director": _person,
    "treasurer": _person,
    "chief engineer": _person,
    "legal adviser": _person,
    "night guard": _person,
    "home city": lambda rng: rng.choice(WORDS["cities"]),
    "branch office": lambda rng: rng.choice(WORDS["cities"]),
    "call sign": _signal,
    "radio phrase": _signal,
    "banner color": lambda rng: rng.choice(WORDS["colors"]),
    "door color": lambda rng: rng.choice(WORDS["colors"]),
    "opening day": _date,
    "audit day": _date,
}


@dataclass(frozen=True)
class Fact:
    attribute: str
    entity: str
    value: str
    sentence: int

    def question(self, rng: random.Random) -> str:
        return rng.choice(WORDS["questions"]).format(attribute=self.attribute, entity=self.entity)


def filler(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(WORDS["remarks"])
    thing = f"the {rng.choice(WORDS['adjectives'])} {rng.choice(WORDS['things'])}"
    if kind < 0.3:
        thing = f"{thing} of the {rng.choice(WORDS['names'])} {rng.choice(WORDS['kinds'])}"
    people = (
        f"{rng.choice(WORDS['adjectives'])} {rng.choice(WORDS['people'])}"
        if kind < 0.6
        else rng.choice(WORDS["people"])
    )
    sentence = f"{people} {rng.choice(WORDS['verbs'])} {thing}"
    if kind < 0.75:
        sentence = f"{sentence} {rng.choice(WORDS['times'])}"
    elif kind < 0.9:
        sentence = f"{rng.choice(WORDS['times'])}, {sentence}"
    else:
        sentence = f"{sentence} and {rng.choice(WORDS['verbs'])} the {rng.choice(WORDS['things'])}"
    return f"{sentence[0].upper()}{sentence[1:]}."


def sentences(rng: random.Random, density: float) -> Iterator[tuple[str, Fact | None]]:
    """Yield a report without end: text with the white space before it, and its fact if it has one.

    density: the share of sentences that state a fact, in (0, 1].
    """
    stated = set()
    paragraph = section = index = 0
    while True:
        if paragraph == 0:
            if section % 6 == 0:
                lead = "\n\n" if section else ""
                first, second = rng.choice(WORDS["topics"]), rng.choice(WORDS["topics"]).lower()
                yield f"{lead}{section // 6 + 1}. {first} and {second}", None
                index += 1
            section += 1
            paragraph = rng.randint(4, 9)
            space = "\n"
        else:
            space = " "
        paragraph -= 1
        fact = None
        if rng.random() < density:
            attribute = rng.choice(list(ATTRIBUTES))
            entity = f"{rng.choice(WORDS['names'])} {rng.choice(WORDS['kinds'])}"
            if (attribute, entity) not in stated:
                stated.add((attribute, entity))
                value = ATTRIBUTES[attribute](rng)
                fact = Fact(attribute, entity, value, index)
        if fact is None:
            yield space + filler(rng), None
        else:
            template = rng.choice(WORDS["facts"])
            text = template.format(attribute=attribute, entity=entity, value=fact.value)
            yield space + text, fact
        index += 1
