"""The demo that comes with the package: a small model, a long report, and questions about it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).parent.parent / "demo"
MODEL = DEMO / "model"
REPORT = DEMO / "report.txt"
QUESTIONS = DEMO / "questions.json"


@dataclass(frozen=True)
class Question:
    """A question about the report.

    position: where in the report its fact stands, from 0 to 1.
    """

    question: str
    answer: str
    position: float

    def is_answered_by(self, text: str) -> bool:
        """Whether the expected answer stands in a text as whole words."""
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text, re.IGNORECASE) is not None


def load_questions() -> list[Question]:
    """The bundled questions.

    Raises:
        FileNotFoundError: this installation lacks the demo.
    """
    for path in (MODEL, REPORT, QUESTIONS):
        if not path.exists():
            raise FileNotFoundError(
                f"The demo is not complete here ({path} is missing); name a model and a document "
                "with --model and --document."
            )
    content = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    return [
        Question(entry["question"], entry["answer"], entry["position"])
        for entry in content["questions"]
    ]
