"""A small task for LoRA: the demo model's questions, answered with every value said twice.

    python examples/lora/twice.py data DATA
    python examples/lora/twice.py ask DATA [--adapter-path ADAPTERS] [--model MODEL]

The first writes train.jsonl, valid.jsonl and test.jsonl; the second asks the questions of
test.jsonl and tells how many answers are right.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from mlx_lm import generate

from mlx_hydra.loading import load

EXAMPLES = Path(__file__).parent.parent
DEMO = EXAMPLES.parent / "mlx_hydra" / "demo" / "model"
sys.path.insert(0, str(EXAMPLES / "demo"))

from questions import Encoder, make_report  # noqa: E402

SIZES = {"train": 400, "valid": 20, "test": 50}


def examples(rng: random.Random, encode: Encoder, count: int, length: int):
    for _ in range(count):
        report = make_report(rng, encode, length, 0.6)
        _, fact = rng.choice(report.facts)
        question = f"{report.text}\n\n{fact.question(rng)}"
        yield {"prompt": question, "completion": f"{fact.value} {fact.value}"}


def write_data(folder: Path, seed: int, length: int) -> None:
    rng, encode = random.Random(seed), Encoder(DEMO)
    folder.mkdir(parents=True)
    for name, count in SIZES.items():
        lines = [json.dumps(example) for example in examples(rng, encode, count, length)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ask(folder: Path, model: str, adapter_path: str | None) -> None:
    model, tokenizer, _ = load(model, adapter_path)
    once = twice = 0
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for example in map(json.loads, lines):
        message = [{"role": "user", "content": example["prompt"]}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)
        text = generate(model, tokenizer, prompt, max_tokens=24).strip()
        expected = example["completion"]
        twice += text == expected
        once += text == expected[: len(expected) // 2]
    print(f"{len(lines)} questions: {once} answered once, {twice} answered twice.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("data", "ask"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--adapter-path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=128, help="tokens of a report, about")
    args = parser.parse_args()
    if args.what == "data":
        write_data(args.folder, args.seed, args.length)
    else:
        ask(args.folder, args.model, args.adapter_path)


if __name__ == "__main__":
    main()
