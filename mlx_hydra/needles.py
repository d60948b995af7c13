"""Needle-in-a-haystack prompts for any tokenizer, exact to the token, after RULER's."""

import random
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

KINDS = ("single", "multi_key", "multi_value", "multi_query")

# Needles of the kinds that have several, as in RULER.
MANY = 4
DIGITS = 7
# Symbols of a value where a tokenizer knows no English.
SYMBOLS = 2
ATTEMPTS = 500

INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
NEEDLE = " One of the special magic numbers for {key} is:"
ONE = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? The special "
    "magic number for {key} mentioned in the provided text is"
)
SEVERAL = (
    "\nWhat are all the special magic numbers for {key} mentioned in the provided text? The "
    "special magic numbers for {key} mentioned in the provided text are"
)

ADJECTIVES, NOUNS, VERBS = map(
    str.split,
    (
        """
ancient bitter blue brave bright broken calm careful clever cold common curious dark deep distant
dry dusty early eager empty famous fine first friendly gentle golden grand green grey happy heavy
hidden hollow honest huge humble icy kind large late lazy little lonely long loud lucky modern
narrow new noble odd old open patient plain polite proud quick quiet rare rich rough round rusty
sharp silent silver simple slow small smooth soft steep strange strong sunny tall tame thin tidy
tiny warm weary wet white wide wild wise wooden yellow young
""",
        """
anchor apple artist baker barn basket bell bird boat book bottle bridge brother candle captain
carpet castle cellar chair child church circle clock cloud coat cook corner cousin crown dancer
desert doctor door dream driver engine farmer father feather field fire fish flower forest
fountain friend garden gate ghost glass grain guard guest hammer harbor hat hill horse hotel house
hunter island jacket judge kettle king kitchen ladder lake lamp lantern lawyer leaf letter library
lion market meadow merchant mill mirror moon morning mountain music neighbor needle night nurse
oak ocean office orchard oven owl painter palace paper path pearl pilot plate poet pond porter
potter prince queen rabbit rain ribbon river road robin roof room rope sailor scholar school sea
shadow sheep ship shop singer sister smith snow soldier song spoon spring stable star station
stone storm story stove stream street student summer sword table tailor teacher temple thread
tower town train traveler tree uncle valley village violin wagon wall watch water wheel widow wind
window winter wolf wood writer
""",
        """
admired answered asked borrowed bought built called carried cleaned copied counted covered
described drew drove followed forgot found greeted guarded heard helped kept knew led left lifted
liked lost loved made measured met missed moved needed noticed offered opened painted passed
praised pulled pushed reached remembered repaired returned saved saw sold studied thanked took
touched trusted visited waited warned washed watched welcomed wrote
""",
    ),
)
ENDINGS = (
    "",
    " again",
    " all day",
    " at noon",
    " before dinner",
    " by the sea",
    " every week",
    " for a while",
    " in the evening",
    " in the rain",
    " last year",
    " on the way home",
    " once more",
    " under the trees",
    " with great care",
    " without a word",
)


@dataclass(frozen=True)
class Needle:
    """A prompt that hides one or more values in a long text and asks for them.

    prompt: token ids; they end right where the answer begins.
    answer: the token ids that the prompt asks for; several values are joined as in a list.
    answers, texts: each value by itself, as token ids and as text.
    spans: for each value where its tokens stand in the prompt, ``[start, end)``.
    distractor: a wrong answer of as many tokens; none of the values' tokens is the same.
    parts: for each value where its tokens stand in ``answer``, ``[start, end)``.
    """

    prompt: list[int]
    answer: list[int]
    answers: list[list[int]]
    texts: list[str]
    spans: list[tuple[int, int]]
    distractor: list[int]
    parts: list[tuple[int, int]]

    def with_answer(self, tokens: list[int]) -> list[int]:
        """The prompt with the values in the text replaced by those of another answer.

        Args:
            tokens: an answer of as many token ids as ``answer``, such as ``distractor``.

        Raises:
            ValueError: the answer is longer or shorter.
        """
        if len(tokens) != len(self.answer):
            raise ValueError(f"{len(tokens)} tokens: expected {len(self.answer)}, as the answer.")
        prompt = list(self.prompt)
        for (start, end), (first, last) in zip(self.spans, self.parts):
            prompt[start:end] = tokens[first:last]
        return prompt


@dataclass(frozen=True)
class Value:
    """A value to find, and a wrong one of as many tokens that has none of them in its place."""

    tokens: list[int]
    wrong: list[int]
    text: str


