"""What a run is taken up again from: a checkpoint that is good, and only by the same run."""

import json
import shutil

import mlx.core as mx
import pytest
from checkpoint_files import convert, heads_file, leftovers, write_qwen3
from distill_runs import (
    SIZES,
    distill,
    figures,
    refusal,
    stage,
    write_config,
    write_folder,
    write_text,
)
from tiny import write_tokenizer

from mlx_hydra.distill.models import load_student
from mlx_hydra.distill.objectives import NextToken
from mlx_hydra.distill.state import Checkpoints, save_model

PLAIN = {"optimizer": "sgd", "schedule": "linear", "clip": None}
WILD = stage("logits", 6, learning_rate=1e30, **PLAIN)
TAME = {**WILD, "learning_rate": 0.01}
FIRST = stage("attention", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("distill"))


@pytest.fixture
def models(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def kept(path) -> set[str]:
    return leftovers(path.with_suffix("") / "checkpoints")


def stop_after_saving(monkeypatch, path, steps) -> None:
    """Run until a checkpoint is written, and no further."""
    save = Checkpoints.save

    def save_and_stop(self, state, optimizer):
        save(self, state, optimizer)
        if state.steps == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(SystemExit):
            distill(path)


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(save_every, models, capfd):
    """Also where the weights that gave it had been saved."""
    path = write_config(models / "run.yaml", [FIRST, WILD], save_every=save_every)
    line = refusal(capfd, path)
    good = models / "run" / "checkpoints" / "step-00000002"
    assert "stage 2, step 2: the loss is nan" in line
    assert f"the last good checkpoint is {good}. Lower learning_rate" in line
    assert kept(path) == {good.name} and not (models / "run" / "model").exists()
    out = distill(write_config(path, [FIRST, TAME], save_every=50))
    assert "changed since: save_every, stages[1].learning_rate" in capfd.readouterr().err
    assert figures(out, "stage") == [("1",)] * 2 + [("2",)] * 6
    assert kept(path) == {"step-00000008"}


def test_a_ruined_checkpoint_is_told_after_a_kill_too(models, capfd, monkeypatch):
    path = write_config(models / "run.yaml", [FIRST, WILD], save_every=1)
    stop_after_saving(monkeypatch, path, 3)
    assert kept(path) == {"step-00000002", "step-00000003"}
    assert "stage 2, step 2: the loss is nan; the last good" in refusal(capfd, path)
    assert kept(path) == {"step-00000002"}


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stage_that_fails_leaves_the_one_before(stopped, models, capfd, monkeypatch):
    path = write_config(models / "run.yaml", [FIRST, TAME], save_every=1)
    if stopped:
        stop_after_saving(monkeypatch, path, 2)
        assert kept(path) == {"step-00000001", "step-00000002"}
    gradients = NextToken.gradients

    def none(*args):
        grads, loss = gradients(*args)
        return grads, {**loss, "loss": mx.array(mx.nan)}

    monkeypatch.setattr(NextToken, "gradients", none)
    told = f"stage 2, step 1: the loss is nan; the last good checkpoint is {models}/run/"
    for _ in range(2):
        error = refusal(capfd, path)
        assert told in error and "step-00000002. The stage cannot begin:" in error
        assert kept(path) == {"step-00000002"}


def test_the_end_of_a_stage_is_proven_by_its_own_loss(models, capfd, monkeypatch):
    path = write_config(models / "run.yaml", [{**WILD, "tokens": 64}, FIRST], save_every=1)
    assert "stage 1, after its last step: the " in refusal(capfd, path)


def test_a_proven_checkpoint_is_not_removed(models, capfd, monkeypatch):
    path = write_config(models / "run.yaml", [WILD], save_every=1)
    stop_after_saving(monkeypatch, path, 1)
    # Nothing tells the only checkpoint from a good one.
    line = refusal(capfd, path)
    assert f"{models / 'run' / 'checkpoints' / 'step-00000001'} gives it at once. Remove" in line
    assert kept(path) == {"step-00000001"}


@pytest.mark.parametrize("before", [[], [FIRST]])
def test_no_model_is_made_of_an_update_that_ruined_it(before, models, capfd):
    last = {**WILD, "tokens": 64}
    path = write_config(models / "run.yaml", [*before, last])
    line = refusal(capfd, path)
    assert f"stage {len(before) + 1}, after its last step: the " in line and " is nan; " in line
    assert kept(path) == ({"step-00000002"} if before else set())
    assert not (models / "run" / "model").exists()
    out = distill(write_config(path, [*before, {**last, "learning_rate": 0.01}]))
    assert (out / "model").exists()


def test_nor_when_the_run_was_killed_before_it_was_seen(models, capfd, monkeypatch):
    path = write_config(models / "run.yaml", [FIRST, {**WILD, "tokens": 64}])
    stop_after_saving(monkeypatch, path, 3)
    assert "stage 2, after its last step: the " in refusal(capfd, path)
    assert kept(path) == {"step-00000002"} and not (models / "run" / "model").exists()


def test_a_model_that_is_not_finite_is_not_written(models):
    student = load_student(str(models / "student"))
    for value in (float("inf"), float("nan")):
        weights = {"model.norm.weight": mx.full((32,), value)}
        with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite in F32"):
            save_model(models / "saved", student, weights)
    assert not leftovers(models, "student", "teacher", "heads.json", "text.txt")


STAGES = [FIRST, stage("logits", 2)]


def reconvert(models) -> None:
    """As many heads as before, but others."""
    shutil.rmtree(models / "student")
    heads = heads_file(models / "other.json", [[2], [0, 1, 2, 3], [0, 3]], 4)
    convert(models / "teacher", models / "student", "--heads", heads)


def replace_teacher(models) -> None:
    shutil.rmtree(models / "teacher")
    write_qwen3(models / "teacher", seed=99, **SIZES)
    write_tokenizer(models / "teacher")


def change_tokenizer(models) -> None:
    path = models / "student" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_prefix_space": True}))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change, name, place",
    [
        (reconvert, "student", "student"),
        (replace_teacher, "teacher", "teacher"),
        (change_tokenizer, "tokenizer", "student"),
    ],
)
def test_another_model_at_the_same_place_is_refused(change, name, place, finished, models, capfd):
    path = write_config(models / "run.yaml", STAGES)
    out = distill(path)
    if not finished:
        shutil.rmtree(out / "model")
    change(models)
    line = refusal(capfd, path)
    assert f"{out} holds a run with another {name}: its files in {models / place} have" in line


