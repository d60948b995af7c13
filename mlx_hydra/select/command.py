"""The select command: which heads of a Qwen3 model keep full attention, written as heads.json."""

import hashlib
import json
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mlx_lm.generate import wired_limit
from rich.progress import TimeRemainingColumn

from .. import __version__
from ..cli import ArgumentParser, as_option, command, progress_bar
from ..loading import find_model, fingerprint, load, read_config, tokenizer_fingerprint
from ..locks import locked_output
from . import choose, pictures
from .knockout import Point, curve_length, knockout_curve
from .measure import METHODS, Measured, is_result, measure
from .probes import Pair, builtin_pairs, in_turns, pairs_from_file
from .state import State, object_text, table_text, write_whole

BASELINES = ("random", "fixed", "layerwise")
BUILTIN = "builtin"
METHOD, RATIO, MIN_PER_LAYER, CONTEXT, PAIRS, SEED = METHODS[0], 0.25, 1, 4096, 6, 0
# Probes of each capability behind a point of the knockout curve, at most.
KNOCKOUT_PAIRS = 2


@command
def main(argv: Optional[list[str]] = None) -> None:
    options = build_parser().parse_args(argv)
    check_options(options)
    output = Path(options.output)
    with locked_output(output):
        check_absent(output)
        run(options)


def run(options: Namespace) -> None:
    """Measure where that is asked for, choose, and write all."""
    teacher = Teacher.find(options.model)
    # Before anything is measured: a choice that cannot be made.
    heads = choose_heads(options, teacher, np.zeros(teacher.shape))
    pairs, silenced, state, scores, points, details = [], None, None, None, None, {}
    found = {"method": options.method, "scores": None}
    made_by = {"model": options.model, "seed": options.seed or SEED}
    if options.scores is not None:
        found = read_scores(options.scores, teacher.shape)
        made_by = {"model": options.model} | found.pop("made_by", {})
    elif options.method not in BASELINES:
        pairs = scored_pairs(options, teacher)
        made_by |= probe_settings(options) | {"pairs": len(pairs)}
    if options.knockout or options.knockout_plot:
        silenced = knockout_pairs(options, teacher, made_by)

    if pairs:
        settings = probe_settings(options) | teacher.fingerprints
        method = settings["method"]
        check = partial(is_result, method=method, shape=teacher.shape)
        state = State(Path(options.output), settings, check)
        measured = run_measurement(teacher, pairs, method, state)
        details = measured.details
        found = {"method": method, "scores": measured.scores.tolist(), **details}
    if found["scores"] is not None:
        scores = np.array(found["scores"], dtype=np.float64)
        heads = choose_heads(options, teacher, scores)
    if silenced is not None:
        points = run_knockout(teacher, silenced, scores, made_by.get("seed", SEED))

    made_by |= {
        "mlx_hydra": __version__,
        "full_ratio": RATIO if options.full_ratio is None else options.full_ratio,
        "min_per_layer": least_per_layer(options),
        "granularity": options.granularity or choose.GRANULARITIES[0],
    }
    sizes = dict(zip(("num_layers", "num_heads"), teacher.shape))
    content = sizes | {"full_attention_heads": heads} | found | {"made_by": made_by}
    write_all(options, content, scores, points)
    if state is not None:
        state.remove()
    print_summary(options, teacher, heads, details, points)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Choose the heads of a Qwen3 model that keep full attention."
    )
    add = parser.add_argument
    add("--model", required=True, help="a Qwen3 model that mlx-lm loads: folder or repository")
    add(
        "--method",
        choices=(*METHODS, *BASELINES),
        help=f"causal is the paper's; the last three measure nothing ({METHOD})",
    )
    add("--scores", metavar="FILE", help="choose by an earlier heads.json; nothing is measured")
    add("--full-ratio", metavar="F", type=float, help=f"share of heads that stay full ({RATIO})")
    add(
        "--min-per-layer",
        metavar="N",
        type=int,
        help=f"full heads in each layer at least ({MIN_PER_LAYER})",
    )
    add("--granularity", choices=choose.GRANULARITIES, help="single heads, or whole KV groups")
    add("--probes", metavar="FILE", help=f"JSON lines to measure on, or {BUILTIN} (the default)")
    add("--context", metavar="N", type=int, help=f"tokens of a built-in probe ({CONTEXT})")
    add("--pairs", metavar="N", type=int, help=f"probes of each capability ({PAIRS}; a file: all)")
    add("--seed", metavar="N", type=int, help=f"of the probes, and of random choices ({SEED})")
    add("-o", "--output", metavar="FILE", default="heads.json", help="what to write (heads.json)")
    add("--plot", metavar="FILE", help="draw layers x heads, the chosen ones framed")
    add("--knockout", metavar="FILE", help="silence heads best first and at random: CSV or JSON")
    add("--knockout-plot", metavar="FILE", help="the same as a picture")
    return parser


