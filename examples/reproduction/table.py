"""The tables and the plot of docs/reproduction.md out of results.json.

    python examples/reproduction/table.py RESULTS.json --plot docs/reproduction.png \
        --into docs/reproduction.md

Per cent of questions answered exactly: the mean over seeds and, in brackets, the lowest and the
highest. Without --into the tables are printed; with it they replace what stands between the two
marks in that file.
"""

import argparse
import json
from pathlib import Path

START, END = "<!-- tables -->", "<!-- end of tables -->"
METHODS = ("causal", "attention", "random", "fixed", "layerwise")
TASKS = ("single", "multi_key")
# Whether causal selection pays is judged at so many times the shortest length.
JUDGED = 8

Runs = list[dict]


def percent(run: dict, task: str, length: int) -> float:
    [entry] = [e for e in run["accuracy"] if (e["task"], e["length"]) == (task, length)]
    return 100 * entry["right"] / entry["questions"]


def lengths_of(runs: Runs) -> list[int]:
    return sorted({entry["length"] for run in runs for entry in run["accuracy"]})


def of_method(runs: Runs, method: str, ratio: float) -> Runs:
    wanted = (method, ratio, None)
    return [run for run in runs if (run["method"], run["ratio"], run["ablation"]) == wanted]


def in_words(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.0f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.0f}-{max(values):.0f})"


def as_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_in_words(ratio: float) -> str:
    return f"{1 / ratio - 1:.0f}:1"


def accuracy_table(runs: Runs, rows: dict[str, Runs], task: str) -> str:
    lengths = lengths_of(runs)
    found = [
        [name, str(len(own)), *(in_words([percent(r, task, n) for r in own]) for n in lengths)]
        for name, own in rows.items()
        if own
    ]
    return as_table([f"{task}, tokens:", "seeds", *(f"{n:,}" for n in lengths)], found)


def ratios_of(runs: Runs) -> list[float]:
    return sorted({run["ratio"] for run in runs if run["method"] in METHODS})


def by_method(runs: Runs, ratio: float) -> dict[str, Runs]:
    teacher = [run for run in runs if run["method"] == "teacher"]
    return {"teacher": teacher} | {name: of_method(runs, name, ratio) for name in METHODS}


def ablation_rows(runs: Runs) -> dict[str, Runs]:
    ablated = [run for run in runs if run["ablation"]]
    if not ablated:
        return {}
    first = ablated[0]
    same = [r for r in of_method(runs, first["method"], first["ratio"]) if r["seed"] == 0]
    return {f"{first['method']}, whole": same} | {run["ablation"]: [run] for run in ablated}


def verdict(runs: Runs, ratio: float) -> str:
    """Causal against each other method at the judged length, in percentage points."""
    length = JUDGED * lengths_of(runs)[0]
    causal, rows = of_method(runs, "causal", ratio), []
    for task in TASKS:
        ours = [percent(run, task, length) for run in causal]
        for name in METHODS[1:]:
            theirs = [percent(run, task, length) for run in of_method(runs, name, ratio)]
            if ours and theirs:
                margin = sum(ours) / len(ours) - sum(theirs) / len(theirs)
                apart = "yes" if min(ours) > max(theirs) else "no"
                rows.append([task, name, in_words(ours), in_words(theirs), f"{margin:+.0f}", apart])
    header = ["task", "causal against", "causal", "the other", "margin", "no seed overlaps"]
    return as_table(header, rows)


def place_of(run: dict) -> tuple:
    """Where a run stands in a table of all: whatever their processes finished first."""
    order = [*METHODS, "teacher"]
    return run["ratio"], run["ablation"] or "", order.index(run["method"]), run["seed"]


def loss_table(runs: Runs) -> str:
    rows = []
    for run in sorted(runs, key=place_of):
        if "losses" in run:
            stages = {stage["objective"]: f"{stage['last']:.4f}" for stage in run["losses"]}
            heads = " ".join(str(len(layer)) for layer in run["full_attention_heads"])
            name = run["method"] if run["ablation"] is None else f"causal, {run['ablation']}"
            place = [name, ratio_in_words(run["ratio"]), str(run["seed"]), heads]
            losses = [stages.get(name, "") for name in ("attention", "logits", "next_token")]
            rows.append([*place, *losses, f"{sum(run['seconds'].values()):.0f}"])
    header = ["method", "ratio", "seed", "full heads by layer", "attention", "logits"]
    return as_table([*header, "next token", "seconds"], rows)


def tables(results: dict) -> str:
    runs = list(results["runs"].values())
    parts = [f"{results['device']}, MLX {results['mlx']}."]
    for ratio in ratios_of(runs):
        parts.append(f"### LA:FA {ratio_in_words(ratio)}")
        parts += [accuracy_table(runs, by_method(runs, ratio), task) for task in TASKS]
        if lengths_of(runs)[-1] >= JUDGED * lengths_of(runs)[0]:
            parts.append(f"At {JUDGED} times the training length, in points:")
            parts.append(verdict(runs, ratio))
    if rows := ablation_rows(runs):
        parts.append("### Ablations")
        parts += [accuracy_table(runs, rows, task) for task in TASKS]
    parts += ["### Losses at the end of each stage", loss_table(runs)]
    if selection := results["selection"]:
        parts.append("### Selection")
        parts += [selection_in_words(name, found) for name, found in selection.items()]
    return "\n\n".join(parts)


def selection_in_words(name: str, found: dict) -> str:
    halves = found["spearman_of_halves"]
    agreement = "not to be had" if halves is None else f"{halves:.2f}"
    probes = ", ".join(
        f"{task} {values.get('answered', values['pairs'])} of {values['pairs']} pairs"
        for task, values in found["capabilities"].items()
    )
    return f"{name}: {probes}; Spearman's correlation of the halves {agreement}."


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(results["runs"].values())
    ratios, lengths = ratios_of(runs), lengths_of(runs)
    size = 4.2 * len(ratios) + 1.2, 6.4
    figure, panels = pyplot.subplots(
        len(TASKS), len(ratios), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for row, task in zip(panels, TASKS):
        for panel, ratio in zip(row, ratios):
            for number, (name, own) in enumerate(by_method(runs, ratio).items()):
                if not own:
                    continue
                values = [[percent(run, task, n) for run in own] for n in lengths]
                style = {"color": "grey", "linestyle": "--"}
                if name != "teacher":
                    style = {"color": f"C{number - 1}", "marker": "o"}
                panel.plot(lengths, [sum(v) / len(v) for v in values], label=name, **style)
                bounds = [min(v) for v in values], [max(v) for v in values]
                panel.fill_between(lengths, *bounds, color=style["color"], alpha=0.15)
            panel.set_title(f"{task}, LA:FA {ratio_in_words(ratio)}", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=8)
            panel.set_ylim(-3, 103)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    for row in panels:
        row[0].set_ylabel("answered, %")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def put_into(path: Path, text: str) -> None:
    content = path.read_text(encoding="utf-8")
    before, start, rest = content.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{path} has no {START} and {END}.")
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of run.py")
    parser.add_argument("--into", type=Path, help="a Markdown file with the two marks")
    parser.add_argument("--plot", type=Path, help="draw accuracy over length")
    args = parser.parse_args(argv)
    results = json.loads(args.results.read_text())
    if args.plot is not None:
        plot(results, args.plot)
    if args.into is None:
        print(tables(results))
    else:
        put_into(args.into, tables(results))


if __name__ == "__main__":
    main()
