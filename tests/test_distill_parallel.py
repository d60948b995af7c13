"""Two processes of mlx.launch against one, with the same global batch."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import read_bytes
from distill_runs import distill, figures, stage, write_config, write_models, write_text

from mlx_hydra.distill import parallel
from mlx_hydra.distill.parallel import Processes
from mlx_hydra.distill.state import Checkpoints

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
ring = pytest.mark.skipif(
    LAUNCH is None or not mx.distributed.is_available("ring"), reason="needs mlx.launch and ring"
)


def launch(path: Path) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distillation = [sys.executable, "-m", "mlx_hydra.distill", "--config", str(path)]
    command = [LAUNCH, "-n", "2", "--backend", "ring", "-p", str(port), "--", *distillation]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@ring
def test_two_processes_go_on_with_what_one_began_as_it_would(tmp_path, monkeypatch):
    write_models(tmp_path)
    write_text(tmp_path / "text.txt")
    # Plain gradient descent: what Adam makes of a gradient near zero is its rounding.
    plain = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant"}
    stages = [
        stage("attention", 4, micro_batch=1),
        stage("logits", 3, **plain),
        stage("next_token", 2, micro_batch=1, **plain),
    ]
    one = distill(write_config(tmp_path / "one.yaml", stages))
    path = write_config(tmp_path / "two.yaml", stages, save_every=1)
    save = Checkpoints.save

    def save_and_stop(self, state, optimizer):
        save(self, state, optimizer)
        if state.steps == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(SystemExit):
        distill(path)
    run = launch(path)
    assert run.returncode == 0, run.stderr
    two = tmp_path / "two"
    names = ("stage", "step", "tokens", "loss", "gradient_norm")
    expected, found = (np.array(figures(out, *names), float) for out in (one, two))
    assert expected.shape == (9, 5)
    # Adam, in stage 1, makes more of the rounding than there was.
    assert np.allclose(found, expected, rtol=1e-4)
    folders = tmp_path / "student", one / "model", two / "model"
    for name in read_bytes(folders[0]):
        start, a, b = (np.frombuffer(read_bytes(f)[name][2], np.float32) for f in folders)
        assert np.abs(a - b).max() <= 1e-6 + 1e-4 * np.abs(a - start).max(), name


class Two:
    """Stands in for mx.distributed, as one of two processes sees it; the other has ``others``."""

    def __init__(self, rank, others):
        self._rank, self._others = rank, others

    def init(self):
        return self

    def rank(self):
        return self._rank

    def size(self):
        return 2

    def all_sum(self, x, group):
        return x + self._others

    def all_gather(self, x, group):
        return mx.concatenate([x, mx.array([self._others], x.dtype)])


def test_all_take_the_first_ones_values(monkeypatch):
    mine = {"a": mx.array([1.5, -0.1])}
    monkeypatch.setattr(parallel.mx, "distributed", Two(0, mx.zeros(2)))
    assert Processes().from_first(mine)["a"].tolist() == mine["a"].tolist()
    monkeypatch.setattr(parallel.mx, "distributed", Two(1, mx.array([2.5, 3.0])))
    assert not Processes().first
    assert Processes().from_first(mine)["a"].tolist() == [2.5, 3.0]


def test_other_data_on_another_machine_is_told(monkeypatch):
    monkeypatch.setattr(parallel.mx, "distributed", Two(1, 2**32 - 1))
    Processes().expect_same(2**32 - 1, "data")
    with pytest.raises(ValueError, match="data differs between the processes"):
        Processes().expect_same(7, "data")


def test_the_end_of_another_process_is_told_from_an_error_here(monkeypatch):
    lost = RuntimeError("[ring] connection to a peer was lost")
    with pytest.raises(RuntimeError, match="to a peer"), Processes().told_apart():
        raise lost
    monkeypatch.setattr(parallel.mx, "distributed", Two(1, 0.0))
    with pytest.raises(OSError, match="process 1: another one has ended"), Processes().told_apart():
        raise lost
    with pytest.raises(RuntimeError, match=r"^other$"), Processes().told_apart():
        raise RuntimeError("other")


def test_a_batch_is_shared_evenly(tmp_path, monkeypatch, capfd):
    write_models(tmp_path)
    write_text(tmp_path / "text.txt")
    monkeypatch.setattr(parallel.mx, "distributed", Two(0, 0.0))
    path = write_config(tmp_path / "run.yaml", [stage("attention", batch_size=6, micro_batch=2)])
    with pytest.raises(SystemExit):
        distill(path)
    message = "batch_size=6 is not a multiple of 4: 2 processes of micro_batch=2."
    assert message in capfd.readouterr().err
