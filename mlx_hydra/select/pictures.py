"""Pictures of scores and of knockout curves; matplotlib is imported when one is drawn."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np

from .knockout import Point

# The smallest squares that can still be told apart.
INCHES_A_HEAD, LEAST_INCHES = 0.2, 3.0


def check_picture(option: str, path: str) -> None:
    """Raise a ValueError unless a picture can be drawn to such a file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"{option} {path}: pictures need matplotlib: pip install 'mlx-hydra[plots]'."
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if (kind := Path(path).suffix.lstrip(".").lower()) not in known:
        raise ValueError(f"{option} {path}: {kind!r} is no kind of picture; expected .png or .pdf.")


def draw_heads(
    path: Path, heads: Sequence[Sequence[int]], scores: Optional[np.ndarray], num_heads: int
) -> None:
    """Layers x heads: the scores as shades where there are any, the full heads framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shape = len(heads), num_heads
    width, height = (max(LEAST_INCHES, INCHES_A_HEAD * n) + 1.5 for n in reversed(shape))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.zeros(shape) if scores is None else scores, cmap="Blues")
    if scores is not None:
        figure.colorbar(image, label="score", shrink=0.7)
    for layer, chosen in enumerate(heads):
        for head in chosen:
            frame = (head - 0.5, layer - 0.5)
            axes.add_patch(Rectangle(frame, 1, 1, fill=False, edgecolor="tab:red", linewidth=1.2))
    total = sum(map(len, heads))
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set(
        xlabel="head",
        ylabel="layer",
        title=f"{total} of {shape[0] * shape[1]} heads stay full (framed)",
    )
    save(figure, path)


def draw_knockout(path: Path, points: Sequence[Point]) -> None:
    """Readout and accuracy over the number of silenced heads; random orders in gray."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    orders = list(dict.fromkeys(point.order for point in points))
    axes = figure.subplots(2, 1, sharex=True)
    for axis, name in zip(axes, ("readout", "accuracy")):
        for order in reversed(orders):
            line = [point for point in points if point.order == order]
            scored = order == "scores"
            label = "in score order" if scored else "at random" if order == orders[-1] else None
            axis.plot(
                [point.heads for point in line],
                [getattr(point, name) for point in line],
                color="tab:blue" if scored else "0.6",
                marker=".",
                label=label,
            )
        axis.set_ylabel("readout (logits)" if name == "readout" else "answer tokens right")
        axis.grid(alpha=0.3)
    axes[0].legend()
    silenced = sorted({point.heads for point in points})
    axes[1].set(xlabel="heads silenced", xscale="symlog", ylim=(0, 1.02))
    axes[1].set_xticks(silenced, labels=list(map(str, silenced)), minor=False)
    axes[1].minorticks_off()
    save(figure, path)


def save(figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    partial = path.parent / f".{os.getpid()}.{path.name}"
    try:
        figure.savefig(partial, dpi=150)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.strerror}.") from error
