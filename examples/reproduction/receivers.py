"""Scores of the receivers alone, out of a heads.json of mlx_hydra.select's causal method.

    python examples/reproduction/receivers.py HEADS OUT

A head's score is what the answer loses where the head's own output is swapped, if that is over the
threshold of a head that counts; what it sends to others is left out.
"""

import json
import sys
from pathlib import Path

import numpy as np

from mlx_hydra.select.causal import THRESHOLD, fuse


def main(argv: list[str]) -> None:
    source, out = map(Path, argv)
    content = json.loads(source.read_text())
    receivers = [np.array(found["receiver"]) for found in content["capabilities"].values()]
    scores = fuse([np.where(scores > THRESHOLD, scores, 0) for scores in receivers])
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(content | {"scores": scores.tolist()}) + "\n")
    partial.rename(out)


if __name__ == "__main__":
    main(sys.argv[1:])