class Needles:
    """A seeded generator of prompts; the same calls on the same seed give the same prompts.

    Where the tokenizer can write English and digits, the wording is RULER's with numbers of seven
    digits. Where it cannot, as in a small vocabulary of made-up words, a needle is a key followed
    by its value, both from the tokenizer's own words, and the prompt ends with the key.

    Args:
        tokenizer: mlx-lm's or transformers'.

    Raises:
        ValueError: the tokenizer can do neither.
    """

    def __init__(self, tokenizer, seed: int = 0):
        self._random = random.Random(seed)
        self._start = start_tokens(tokenizer)
        writer = TextWriter if writes_english(tokenizer) else SymbolWriter
        self._writer: Union[TextWriter, SymbolWriter] = writer(tokenizer, self._random)

    def sample(self, kind: str, length: int, depth: float) -> Needle:
        """A new prompt.

        Args:
            kind: "single", one needle; "multi_key", three others with other keys beside it;
                "multi_value", four values of one key; "multi_query", four keys that are all asked.
            length: of the prompt, in tokens.
            depth: where in the text the needle stands, from 0 to 1: of several that are asked, one
                stands there and the others anywhere.

        Raises:
            ValueError: a kind that is none, a depth outside 0 to 1, or a length that is too short.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}.")
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}: expected a number from 0 to 1.")
        write, rng = self._writer, self._random
        keys = write.keys(1 if kind in ("single", "multi_value") else MANY)
        values = write.values(1 if kind == "single" else MANY)
        pairs = [(keys[i % len(keys)], value) for i, value in enumerate(values)]
        asked = len(keys) if kind in ("single", "multi_key") else len(pairs)
        if kind == "multi_key":
            asked = 1

        question = write.question(keys[:asked], several=asked > 1)
        head = self._start + write.intro
        needles = [write.needle(key, value.tokens) for key, value in pairs]
        fixed = len(head) + len(question) + sum(len(tokens) for tokens, _ in needles)
        room = length - fixed
        if room < 0:
            raise ValueError(
                f"length={length}: too short for {kind} needles, which need {fixed} tokens."
            )
        places = [round(depth * room)] + [rng.randint(0, room) for _ in needles[1:]]
        order = sorted(range(len(needles)), key=lambda i: places[i])
        prompt, filler, spans = list(head), write.filler(room), {}
        used = 0
        for i in order:
            # To the end of a sentence, whichever is nearest.
            while filler and used + len(filler[0]) / 2 <= places[i]:
                used += len(filler[0])
                prompt += filler.pop(0)
            tokens, at = needles[i]
            spans[i] = (len(prompt) + at, len(prompt) + at + len(pairs[i][1].tokens))
            prompt += tokens
        for sentence in filler:
            prompt += sentence
        prompt += question

        # The values of one key are told in the order of the text.
        wanted = [i for i in order if i < asked] if kind == "multi_value" else list(range(asked))
        answer, distractor, parts = [], [], []
        for i in wanted:
            if answer:
                answer, distractor = answer + write.comma, distractor + write.comma
            parts.append((len(answer), len(answer) + len(values[i].tokens)))
            answer, distractor = answer + values[i].tokens, distractor + values[i].wrong
        return Needle(
            prompt=prompt,
            answer=answer,
            answers=[values[i].tokens for i in wanted],
            texts=[values[i].text for i in wanted],
            spans=[spans[i] for i in wanted],
            distractor=distractor,
            parts=parts,
        )


class TextWriter:
    """RULER's wording, with sentences of common English words between the needles."""

    def __init__(self, tokenizer, rng: random.Random):
        self._tokenizer, self._random = tokenizer, rng
        self._pieces: dict[str, list[int]] = {}
        self._space: list[int] = []
        numbers = [self._piece(f" {self._number()}") for _ in range(64)]
        # Most tokenizers write the space before a number as a token: it belongs to the prompt.
        while len({tuple(n[: len(self._space) + 1]) for n in numbers}) == 1:
            self._space = numbers[0][: len(self._space) + 1]
        self._value_length = statistics.mode(map(len, numbers)) - len(self._space)
        self.intro = self._piece(INTRO)
        self.comma = self._piece(",") + self._space

    def keys(self, count: int) -> list[str]:
        keys: dict[str, None] = {}
        while len(keys) < count:
            keys[f"{self._random.choice(ADJECTIVES)}-{self._random.choice(NOUNS)}"] = None
        return list(keys)

    def values(self, count: int) -> list[Value]:
        values, taken = [], set()

        def fresh(fits: Callable[[list[int]], bool]) -> tuple[str, list[int]]:
            for _ in range(ATTEMPTS):
                text = self._number()
                tokens = encode(self._tokenizer, f" {text}")[len(self._space) :]
                if text not in taken and len(tokens) == self._value_length and fits(tokens):
                    taken.add(text)
                    return text, tokens
            raise ValueError(
                f"The tokenizer splits numbers of {DIGITS} digits too unevenly for needles: no two "
                "of as many tokens with none in common were found."
            )

        for _ in range(count):
            text, tokens = fresh(lambda _: True)
            _, wrong = fresh(lambda other, own=tokens: all(a != b for a, b in zip(own, other)))
            values.append(Value(tokens, wrong, text))
        return values

    def needle(self, key: str, value: list[int]) -> tuple[list[int], int]:
        """The sentence, and where in it the value starts."""
        before = encode(self._tokenizer, NEEDLE.format(key=key)) + self._space
        return before + value + self._piece("."), len(before)

    def question(self, keys: list[str], *, several: bool) -> list[int]:
        names = " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
        text = (SEVERAL if several else ONE).format(key=names)
        return encode(self._tokenizer, text) + self._space

    def filler(self, count: int) -> list[list[int]]:
        """Sentences of ``count`` tokens in all; the first one may have lost its beginning."""
        sentences, total = [], 0
        while total < count:
            sentences.append(self._sentence())
            total += len(sentences[-1])
        excess = total - count
        while excess > 0:
            cut = min(excess, len(sentences[0]))
            sentences[0] = sentences[0][cut:]
            excess -= cut
            if not sentences[0]:
                sentences.pop(0)
        return sentences

    def _sentence(self) -> list[int]:
        choice = self._random.choice
        words = (
            f" The {choice(ADJECTIVES)} {choice(NOUNS)} {choice(VERBS)} the {choice(ADJECTIVES)}"
        )
        words += f" {choice(NOUNS)}{choice(ENDINGS)}"
        tokens = []
        for word in words.split():
            tokens += self._piece(f" {word}")
        return tokens + self._piece(".")

    def _number(self) -> str:
        return str(self._random.randrange(10 ** (DIGITS - 1), 10**DIGITS))

    def _piece(self, text: str) -> list[int]:
        if text not in self._pieces:
            self._pieces[text] = encode(self._tokenizer, text)
        return self._pieces[text]