def test_a_model_that_was_moved_back_or_copied_is_the_same(models):
    path = write_config(models / "run.yaml", STAGES)
    shutil.rmtree(distill(path) / "model")
    for name in ("student", "teacher"):
        shutil.copytree(models / name, models / "copy", copy_function=shutil.copyfile)
        shutil.rmtree(models / name)
        (models / "copy").rename(models / name)
    assert (distill(path) / "model").exists()


def test_a_finished_run_is_not_taken_for_another(models, capfd):
    path = write_config(models / "run.yaml", STAGES)
    out = distill(path)
    saved = (out / "model" / "model.safetensors").read_bytes()

    def line(stages=STAGES, **changes):
        return refusal(capfd, write_config(path, stages, **changes))

    assert "holds a run with seed=0, not 5: give that again, or another out" in line(seed=5)
    assert "stages[1].objective='logits', not 'next_token'" in line([FIRST, stage("next_token")])
    told = f"{out} holds a finished run with other"
    assert f"{told} stages[0].objective: give those again" in line([STAGES[1]] * 2)
    assert f"{told} data: give those again" in line(data=str(models / "heads.json"))
    more = [*STAGES, stage("next_token", 2)]
    assert f"{told} stages: give those again, or another out." in line(more)
    free = [{**s, "micro_batch": 1} for s in STAGES]
    distill(write_config(path, free, save_every=7, grad_checkpoint=False))
    assert "nothing is left to do" in capfd.readouterr().err
    assert (out / "model" / "model.safetensors").read_bytes() == saved
    shutil.rmtree(out / "model")
    assert len(figures(distill(write_config(path, more)), "loss")) == 6


@pytest.mark.parametrize("config", [None, {}])
def test_a_state_that_tells_less_is_gone_on_from(config, models, capfd):
    """As versions before wrote it."""
    path = write_config(models / "run.yaml", STAGES)
    out = distill(path)
    state = out / "checkpoints" / "step-00000004" / "state.json"
    content = json.loads(state.read_text())
    assert set(content.pop("models")) == {"student", "tokenizer", "teacher"}
    if config is not None:
        content["config"] = config
    state.write_text(json.dumps(content))
    distill(path)
    assert "nothing is left to do" in capfd.readouterr().err
    shutil.rmtree(out / "model")
    distill(path)
    reconvert(models)
    assert "with another student" in refusal(capfd, path)


def test_a_stage_under_way_ends_early_but_is_not_made_longer(models, capfd, monkeypatch):
    def config(steps, **changes):
        return write_config(models / "run.yaml", [stage("next_token", steps)], **changes)

    stop_after_saving(monkeypatch, config(6, save_every=2), 2)
    told = "the data is not what stage 1 was begun with, when its tokens were 384: give the same"
    for steps in (4, 8):
        assert told in refusal(capfd, config(steps))
    text = (models / "text.txt").read_bytes()
    write_text(models / "text.txt", seed=5)
    assert "the data is not what stage 1 was begun with: give" in refusal(capfd, config(6))
    (models / "text.txt").write_bytes(text)
    path = config(2)
    out = distill(path)
    assert len(figures(out, "loss")) == 2
    distill(path)
    assert "nothing is left to do" in capfd.readouterr().err
    assert "holds a finished run with other stages[0].tokens" in refusal(capfd, config(6))


def test_a_stage_that_has_all_of_the_text_is_made_longer(models, monkeypatch):
    write_text(models / "text.txt", words=100)
    schedule = {"schedule": "constant", "warmup": 0}
    paths = [
        write_config(models / f"{name}.yaml", [stage("next_token", 6, **schedule)], save_every=2)
        for name in ("whole", "longer")
    ]
    whole = distill(paths[0])
    write_config(paths[1], [stage("next_token", 4, **schedule)], save_every=2)
    stop_after_saving(monkeypatch, paths[1], 2)
    write_config(paths[1], [stage("next_token", 6, **schedule)])
    assert figures(distill(paths[1]), "step", "loss") == figures(whole, "step", "loss")
