"""Make the bundle that `python generate.py` runs on out of a training run.

    python examples/demo/bundle.py --tokenizer DIR --run DIR

Writes the model (bfloat16), a report of a little over 32K tokens, and questions about it to
mlx_hydra/demo/. The first question asks for a fact in the first tenth of the report.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
from questions import Encoder, make_report

from mlx_hydra.checkpoints.names import SHIM
from mlx_hydra.convert import SHIM_TEXT
from mlx_hydra.models.hydrahead import may_cast

HERE = Path(__file__).parent
BUNDLE = HERE.parent.parent / "mlx_hydra" / "demo"

# No training batch uses this seed: theirs count up from another by one a step.
REPORT_SEED = 7
TOKENS, DENSITY = 33_000, 0.25
POSITIONS = (0.05, 0.35, 0.65, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="--out of train.py")
    args = parser.parse_args()

    model = BUNDLE / "model"
    model.mkdir(parents=True, exist_ok=True)
    state = mx.load(str(args.run / "state.safetensors"))
    weights = {
        name: value.astype(mx.bfloat16) if may_cast(name) else value
        for full_name, value in state.items()
        if full_name.startswith("model.")
        for name in [full_name.removeprefix("model.")]
    }
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    shutil.copy(HERE / "config.json", model)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(args.tokenizer / name, model)
    shutil.copy(args.tokenizer / "chat_template.jinja", model)
    (model / SHIM).write_text(SHIM_TEXT)

    rng = random.Random(REPORT_SEED)
    report = make_report(rng, Encoder(args.tokenizer), TOKENS, DENSITY)
    (BUNDLE / "report.txt").write_text(report.text + "\n", encoding="utf-8")
    questions = []
    for wanted in POSITIONS:
        start, fact = min(report.facts, key=lambda f: abs(f[0] / len(report.ids) - wanted))
        questions.append(
            {
                "question": fact.question(rng),
                "answer": fact.value,
                "position": round(start / len(report.ids), 4),
            }
        )
    text = json.dumps({"questions": questions}, indent=2, ensure_ascii=False)
    (BUNDLE / "questions.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(report.ids)} tokens, {len(report.facts)} facts, {len(weights)} tensors")


if __name__ == "__main__":
    main()