def check_options(options: Namespace) -> None:
    """Raise a ValueError for options that do not go together, before anything is loaded."""
    measuring = ("probes", "context", "pairs")
    silencing = ("knockout", "knockout_plot")
    if options.method in BASELINES:
        refuse(options, ("scores", *measuring, *silencing), f"--method {options.method}")
    if options.method == "layerwise":
        refuse(options, ("min_per_layer", "granularity"), "--method layerwise: layers are whole")
    if options.scores is not None:
        refuse(options, ("method", "seed"), "--scores, whose method and seed are in the file")
        if not any(getattr(options, name) for name in silencing):
            refuse(options, measuring, "--scores: nothing is measured")
    if options.probes not in (None, BUILTIN):
        refuse(options, ("context",), "--probes of a file, whose prompts are as they are")
    for name in ("context", "pairs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected a number from 1 up.")
    if options.seed is not None and options.seed < 0:
        raise ValueError(f"--seed {options.seed}: expected a number from 0 up.")
    if (ratio := options.full_ratio) is not None:
        choose.check_ratio(ratio)
    for name in ("output", "plot", *silencing):
        if (path := getattr(options, name)) and not Path(path).parent.is_dir():
            raise ValueError(f"{as_option(name)} {path}: no such folder: {Path(path).parent}.")
    if options.knockout and Path(options.knockout).suffix not in (".csv", ".json"):
        raise ValueError(f"--knockout {options.knockout}: expected a name in .csv or .json.")
    for name in ("plot", "knockout_plot"):
        if path := getattr(options, name):
            pictures.check_picture(as_option(name), path)


def check_absent(output: Path) -> None:
    if output.exists():
        raise ValueError(f"--output {output} is there: remove it or choose another path.")


def refuse(options: Namespace, names: tuple[str, ...], why: str) -> None:
    """Raise a ValueError if one of the options is given."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"{as_option(name)} does not go with {why}.")


@dataclass
class Teacher:
    """The model whose heads are chosen; its weights are loaded when probes are asked for.

    shape: layers, and query heads of each.
    model, tokenizer: None until then.
    """

    path: Path
    config: dict[str, Any]
    shape: tuple[int, int]
    num_kv_heads: int
    model: Any = None
    tokenizer: Any = None

    @classmethod
    def find(cls, path_or_repo: str) -> "Teacher":
        """The folder and the sizes of a model.

        Raises:
            ValueError: no model, or one that is no Qwen3.
        """
        path = find_model(path_or_repo)
        config = read_config(path)
        where = path / "config.json"
        if config["model_type"] != "qwen3":
            raise ValueError(
                f"{where}: model_type {config['model_type']!r}: expected 'qwen3', the dense "
                "teacher whose heads are to be chosen."
            )
        names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in names:
            if not isinstance(config.get(name), int) or config[name] < 1:
                raise ValueError(f"{where}: {name}={config.get(name)!r}: expected a number over 0.")
        layers, heads, kv_heads = (config[name] for name in names)
        if heads % kv_heads:
            raise ValueError(f"{where}: {heads} heads cannot share {kv_heads} KV heads evenly.")
        return cls(path, config, (layers, heads), kv_heads)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the scores depend on of its files."""
        return {"model": fingerprint(self.path), "tokenizer": tokenizer_fingerprint(self.path)}

    def load(self) -> None:
        """Have model and tokenizer in memory."""
        if self.model is None:
            self.model, self.tokenizer, _ = load(str(self.path))

    def check(self, pairs: list[Pair]) -> None:
        """Raise a ValueError for probes that are not for this model."""
        longest = max(len(pair.clean_tokens) for pair in pairs)
        limit = self.config.get("max_position_embeddings")
        if limit is not None and longest > limit:
            raise ValueError(
                f"A probe has {longest} tokens with its answer, the model takes {limit}: expected "
                "a shorter --context, or shorter probes."
            )
        largest = max(max(pair.clean_tokens + pair.counterfactual) for pair in pairs)
        if largest >= self.config["vocab_size"]:
            raise ValueError(
                f"The tokenizer in {self.path} gives token {largest}, the model knows "
                f"{self.config['vocab_size']}: it is another model's."
            )


