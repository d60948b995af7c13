"""Draw the training curve that train.py wrote.

pip install matplotlib; python examples/demo/plot.py examples/demo/results/curve.csv OUT.png
"""

import argparse
import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIELDS = ("step", "seconds", "tokens", "length", "loss", "accuracy", "gradient norm")


def main(source: str, target: str) -> None:
    with open(source, newline="") as file:
        rows = [dict(zip(FIELDS, map(float, row))) for row in csv.reader(file)]
    minutes = [row["seconds"] / 60 for row in rows]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    top.plot(minutes, [row["loss"] for row in rows])
    top.set(yscale="log", ylabel="loss on answers")
    bottom.plot(minutes, [row["accuracy"] for row in rows], label="answer tokens right")
    bottom.set(ylabel="accuracy", xlabel="minutes", ylim=(0, 1.02))
    lengths = bottom.twinx()
    lengths.step(minutes, [row["length"] for row in rows], color="gray", where="post")
    lengths.set(yscale="log", ylabel="sequence length (gray)")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("curve", help="curve.csv of train.py")
    parser.add_argument("picture", help="PNG to write")
    args = parser.parse_args()
    main(args.curve, args.picture)
