"""What a user can mend is one line, and the run's last good checkpoint stays."""

import json
import shutil
import sys

import mlx.core as mx
import pytest
import yaml
from checkpoint_files import convert, leftovers, read_bytes, write_qwen3
from distill_runs import (
    SIZES,
    distill,
    figures,
    refusal,
    stage,
    write_config,
    write_folder,
    write_models,
    write_text,
)
from tiny import write_tokenizer

from mlx_hydra.checkpoints import writer
from mlx_hydra.distill import report, trainer
from mlx_hydra.distill.command import main
from mlx_hydra.distill.config import load_config, presets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("distill"))


@pytest.fixture
def models(folder, tmp_path):
    """Models and text of their own for a test that spoils them."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2 and 3"),
        ({"hidden_size": 64}, "hidden_size is 64 and 32"),
        ({"vocab_size": 67}, "vocab_size is 67 and 61"),
        ({"head_dim": 8}, "head_dim is 8 and 16"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8 and 4"),
    ],
)
def test_a_teacher_that_does_not_match_is_told_by_size(changes, message, models, capfd):
    shutil.rmtree(models / "teacher")
    write_qwen3(models / "teacher", **{**SIZES, **changes})
    line = refusal(capfd, write_config(models / "run.yaml", [stage("attention")]))
    assert f"teacher {models / 'teacher'} and student {models / 'student'} do not match" in line
    assert message in line
    assert not (models / "run").exists()


def test_logits_alone_ask_for_the_vocabulary_alone(models):
    shutil.rmtree(models / "teacher")
    write_qwen3(models / "teacher", **{**SIZES, "hidden_size": 64, "tie_word_embeddings": True})
    out = distill(write_config(models / "run.yaml", [stage("logits", 1)]))
    assert len(figures(out, "kl")) == 1


def test_models_of_another_kind_are_told(models, capfd):
    def line(**changes):
        return refusal(capfd, write_config(models / "run.yaml", [stage("logits")], **changes))

    student, teacher = str(models / "student"), str(models / "teacher")
    assert "its model_type is 'qwen3'; expected 'hydrahead'" in line(student=teacher)
    assert "its model_type is 'hydrahead'; expected 'qwen3'" in line(teacher=student)
    assert "no such folder; make it with convert.py" in line(student="nowhere")
    assert "teacher nowhere: no such folder" in line(teacher="nowhere")
    config = json.loads((models / "student" / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (models / "student" / "config.json").write_text(json.dumps(config))
    assert "it is quantised; train it before it is quantised" in line()


def test_a_student_that_is_all_teacher_has_nothing_to_train(tmp_path, capfd):
    write_qwen3(tmp_path / "teacher", **SIZES)
    write_tokenizer(tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "student", "--all-full", "--recipe", "exact")
    write_text(tmp_path / "text.txt")
    line = refusal(capfd, write_config(tmp_path / "run.yaml", [stage("attention")]))
    assert "every layer is the teacher's own" in line


def test_data_of_a_later_stage_is_read_before_the_first(models, capfd):
    (models / "bad.txt").write_bytes(b"w1 \xff")
    stages = [stage("attention"), stage("next_token", data=str(models / "bad.txt"))]
    line = refusal(capfd, write_config(models / "run.yaml", stages))
    assert f"data {models / 'bad.txt'}: not UTF-8 text (byte 3 is 0xff)" in line
    assert not (models / "run" / "losses.csv").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"studnt": "x"}, "run.yaml.studnt is not a field; did you mean 'student'?"),
        ({"stages": []}, "stages=[]: expected a list of at least one stage"),
        ({"stages": [5]}, "stages[0]: expected fields and their values"),
        ({"stages": [{"tokens": 5}]}, "stages[0]: objective is missing"),
        ({"stages": [stage("logit")]}, "did you mean 'logits'?"),
        (
            {"stages": [stage("logits"), stage("logits", lenght=5)]},
            "stages[1].lenght is not a field; did you mean 'length'?",
        ),
        ({"stages": [stage("logits", optimizer="adamW")]}, "did you mean 'adamw'?"),
        (
            {"stages": [stage("logits", optimizer_config={"beta": [0.9, 0.95]})]},
            "optimizer_config='beta': expected one of betas, eps, weight_decay",
        ),
        ({"stages": [stage("logits", optimizer_config=5)]}, "options and their values"),
        *(
            (
                {"stages": [stage("logits", optimizer=optimizer, optimizer_config=options)]},
                f"stages[0]: optimizer_config={options!r} does not fit {optimizer!r}: ",
            )
            for optimizer, options in (
                ("adamw", {"betas": 0.9}),
                ("adamw", {"betas": [0.9]}),
                ("adam", {"eps": None}),
                ("lion", {"weight_decay": "x"}),
                ("muon", {"ns_steps": "5"}),
                ("sgd", {"momentum": "x"}),
                ("sgd", {"weight_decay": 1e39}),
            )
        ),
        ({"stages": [stage("logits", learning_rate="fast")]}, "learning_rate='fast': expected"),
        ({"stages": [stage("logits", clip=0)]}, "clip=0: expected a number over 0, or null"),
        ({"stages": [stage("logits", warmup=2)]}, "warmup=2: expected a share"),
        ({"stages": [stage("logits", length=True)]}, "length=True: expected an integer"),
        ({"stages": [stage("logits", micro_batch=3)]}, "batch_size=4 is not a multiple"),
        ({"stages": [stage("next_token", kl_weight=2)]}, "do not apply to 'next_token'"),
        ({"teacher": None}, "teacher is missing: only next_token does without one"),
        ({"dtype": "float16"}, "dtype='float16': expected one of bfloat16, float32"),
        ({"seed": -1}, "seed=-1"),
        ({"save_every": 0}, "save_every=0"),
        ({"grad_checkpoint": 1}, "grad_checkpoint=1: expected true or false"),
        ({"data": []}, "data=[]: expected a file or a list"),
        ({"data": {"file": "a", "dataset": "b"}}, "either file or dataset"),
        ({"data": ["a", {"file": "a", "feild": "b"}]}, "data[1].feild is not a field; did"),
        ({"data": {"file": "a", "field": 5}}, "field=5: expected a name"),
        ({"preset": "labtop"}, "did you mean 'laptop'?"),
    ],
)
def test_a_config_that_is_wrong_is_told_by_field(content, message, folder, tmp_path, capfd):
    content = {"stages": [stage("logits")], **content}
    path = write_config(tmp_path / "run.yaml", **content)
    line = refusal(capfd, path)
    assert message in line and str(path) in line


def test_a_config_that_cannot_be_read_is_told(tmp_path, capfd):
    def line(name):
        with pytest.raises(SystemExit):
            main(["--config", str(name)])
        return capfd.readouterr().err

    assert "no such file, and no preset; the presets are demo, laptop, paper-long" in line("lap")
    for content, message in ((b"a: [", "not YAML"), (b"\xff", "not UTF-8"), (b"- a", "expected")):
        (tmp_path / "run.yaml").write_bytes(content)
        assert message in line(tmp_path / "run.yaml")
    assert "Is a directory" in line(tmp_path)
    (tmp_path / "run.yaml").write_text("stages: [{objective: next_token}]\nout: a\ndata: b\n")
    assert "student is missing" in line(tmp_path / "run.yaml")


def test_presets_are_whole_but_for_the_paths(capfd):
    paths = {"student": "s", "teacher": "t", "data": ["d"], "out": "o"}
    budgets = {}
    for name in presets():
        config = load_config(name, paths)
        assert [s.objective for s in config.stages] == ["attention", "logits", "next_token"]
        budgets[name] = [s.tokens for s in config.stages]
    assert budgets["paper-short"] == [300_000_000, 1_000_000_000, 1_000_000_000]
    assert budgets["paper-long"] == [800_000_000, 4_000_000_000, 1_000_000_000]
    assert load_config("paper-short", paths).stages[2].length == 16384
    given = "--config demo --student s --teacher t --data d --data e --out o --dry-run"
    main(given.split())
    printed = capfd.readouterr().out
    assert "# stage 1, attention: 63 steps of 1,024 tokens, 64,512 in all." in printed
    again = yaml.safe_load(printed)
    assert [source["file"] for source in again["data"]] == ["d", "e"]
    assert again["stages"][0]["learning_rate"] == 0.002


def test_a_file_starts_from_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: laptop\nstudent: s\nteacher: t\ndata: d\nout: o\nsave_every: 7\n")
    config = load_config(str(path), {"out": "elsewhere"})
    assert (config.save_every, config.out, config.stages[0].length) == (7, "elsewhere", 2048)
    # As mlx-lm reads it; YAML 1.1 alone takes it for a string.
    one = "{objective: next_token, tokens: 9, length: 3, batch_size: 1, learning_rate: 1e-3}"
    path.write_text(f"student: s\ndata: d\nout: o\nstages: [{one}]\n")
    assert load_config(str(path), {}).stages[0].learning_rate == 1e-3


def test_a_loss_that_is_no_number_at_once_is_told(models, capfd):
    write_models(models / "nan")
    (models / "nan" / "text.txt").write_text((models / "text.txt").read_text())
    file = models / "nan" / "student" / "model.safetensors"
    weights = mx.load(str(file))
    weights["model.norm.weight"] = mx.full(weights["model.norm.weight"].shape, float("nan"))
    mx.save_safetensors(str(file), weights)
    line = refusal(capfd, write_config(models / "nan" / "run.yaml", [stage("next_token")]))
    assert "stage 1, step 1: the loss is nan; there is no good checkpoint yet" in line


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(models, capfd, monkeypatch):
    path = write_config(models / "run.yaml", [stage("attention", 6)], save_every=2)
    out, written = models / "run", []
    write = writer.ShardWriter.write

    def fail(self, name, array):
        written.append(self.folder)
        if len(set(written)) == 2 and written.count(self.folder) == 3:
            raise OSError(28, "No space left on device")
        write(self, name, array)

    monkeypatch.setattr(writer.ShardWriter, "write", fail)
    line = refusal(capfd, path)
    assert f"{out / 'checkpoints' / 'step-00000004'}: No space left on device; what was" in line
    assert leftovers(out / "checkpoints") == {"step-00000002"}
    monkeypatch.undo()

    no_room = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: no_room)
    line = refusal(capfd, path)
    assert "MB are needed, 0.0 MB are free" in line
    assert leftovers(out / "checkpoints") == {"step-00000002"}
    monkeypatch.undo()

    plain = distill(write_config(models / "plain.yaml", [stage("attention", 6)]))
    assert read_bytes(distill(path) / "model") == read_bytes(plain / "model")


@pytest.mark.parametrize("at", [1, 3])
def test_losses_that_cannot_be_written_are_told(at, models, capfd, monkeypatch):
    write, rows = report.csv.DictWriter.writerow, []

    def fail(self, row):
        rows.append(row)
        if len(rows) == at:
            raise OSError(28, "No space left on device")
        write(self, row)

    monkeypatch.setattr(report.csv.DictWriter, "writerow", fail)
    line = refusal(capfd, write_config(models / "run.yaml", [stage("attention")]))
    assert f"{models / 'run' / 'losses.csv'}: No space left on device." in line
    assert not leftovers(models / "run", "losses.csv", "data")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"stage,loss\n1,\xff\n"])
def test_losses_of_something_else_are_left_alone(content, models, capfd):
    path = models / "run" / "losses.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    line = refusal(capfd, write_config(models / "run.yaml", [stage("attention", 1)]))
    assert f"{path} is not of a distillation: move it away, or choose another out." in line
    assert path.read_bytes() == content


def test_another_run_in_the_same_folder_is_refused(models, capfd):
    stages = [stage("attention", 2), stage("next_token", 2)]
    path = write_config(models / "run.yaml", stages)
    distill(path)
    shutil.rmtree(models / "run" / "model")

    def line(stages=stages, **changes):
        return refusal(capfd, write_config(path, stages, **changes))

    assert "holds a run with seed=0, not 5: give that again, or another out" in line(seed=5)
    assert "holds a run with dtype='float32', not 'bfloat16'" in line(dtype="bfloat16")
    other = [stages[0], {**stages[1], "optimizer": "sgd"}]
    assert "stages[1].optimizer='adamw', not 'sgd'" in line(other)
    assert "with stages='2 stages', not 1" in line(stages[:1])
    longer = [stages[0], {**stages[1], "tokens": 2 * 128}]
    assert "a finished run with other stages[1].tokens: give those again, or" in line(longer)


def test_two_runs_at_once_are_refused(models, capfd, monkeypatch):
    path, lines = write_config(models / "run.yaml", [stage("attention", 1)]), []
    add = trainer.LossFile.add

    def run_again(self, row):
        lines.append(refusal(capfd, path))
        add(self, row)

    monkeypatch.setattr(trainer.LossFile, "add", run_again)
    distill(path)
    assert "is being written by another run" in lines[0]


def test_a_checkpoint_that_is_damaged_is_told(models, capfd):
    path = write_config(models / "run.yaml", [stage("attention", 2)])
    kept = distill(path) / "checkpoints" / "step-00000002"
    shutil.rmtree(models / "run" / "model")
    whole = (kept / "model.safetensors").read_bytes()
    (kept / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"{kept} cannot be read" in refusal(capfd, path)
    (kept / "model.safetensors").write_bytes(whole)
    (kept / "state.json").write_text("{")
    assert f"{kept} cannot be read" in refusal(capfd, path)


def test_the_losses_are_drawn(models, capfd):
    pytest.importorskip("matplotlib")
    path = write_config(models / "run.yaml", [stage("attention", 2), stage("logits", 2)])
    out = distill(path, "--plot")
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "losses.png" in capfd.readouterr().out
    assert leftovers(out) == {"checkpoints", "data", "losses.csv", "losses.png", "model"}
    (out / "losses.csv").rename(out / "moved.csv")
    assert f"{out / 'losses.csv'}: there are no losses to draw." in refusal(capfd, path, "--plot")
    (out / "moved.csv").rename(out / "losses.csv")
    with pytest.raises(OSError, match="No such file or directory"):
        report.plot_losses(out / "losses.csv", out / "nowhere" / "losses.png")


def test_a_picture_needs_matplotlib_before_anything_runs(models, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write_config(models / "run.yaml", [stage("attention", 2)])
    line = refusal(capfd, path, "--plot")
    assert "--plot needs matplotlib: pip install 'mlx-hydra[plots]'." in line
    assert not (models / "run").exists()


def test_long_sequences_and_many_passes_are_noted(models, capfd):
    config = json.loads((models / "student" / "config.json").read_text())
    config["max_position_embeddings"] = 8
    (models / "student" / "config.json").write_text(json.dumps(config))
    write_text(models / "text.txt", words=100)
    distill(write_config(models / "run.yaml", [stage("attention", 3)]))
    printed = capfd.readouterr().err
    assert "length 16: the model is made for 8 tokens." in printed
    assert "stage 1 goes through its 101 tokens 2.0 times." in printed


def test_progress_on_a_terminal_is_a_bar(capfd, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with report.training_progress("stage 1", 100, 0) as show:
        show(50, {"tokens_per_second": 5.0, "loss": 1.25})
    printed = capfd.readouterr().err
    assert "50/100 tokens" in printed and "loss 1.2500" in printed and "5 tok/s" in printed
    assert report.in_time(3725.4) == "1:02:05"