class SymbolWriter:
    """Keys, values and filler from the words of a tokenizer that has no English."""

    def __init__(self, tokenizer, rng: random.Random):
        self._tokenizer, self._random = tokenizer, rng
        self.intro, self.comma = [], []
        words = plain_words(tokenizer)
        needed = 2 * MANY * SYMBOLS
        if len(words) < needed + 2 * MANY:
            raise ValueError(
                f"The tokenizer cannot write needles: it has no words for English and digits, and "
                f"{len(words)} plain words of its own; expected at least {needed + 2 * MANY}."
            )
        rng.shuffle(words)
        shares = max(needed, len(words) // 3), max(MANY, len(words) // 4)
        self._values, self._keys = words[: shares[0]], words[shares[0] :][: shares[1]]
        self._filler = words[sum(shares) :]

    def keys(self, count: int) -> list[int]:
        return self._random.sample(self._keys, count)

    def values(self, count: int) -> list[Value]:
        drawn = self._random.sample(self._values, 2 * count * SYMBOLS)
        values = []
        for start in range(0, len(drawn), 2 * SYMBOLS):
            tokens, wrong = drawn[start:][:SYMBOLS], drawn[start + SYMBOLS :][:SYMBOLS]
            values.append(Value(tokens, wrong, self._tokenizer.decode(tokens)))
        return values

    def needle(self, key: int, value: list[int]) -> tuple[list[int], int]:
        return [key, *value], 1

    def question(self, keys: list[int], *, several: bool) -> list[int]:
        return list(keys)

    def filler(self, count: int) -> list[list[int]]:
        return [[self._random.choice(self._filler)] for _ in range(count)]


def encode(tokenizer, text: str) -> list[int]:
    """The tokens of a text as it goes on in the middle of another."""
    # Some tokenizers put a space before the first word of a text: a line break takes it.
    anchor = tokenizer.encode("\n", add_special_tokens=False)
    tokens = tokenizer.encode("\n" + text, add_special_tokens=False)
    if tokens[: len(anchor)] == anchor:
        return list(tokens[len(anchor) :])
    return list(tokenizer.encode(text, add_special_tokens=False))


def start_tokens(tokenizer) -> list[int]:
    """The token that a tokenizer starts every text with, if it does."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def writes_english(tokenizer) -> bool:
    """Whether a tokenizer takes the needles' English and digits and gives them back."""
    words = " ".join(ADJECTIVES + NOUNS + VERBS)
    unknown = tokenizer.unk_token_id
    for text in (INTRO, f"{NEEDLE}{ONE}{SEVERAL} 1234567890.", words):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if unknown is not None and unknown in tokens:
            return False
        if tokenizer.decode(tokens).split() != text.split():
            return False
    return True


def plain_words(tokenizer) -> list[int]:
    """The tokens that stand for a word and are no marks such as ``<eos>``, by their ids."""
    special = set(tokenizer.all_special_ids)
    words = []
    for token in sorted(set(tokenizer.get_vocab().values()) - special):
        text = tokenizer.decode([token]).strip()
        if not text or re.fullmatch(r"[<\[].*[>\]]", text):
            continue
        if list(tokenizer.encode(text, add_special_tokens=False)) == [token]:
            words.append(token)
    return words
