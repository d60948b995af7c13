"""How many questions on reports that it has never seen a model answers exactly.

    python examples/reproduction/evaluate.py --model MODEL --lengths 1024 2048 --out FILE

A model reads a report, the questions on it and their answers in one pass. An answer is right when
each of its tokens and its end token are the likeliest where they stand: greedy decoding would have
written just that.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from texts import PER_REPORT, TASKS, TOKENIZER, Document, Writer, exams

from mlx_hydra.loading import load

LENGTHS = (1024, 2048, 4096, 8192, 16384)
# Tokens of the reports that are read at once, and of each that a step reads.
TOKENS_AT_ONCE, STEP = 1 << 17, 512


def output_layer(model: nn.Module):
    return model.model.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head


def read(model: nn.Module, ids: np.ndarray, first: int) -> np.ndarray:
    """The likeliest next token at each position from ``first`` on, ``[B, T - first]``."""
    cache, hidden = make_prompt_cache(model), []
    for start in range(0, ids.shape[1], STEP):
        h = model.model(mx.array(ids[:, start : start + STEP]), cache=cache)
        if start + h.shape[1] > first:
            hidden.append(h[:, max(0, first - start) :])
        mx.eval(h, [c.state for c in cache])
    return np.array(mx.argmax(output_layer(model)(mx.concatenate(hidden, axis=1)), axis=-1))


def right_answers(model: nn.Module, documents: Sequence[Document]) -> list[list[bool]]:
    """For each document, whether each of its answers comes out exactly."""
    longest = max(len(document.ids) for document in documents)
    rows = max(1, TOKENS_AT_ONCE // longest)
    found = []
    for start in range(0, len(documents), rows):
        some = documents[start : start + rows]
        # What follows a document's last answer changes nothing before it.
        ids = np.zeros((len(some), max(len(d.ids) for d in some)), np.int32)
        for row, document in zip(ids, some):
            row[: len(document.ids)] = document.ids
        first = min(begin for d in some for begin, _ in d.answers) - 1
        said = read(model, ids, first)
        for row, words, document in zip(ids, said, some):
            found.append(
                [
                    bool((words[begin - 1 - first :][:count] == row[begin : begin + count]).all())
                    for begin, count in document.answers
                ]
            )
        mx.clear_cache()
    return found


def evaluate(model: nn.Module, task: str, length: int, documents: Sequence[Document]) -> dict:
    """Right answers: ``{task, length, questions, right, seconds}``."""
    started = time.perf_counter()
    right = [answer for answers in right_answers(model, documents) for answer in answers]
    return {
        "task": task,
        "length": length,
        "questions": len(right),
        "right": sum(right),
        "seconds": round(time.perf_counter() - started, 2),
    }


def exam_file(folder: Path, task: str, length: int) -> Path:
    return folder / f"{task}-{length}.jsonl"


def read_exams(path: Path, reports: int) -> list[Document]:
    """The first exams of a file that prepare.py wrote."""
    with path.open(encoding="utf-8") as file:
        documents = [Document(**json.loads(line)) for line in islice(file, reports)]
    if len(documents) < reports:
        raise ValueError(f"{path} has {len(documents)} reports, not {reports}: prepare.py again.")
    return documents


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder, mlx-lm's or ours")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--questions", type=int, default=64, help="of each task and length")
    parser.add_argument("--exams", type=Path, help="folder of prepare.py; else they are made now")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args(argv)
    model, _, _ = load(str(args.model))
    writer, results = Writer(TOKENIZER), []
    for length in args.lengths:
        for task in TASKS:
            reports = args.questions // PER_REPORT[task]
            if args.exams is None:
                documents = exams(writer, task, length, range(reports))
            else:
                documents = read_exams(exam_file(args.exams, task, length), reports)
            results.append(evaluate(model, task, length, documents))
            print(json.dumps(results[-1]), flush=True)
    if args.out is not None:
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.rename(args.out)


if __name__ == "__main__":
    main()
