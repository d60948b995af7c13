"""One run at a time at an output, whatever became of the one before."""

import os

import pytest

from mlx_hydra import locks
from mlx_hydra.locks import locked_output


def test_a_held_output_is_refused_until_it_is_free(tmp_path):
    out = tmp_path / "out.json"
    with locked_output(out):
        message = r"out\.json is being written by another run: wait"
        with pytest.raises(ValueError, match=message), locked_output(out):
            pass
        with locked_output(tmp_path / "other.json"):
            pass
        # The one that was refused has not freed it.
        with pytest.raises(ValueError, match="another run"), locked_output(out):
            pass
    with locked_output(out):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_owner_has_removed_holds_nothing(tmp_path, monkeypatch):
    """Between opening a lock and holding it, another run may end, and a third one begin."""
    out, opened = tmp_path / "out.json", os.open

    def open_late(path, flags, *mode):
        handle = opened(path, flags, *mode)
        if mode:
            return handle
        os.unlink(path)
        monkeypatch.undo()
        third.__enter__()
        return handle

    third = locked_output(out)
    monkeypatch.setattr(locks.os, "open", open_late)
    with pytest.raises(ValueError, match="another run"), locked_output(out):
        pass
    with pytest.raises(ValueError, match="another run"), locked_output(out):
        pass
    third.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    out = tmp_path / "none" / "out.json"
    message = r"out\.json cannot be written: No such file"
    with pytest.raises(OSError, match=message), locked_output(out):
        pass
