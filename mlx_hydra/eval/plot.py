"""The picture of an evaluation: a heat map for each kind of needle, and perplexity by length."""

import importlib.util
import io
from pathlib import Path
from typing import Any

from ..needles import KINDS
from .results import write_whole

FORMATS = (".pdf", ".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise a ValueError unless a picture can be drawn to this file."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot {path}: expected a name that ends in {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mlx-hydra[plots]'.")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the cells of a run, as they stand in its results.

    Raises:
        OSError: the file cannot be written; one that was there stays.
    """
    from matplotlib.figure import Figure

    grids = {kind: [c for c in results["needles"] if c["kind"] == kind] for kind in KINDS}
    grids = {kind: cells for kind, cells in grids.items() if cells}
    panels = len(grids) + bool(results["perplexity"])
    figure = Figure(figsize=(1 + 4.5 * panels, 4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for kind, cells in grids.items():
        draw_grid(axes.pop(0), kind, cells)
    if axes:
        draw_perplexity(axes[0], results["perplexity"])
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=130)
    write_whole(path, picture.getvalue())


def draw_grid(axes, kind: str, cells: list[dict[str, Any]]) -> None:
    """A square a cell: the share of values found, and that of exact answers where it differs."""
    depths, lengths = (sorted({cell[name] for cell in cells}) for name in ("depth", "length"))
    shares = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        found, exact = f"{cell['found']:.0%}", f"{cell['exact']:.0%}"
        shares[row][column] = cell["found"]
        axes.text(
            column,
            row,
            found if found == exact else f"{found}\nexact {exact}",
            color="white" if cell["found"] > 0.6 else "black",
            horizontalalignment="center",
            verticalalignment="center",
        )
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(title=f"{kind}: values found", xlabel="tokens", ylabel="depth of the needle")


def draw_perplexity(axes, cells: list[dict[str, Any]]) -> None:
    lengths, perplexities = zip(
        *sorted(
            ((cell["length"], cell["perplexity"]) for cell in cells), key=lambda point: point[0]
        )
    )
    axes.plot(lengths, perplexities, marker="o")
    axes.set(title=f"perplexity of {cells[0]['file']}", xlabel="tokens of a window", xscale="log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
