"""What all runs share: text to learn from, probes to choose heads by, exams.

    python examples/reproduction/prepare.py --teacher TEACHER --out FOLDER

FOLDER gets, for each length of the recipe's stages, N.jsonl with documents of N tokens for
mlx_hydra.distill, tokens/ with what it would make of them, probes.jsonl for mlx_hydra.select,
calibration.txt for convert.py, and exams/ for evaluate.py.
"""

import argparse
import json
import multiprocessing
import random
from dataclasses import asdict
from pathlib import Path

import yaml
from evaluate import exam_file
from texts import (
    BOS,
    EOS,
    GOLDEN_RATIO,
    PER_REPORT,
    TASKS,
    TOKENIZER,
    Fact,
    Writer,
    drawn_for,
    exams,
    size,
)

RECIPE = Path(__file__).with_name("recipe.yaml")
# Documents that a worker makes at a time.
PORTION = 64
# A question's tokens at most.
QUESTION = 40
CALIBRATION_DOCUMENTS = 4

_writer = None


def start_worker() -> None:
    global _writer
    _writer = Writer(TOKENIZER)


def training_lines(task: tuple[int, range]) -> str:
    length, numbers = task
    documents = (_writer.document(drawn_for("distill", length, n), length) for n in numbers)
    return "".join(as_line({"text": document.text}) for document in documents)


def exam_lines(task: tuple[str, int, range]) -> str:
    return "".join(as_line(asdict(document)) for document in exams(_writer, *task))


def as_line(content: dict) -> str:
    return json.dumps(content) + "\n"


def probe(writer: Writer, task: str, context: int, number: int, depth: float) -> dict:
    """A prompt of ``context`` tokens, and the same with another value where the answer stands."""
    rng = drawn_for(f"probe {task}", context, number)
    while True:
        pieces, facts = writer.exam_report(rng, task, context - QUESTION, depth)
        fact = rng.choice(facts)
        question, answer = writer.question(rng, fact)
        other = distractor(writer, rng, fact)
        [piece] = [piece for piece in pieces if piece.fact == fact]
        text = "".join(piece.text for piece in pieces)
        left = context - 1 - size(pieces) - len(writer.encode(question))
        unique = piece.text.count(fact.value) == 1 and f" {other}" not in text
        if not unique or not writer.can_fill(left):
            continue
        writer.fill(rng, pieces, left)
        prompt = BOS + "".join(piece.text for piece in pieces) + question
        return {
            "prompt": prompt,
            "counterfactual_prompt": prompt.replace(
                piece.text, piece.text.replace(fact.value, other)
            ),
            "answer": answer,
            "distractor": f" {other}",
            "capability": task,
        }


def distractor(writer: Writer, rng: random.Random, fact: Fact) -> str:
    """Another value of the same attribute, of as many tokens, most of them others."""
    ids = writer.encode(f" {fact.value}")
    while True:
        other = writer.fact(rng).fact
        if other.attribute == fact.attribute:
            other_ids = writer.encode(f" {other.value}")
            same = sum(a == b for a, b in zip(ids, other_ids))
            if len(ids) == len(other_ids) and same <= len(ids) // 3:
                return other.value


def probes(writer: Writer, context: int, pairs: int) -> list[dict]:
    return [
        probe(writer, task, context, number, (0.5 + number * GOLDEN_RATIO) % 1)
        for number in range(pairs)
        for task in TASKS
    ]


def portions(count: int) -> list[range]:
    return [range(start, min(start + PORTION, count)) for start in range(0, count, PORTION)]


def write_lines(path: Path, lines) -> None:
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    partial.rename(path)


def make_tokens(task: tuple[str, str, int, str]) -> None:
    """The file of tokens that mlx_hydra.distill would make, for all runs at once."""
    from mlx_hydra.distill.config import Source
    from mlx_hydra.distill.data import tokens_file
    from mlx_hydra.loading import load_tokenizer, read_config, tokenizer_fingerprint

    teacher, folder, limit, data = task
    config = read_config(Path(teacher))
    tokenizer = load_tokenizer(Path(teacher), config)
    # The students carry the teacher's tokenizer.
    fingerprint = tokenizer_fingerprint(Path(teacher))
    source = Source(file=data)
    tokens_file(Path(folder), [source], tokenizer, config["vocab_size"], limit, fingerprint)


def without_first(stages: list[dict]) -> list[dict]:
    """The stages without the first, whose tokens the second has besides its own."""
    first, second, *others = stages
    return [second | {"tokens": first["tokens"] + second["tokens"]}, *others]


def token_limits(stages: list[dict]) -> list[tuple[int, int]]:
    """Length and number of tokens of all that mlx_hydra.distill asks for, the longest last."""
    limits = set()
    for stage in stages + without_first(stages):
        a_step = stage["batch_size"] * stage["length"]
        limits.add((stage["length"], -(-stage["tokens"] // a_step) * a_step + 1))
    return sorted(limits)


def data_file(folder: Path, length: int) -> Path:
    return folder.resolve() / f"{length}.jsonl"


def prepare(teacher: Path, out: Path, recipe: dict, only: str | None, workers: int) -> None:
    limits, evaluation = token_limits(recipe["distill"]["stages"]), recipe["evaluate"]
    out.mkdir(parents=True, exist_ok=True)
    if only in (None, "probes"):
        select = recipe["select"]
        found = probes(Writer(TOKENIZER), select["context"], select["pairs"])
        write_lines(out / "probes.jsonl", map(as_line, found))
    if only == "probes":
        return
    with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:
        for length, limit in dict(limits).items():
            tasks = [(length, numbers) for numbers in portions(-(-limit // length))]
            write_lines(data_file(out, length), pool.imap(training_lines, tasks))
        files = [
            (str(teacher), str(out / "tokens"), limit, str(data_file(out, length)))
            for length, limit in reversed(limits)
        ]
        waiting = [pool.apply_async(make_tokens, (file,)) for file in files]
        (out / "exams").mkdir(exist_ok=True)
        for length in sorted(evaluation["lengths"], reverse=True):
            for task in TASKS:
                reports = evaluation["questions"] // PER_REPORT[task]
                tasks = [(task, length, range(n, n + 1)) for n in range(reports)]
                lines = pool.imap(exam_lines, tasks)
                write_lines(exam_file(out / "exams", task, length), lines)
        for result in waiting:
            result.get()
    with data_file(out, min(dict(limits))).open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(CALIBRATION_DOCUMENTS), file)]
    write_lines(out / "calibration.txt", [text + EOS for text in texts])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--only", choices=("probes", "data"), help="one part of it")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)
    recipe = yaml.safe_load(args.recipe.read_text())
    prepare(args.teacher, args.out, recipe, args.only, args.workers)


if __name__ == "__main__":
    main()
