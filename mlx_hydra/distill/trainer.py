"""The stages, one after the other, from wherever an earlier run was stopped."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..loading import tokenizer_fingerprint
from ..locks import locked
from .config import Config, Stage
from .data import Sequences, tokens_file
from .models import HIDDEN_SIZES, LOGIT_SIZES, fingerprints, load_student, load_teacher
from .objectives import Attention, NextToken
from .parallel import Processes
from .report import LossFile, training_progress
from .state import Checkpoints, State, check_finished, check_same_run, save_model

Weights = dict[str, mx.array]

MODEL, LOSSES = "model", "losses.csv"


class Run:
    """A distillation in its folder.

    Raises:
        ValueError: models that do not match, data that cannot be used, or a folder that holds
            another run.
    """

    def __init__(self, config: Config, note: Callable[[str], None]):
        self.config, self.note = config, note
        self.out = Path(config.out).expanduser()
        self.dtype = getattr(mx, config.dtype)
        self.processes = Processes()
        for stage in config.stages:
            at_once = stage.micro_batch * self.processes.size
            if stage.batch_size % at_once:
                raise ValueError(
                    f"batch_size={stage.batch_size} is not a multiple of {at_once}: "
                    f"{self.processes.size} processes of micro_batch={stage.micro_batch}."
                )
        self.student = load_student(config.student)
        self.teacher: Optional[nn.Module] = None
        self._load_teacher(config.stages)
        self.checkpoints = Checkpoints(self.out)
        self.state = State()
        self._changed: dict[str, Any] = {}
        self._longest_sequences()

    def train(self) -> Path:
        """Run what is left of the stages, and write the model; its folder.

        Raises:
            ValueError: the loss is not a number, and the last good checkpoint stays; or the
                folder holds another run.
            OSError: the disk is full; the last checkpoint stays.
        """
        model = self.out / MODEL
        done = {"done": mx.array(int(model.exists()))}
        if self.processes.from_first(done)["done"].item():
            if self.processes.first:
                self._check_finished()
            self.note(f"{model} is there already: nothing is left to do.")
            return model
        self.out.mkdir(parents=True, exist_ok=True)
        lock = locked(self.out, self.out) if self.processes.first else nullcontext()
        with lock, self.processes.told_apart():
            self._train_stages()
            if self.processes.first:
                self.checkpoints.record(self.state)
                save_model(model, self.student, self.state.weights)
            self.processes.wait()
        return model

    def _train_stages(self) -> None:
        self._resume()
        left = range(self.state.stage, len(self.config.stages))
        # All of them now: what is wrong with the last stage's text is not to be found after days.
        sequences = {number: self._sequences(number) for number in left}
        losses = None
        if self.processes.first:
            losses = LossFile(self.out / LOSSES, self.state.stage, self.state.step)
        for number in left:
            if number > self.state.stage:
                self.state.stage, self.state.step = number, 0
                self.state.checksum, self.state.slots = None, {}
            self._load_teacher(self.config.stages[number:])
            self._train_stage(self.config.stages[number], sequences[number], losses)

    def _load_teacher(self, stages: list[Stage]) -> None:
        """Have the teacher in memory while one of these stages asks for it."""
        objectives = {stage.objective for stage in stages}
        if objectives == {"next_token"}:
            self.teacher = None
        elif self.teacher is None:
            sizes = LOGIT_SIZES if "attention" not in objectives else HIDDEN_SIZES + LOGIT_SIZES
            self.teacher = load_teacher(self.config.teacher, self.student, sizes, self.dtype)

    def _longest_sequences(self) -> None:
        positions = self.student.args.max_position_embeddings
        longest = max(stage.length for stage in self.config.stages)
        if longest > positions:
            self.note(f"length {longest:,}: the model is made for {positions:,} tokens.")

    def _fingerprints(self) -> dict[str, str]:
        return fingerprints(self.student, None if self.teacher is None else self.config.teacher)

    def _check_finished(self) -> None:
        state = self.checkpoints.load(arrays=False)
        if state.steps:
            check_finished(state, self.config, self._fingerprints(), self.out)

    def _resume(self) -> None:
        if self.processes.first:
            self.state, models = self.checkpoints.load(), self._fingerprints()
            if self.state.steps:
                finished = self.state.is_finished(len(self.config.stages))
                check = check_finished if finished else check_same_run
                self._changed = check(self.state, self.config, models, self.out)
                also = f"; changed since: {', '.join(self._changed)}" if self._changed else ""
                self.note(
                    f"{self.out}: going on after step {self.state.step} of stage "
                    f"{self.state.stage + 1}{also}."
                )
            self.state.models = models
        state = self.state
        place = mx.array([state.stage, state.step, state.steps, state.checksum or 0], mx.uint32)
        given = self.processes.from_first({"place": place})["place"].tolist()
        state.stage, state.step, state.steps = given[:3]
        state.checksum = given[3] if state.steps else None
        state.config = asdict(self.config)

    def _objective(self, stage: Stage):
        if stage.objective == "attention":
            return Attention(self.student, self.teacher, self.dtype)
        of_teacher = {}
        if stage.objective == "logits":
            of_teacher = {
                "teacher": self.teacher,
                "kl_weight": stage.kl_weight,
                "ce_weight": stage.ce_weight,
            }
        return NextToken(
            self.student, self.dtype, grad_checkpoint=self.config.grad_checkpoint, **of_teacher
        )

    def _sequences(self, number: int) -> Sequences:
        stage, path = self.config.stages[number], None
        limit = stage.steps * stage.batch_size * stage.length + 1
        # One after the other: where the disk is shared, the others find what the first has made.
        for turn in (True, False):
            if self.processes.first == turn:
                path = tokens_file(
                    self.out / "data",
                    stage.data or self.config.data,
                    self.student.tokenizer,
                    self.student.args.vocab_size,
                    limit,
                    tokenizer_fingerprint(self.student.reader.folder),
                )
            self.processes.wait()
        sequences = Sequences(path, stage.length, self.config.seed + number)
        passes = stage.steps * stage.batch_size / sequences.count
        if passes > 1:
            self.note(
                f"stage {number + 1} goes through its {len(sequences.tokens):,} tokens "
                f"{passes:,.1f} times."
            )
        return sequences

    def _check_data(self, sequences: Sequences) -> None:
        checksum = sequences.checksum()
        self.processes.expect_same(checksum, "data")
        if self.state.checksum not in (None, checksum):
            tokens = self._changed.get(f"stages[{self.state.stage}].tokens")
            why = "" if tokens is None else f", when its tokens were {tokens:,}"
            raise ValueError(
                f"{self.out}: the data is not what stage {self.state.stage + 1} was begun with"
                f"{why}: give the same, or another out."
            )
        self.state.checksum = checksum

    def _train_stage(self, stage: Stage, sequences: Sequences, losses: Optional[LossFile]) -> None:
        state = self.state
        if state.step < stage.steps:
            self._check_data(sequences)
        objective = self._objective(stage)
        trained = self._trained_weights(objective)
        optimizer = stage.make_optimizer()
        optimizer.init(trained)
        state.hand_to(optimizer)
        self._agree(optimizer, trained)
        update = optimizer.apply_gradients
        if on_gpu():
            # A kernel for each weight, where op by op it is two dozen.
            update = mx.compile(update, inputs=optimizer.state, outputs=optimizer.state)
        names = list(trained)
        del trained  # Else the weights that the stage began with would stay.
        per_step = stage.batch_size * stage.length
        title = f"stage {state.stage + 1} of {len(self.config.stages)} ({stage.objective})"
        mx.reset_peak_memory()
        with training_progress(title, stage.steps * per_step, state.step * per_step) as show:
            while state.step < stage.steps:
                start = time.perf_counter()
                figures = self._step(stage, objective, names, sequences, optimizer, update)
                tokens = state.step * per_step
                row = {
                    "stage": state.stage + 1,
                    "objective": stage.objective,
                    "step": state.step,
                    "tokens": tokens,
                    **figures,
                    "learning_rate": optimizer.learning_rate.item(),
                    "tokens_per_second": round(per_step / (time.perf_counter() - start), 1),
                    "peak_memory_bytes": mx.get_peak_memory(),
                }
                if losses is not None:
                    losses.add(row)
                    show(tokens, row)
                    if state.step == stage.steps or state.step % self.config.save_every == 0:
                        self.checkpoints.save(state, optimizer)
        # No step follows that would show what the last update did: the next stage's may fail for
        # reasons of its own.
        self._gradients(stage, objective, names, sequences)

    def _trained_weights(self, objective) -> Weights:
        """The float32 weights of a stage, as the stages before left them.

        Always in the same order, in which the norm of their gradient is added up.
        """
        reader, weights = self.student.reader, self.state.weights
        names = [name for name in sorted(reader.tensors) if objective.trains(name)]
        for name in names:
            if name not in weights:
                weights[name] = reader.read(name).astype(mx.float32)
        return {name: weights[name] for name in names}

    def _agree(self, optimizer: optim.Optimizer, trained: Weights) -> None:
        """Give all processes the first one's weights and optimizer."""
        from_first = self.processes.from_first
        self.state.weights |= from_first(trained)
        for name in trained:
            optimizer.state[name] = from_first(optimizer.state[name])
        mx.eval(self.state.weights, optimizer.state)

    def _step(self, stage, objective, trained, sequences, optimizer, update) -> dict[str, float]:
        """Train on the next sequences; the loss, its parts and the norm of the gradient."""
        state = self.state
        grads, figures = self._gradients(stage, objective, trained, sequences)
        weights = {name: state.weights[name] for name in trained}
        state.weights |= update(grads, weights)
        state.step, state.steps = state.step + 1, state.steps + 1
        # Their memory can then be that of what is made from them.
        del weights, grads
        mx.eval(state.weights, optimizer.state)
        return figures

    def _gradients(self, stage, objective, trained, sequences) -> tuple[Weights, dict[str, float]]:
        """The clipped gradient on the next sequences; the loss, its parts, the gradient's norm.

        Raises:
            ValueError: the loss or the norm is not finite; the last good checkpoint is left.
        """
        state, processes = self.state, self.processes
        weights = {name: state.weights[name] for name in trained}
        share = stage.batch_size // processes.size
        first = state.step * stage.batch_size + processes.rank * share
        grads = figures = None
        for start in range(first, first + share, stage.micro_batch):
            tokens = sequences.rows(range(start, start + stage.micro_batch))
            found = objective.gradients(weights, tokens)
            grads, figures = found if grads is None else map(add, (grads, figures), found)
            mx.eval(grads, figures)
            del found
        rounds = share // stage.micro_batch
        grads, figures = (
            processes.average({name: value / rounds for name, value in part.items()})
            for part in (grads, figures)
        )
        grads, norm = optim.clip_grad_norm(grads, stage.clip or math.inf)
        figures = {**figures, "gradient_norm": norm}
        figures = {name: value.item() for name, value in figures.items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(figures[name]):
                raise ValueError(self._not_finite(name, figures[name]))
        if processes.first:
            self.checkpoints.keep_newest()
        return grads, figures

    def _not_finite(self, name: str, value: float) -> str:
        state = self.state
        over = state.step == self.config.stages[state.stage].steps
        step = "after its last step" if over else f"step {state.step + 1}"
        what = f"stage {state.stage + 1}, {step}: the {name.replace('_', ' ')} is {value}"
        if not self.processes.first:
            return f"{what}."
        self.checkpoints.drop_ruined(state)
        kept = self.checkpoints.newest()
        cure = "Lower learning_rate or clip, and run the same command to go on from there."
        if kept is None:
            left = "there is no good checkpoint yet"
            cure = "Lower learning_rate or clip, and run the same command to begin anew."
        elif state.step == 0:
            left = f"the last good checkpoint is {kept}"
            cure = "The stage cannot begin: look at its teacher and its text."
        elif kept == self.checkpoints.place(state):
            left = f"{kept} gives it at once"
            cure = "Remove that checkpoint to begin anew, or choose another out."
        else:
            left = f"the last good checkpoint is {kept}"
        return f"{what}; {left}. {cure}"


def add(a: Weights, b: Weights) -> Weights:
    return {name: a[name] + b[name] for name in a}


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu
