"""Ask a model about facts in reports it has never seen, at several lengths.

    python examples/demo/evaluate.py --lengths 2048 8192 32768 --questions 200 --out FILE

An answer is right when the greedy text up to the end token equals the value. Facts are drawn
evenly over the report, which is digested once for all its questions.
"""

import argparse
import copy
import json
import random
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from questions import Encoder, make_report, prompt

from mlx_hydra.loading import load

BUNDLE = Path(__file__).parent.parent.parent / "mlx_hydra" / "demo" / "model"

# Training batches count up from 20261123, one a step. No report's seed is among them: they are
# a million, a thousand for each token of length, and the report's number.
FIRST_SEED = 1_000_000
MAX_TOKENS = 16
DENSITY = 0.25
DEPTHS = 10


def answer(model, cache, ids: list[int], eos: int) -> list[int]:
    """Greedy tokens after a prompt, on a copy of the report's cache."""
    tokens = []
    steps = generate_step(
        mx.array(ids), model, prompt_cache=copy.deepcopy(cache), max_tokens=MAX_TOKENS
    )
    for token, _ in steps:
        if token == eos:
            break
        tokens.append(token)
    return tokens


def evaluate(model, encode: Encoder, length: int, questions: int, reports: int, step: int) -> dict:
    started = time.perf_counter()
    right, by_depth, wrong = 0, [[0, 0] for _ in range(DEPTHS)], []
    for index in range(reports):
        rng = random.Random(FIRST_SEED + 1000 * length + index)
        report = make_report(rng, encode, length, DENSITY)
        cache = model.make_cache()
        for start in range(0, len(report.ids), step):
            model(mx.array([report.ids[start : start + step]]), cache=cache)
            mx.eval([c.state for c in cache])
        share = questions * (index + 1) // reports - questions * index // reports
        for start, fact in rng.sample(report.facts, share):
            question = fact.question(rng)
            got = encode.pieces.decode(answer(model, cache, encode(prompt(question)), encode.eos))
            depth = min(DEPTHS - 1, start * DEPTHS // len(report.ids))
            by_depth[depth][1] += 1
            if got.strip() == fact.value:
                right += 1
                by_depth[depth][0] += 1
            elif len(wrong) < 5:
                wrong.append({"question": question, "expected": fact.value, "got": got.strip()})
    return {
        "tokens": length,
        "reports": reports,
        "questions": questions,
        "right": right,
        "accuracy": right / questions,
        "right_and_asked_by_tenth": by_depth,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLE)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--reports", type=int, default=20)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    model, _, _ = load(str(args.model))
    encode = Encoder(args.model)
    results = []
    for length in args.lengths:
        results.append(
            evaluate(model, encode, length, args.questions, args.reports, args.prefill_step_size)
        )
        print(json.dumps(results[-1]), flush=True)
        if args.out is not None:
            device = mx.device_info().get("device_name", str(mx.default_device()))
            content = {"device": device, "mlx": mx.__version__, "results": results}
            args.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