def scored_pairs(options: Namespace, teacher: Teacher) -> list[Pair]:
    """The probes that the scores will be from; the teacher is loaded for them.

    Raises:
        ValueError: probes that cannot be made or read, or are not for this model.
    """
    teacher.load()
    if options.probes in (None, BUILTIN):
        context, count = options.context or CONTEXT, options.pairs or PAIRS
        pairs = builtin_pairs(teacher.tokenizer, context, count, options.seed or SEED)
    else:
        pairs = in_turns(pairs_from_file(options.probes, teacher.tokenizer), options.pairs)
    teacher.check(pairs)
    return pairs


def knockout_pairs(options: Namespace, teacher: Teacher, made_by: dict[str, Any]) -> list[Pair]:
    """Probes to silence heads on: others than the scored ones, where there are any.

    Args:
        made_by: what the scores were made by, as far as it is known.

    Raises:
        ValueError: as in :func:`scored_pairs`.
    """
    teacher.load()
    count = min(options.pairs or KNOCKOUT_PAIRS, KNOCKOUT_PAIRS)
    earlier, which = made_by.get("probes"), "that were not scored"
    if options.probes in (None, BUILTIN):
        context = options.context or made_by.get("context", CONTEXT)
        pairs = builtin_pairs(teacher.tokenizer, context, count, made_by.get("seed", SEED) + 1)
        known = earlier is not None
    else:
        pairs = pairs_from_file(options.probes, teacher.tokenizer)
        same = made_by.get("probes_sha256") == digest_of(options.probes)
        scored = pairs[: made_by.get("pairs")] if same else []
        others = [pair for pair in pairs if pair not in scored]
        if not others:
            which = f"that were scored, too, as {options.probes} has no others"
        pairs = in_turns(others or pairs, count)
        known = same or earlier == BUILTIN
    if not known:
        which = "of which it is not known whether they were scored"
    teacher.check(pairs)
    tokens = sum(len(pair.answer) for pair in pairs)
    print(f"Heads will be silenced on {len(pairs)} probes ({tokens} tokens of answers) {which}.")
    return pairs


def probe_settings(options: Namespace) -> dict[str, Any]:
    """What the scores depend on beside the model, and the report tells of them."""
    if options.probes in (None, BUILTIN):
        probes = {"probes": BUILTIN, "context": options.context or CONTEXT}
    else:
        probes = {"probes": options.probes, "probes_sha256": digest_of(options.probes)}
    return {"method": options.method or METHOD, **probes, "seed": options.seed or SEED}


def digest_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run_measurement(teacher: Teacher, pairs: list[Pair], method: str, state: State) -> Measured:
    done = sum(number in state.results for number in range(len(pairs)))
    if done:
        print(f"Going on from {state.path}: {done} of {len(pairs)} probes are done.")
    bar = progress_bar(f"scoring ({method})", len(pairs), TimeRemainingColumn())
    with wired_limit(teacher.model), bar as advance:
        return measure(teacher.model, pairs, method, state, advance)


def run_knockout(teacher: Teacher, pairs: list[Pair], scores: np.ndarray, seed: int) -> list[Point]:
    order = choose.ranked(scores)
    total = curve_length(len(order), len(pairs))
    bar = progress_bar("silencing heads", total, TimeRemainingColumn())
    with wired_limit(teacher.model), bar as advance:
        return knockout_curve(teacher.model, pairs, order, seed, advance)


def least_per_layer(options: Namespace) -> int:
    if options.method == "layerwise":
        return 0
    return MIN_PER_LAYER if options.min_per_layer is None else options.min_per_layer


def choose_heads(options: Namespace, teacher: Teacher, scores: np.ndarray) -> choose.Heads:
    ratio = RATIO if options.full_ratio is None else options.full_ratio
    if options.method == "layerwise":
        return choose.choose_layers(teacher.shape, ratio)
    size = teacher.shape[1] // teacher.num_kv_heads if options.granularity == "group" else 1
    budget = choose.Budget(ratio, least_per_layer(options), size)
    if options.method == "fixed":
        return choose.choose_fixed(teacher.shape, budget)
    if options.method == "random":
        scores = np.random.default_rng(options.seed or SEED).random(teacher.shape)
    return choose.choose_by_scores(scores, budget)


def read_scores(path: str, shape: tuple[int, int]) -> dict[str, Any]:
    """What an earlier run found, without what it chose.

    Raises:
        ValueError: no such file, one without scores, or of a model of other sizes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--scores {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"--scores {path}: not JSON ({error}).") from error
    scores = content.get("scores") if isinstance(content, dict) else None
    if scores is None:
        raise ValueError(f"--scores {path}: it holds no scores; causal and attention make some.")
    try:
        array = np.array(scores)
    except ValueError:
        # Rows of different lengths.
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"--scores {path}: its scores are no table of numbers.")
    if array.shape != shape:
        raise ValueError(
            f"--scores {path}: made for another model: scores of shape {array.shape}, this model "
            f"has {shape[0]} layers of {shape[1]} heads."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"--scores {path}: its scores are not all finite.")
    check_made_by(content.get("made_by", {}), f"--scores {path}")
    chosen = ("num_layers", "num_heads", "full_attention_heads")
    return {"method": None} | {k: v for k, v in content.items() if k not in chosen}


def check_made_by(made_by: Any, where: str) -> None:
    """Raise a ValueError unless it tells, if at all, in numbers what the scores were made by."""
    if not isinstance(made_by, dict):
        raise ValueError(f"{where}: made_by={made_by!r}: expected an object.")
    for name, least in (("seed", 0), ("context", 1), ("pairs", 1)):
        value = made_by.get(name, least)
        if type(value) is not int or value < least:
            raise ValueError(
                f"{where}: its made_by has {name}={value!r}: expected a number from {least} up."
            )


def write_all(
    options: Namespace,
    content: dict[str, Any],
    scores: Optional[np.ndarray],
    points: Optional[list[Point]],
) -> None:
    """Write what was asked for; heads.json is the last, as a rerun starts from its absence.

    Raises:
        ValueError: it is there by now; nothing is written.
    """
    check_absent(Path(options.output))
    if options.plot:
        heads, num_heads = content["full_attention_heads"], content["num_heads"]
        pictures.draw_heads(Path(options.plot), heads, scores, num_heads)
    if options.knockout:
        write_whole(Path(options.knockout), table_text(Path(options.knockout), points))
    if options.knockout_plot:
        pictures.draw_knockout(Path(options.knockout_plot), points)
    write_whole(Path(options.output), object_text(content))


def print_summary(
    options: Namespace,
    teacher: Teacher,
    heads: choose.Heads,
    details: dict[str, Any],
    points: Optional[list[Point]],
) -> None:
    """Print what was measured and chosen, and where it is."""
    for name, found in details.get("capabilities", {}).items():
        if "answered" in found:
            print(
                f"{name}: {found['answered']} of {found['pairs']} probes are answered (the rest is "
                f"left out); readout {found['readout']:.2f}, counterfactual "
                f"{found['counterfactual_readout']:.2f}."
            )
    if cost := details.get("forward_passes_per_pair"):
        parts = ", ".join(f"{name} {passes:.2f}" for name, passes in cost.items())
        print(f"Cost of a pair in forward passes: {parts}; {sum(cost.values()):.2f} in all.")
    if (agreement := details.get("spearman_of_halves")) is not None:
        print(f"Spearman correlation of the scores from two halves of the probes: {agreement:.3f}.")
    if points is not None:
        chosen = [point for point in points if point.heads == points[-1].heads]
        random = np.mean([point.accuracy for point in chosen[1:]])
        print(
            f"Answers' tokens right: {points[0].accuracy:.0%}; with {chosen[0].heads} heads "
            f"silenced {chosen[0].accuracy:.0%} in score order, {random:.0%} at random."
        )
    layers, num_heads = teacher.shape
    full, group = sum(map(len, heads)), num_heads // teacher.num_kv_heads
    cached = sum(len({head // group for head in chosen}) for chosen in heads)
    print(
        f"{options.output}: {full} of {layers * num_heads} heads stay full "
        f"({full / (layers * num_heads):.1%}); the KV cache keeps {cached} of "
        f"{layers * teacher.num_kv_heads} KV heads."
    )
