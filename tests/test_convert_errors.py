"""What conversion refuses, and what a conversion that fails leaves behind: nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from checkpoint_files import (
    QWEN3,
    convert,
    heads_file,
    leftovers,
    load,
    read_bytes,
    read_config,
    write_checkpoint,
    write_qwen3,
)

import mlx_hydra.convert
import mlx_hydra.hub
from mlx_hydra.checkpoints import writer
from mlx_hydra.checkpoints.plan import Step

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def refusal(capfd, source, out, *options) -> str:
    """The one line that a refused conversion prints; nothing may be left of it."""
    before = leftovers(Path(out).parent)
    with pytest.raises(SystemExit) as error:
        convert(source, out, *options)
    assert error.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert leftovers(Path(out).parent) == before
    return printed.err


@pytest.fixture
def source(tmp_path):
    """A sharded Qwen3 checkpoint, float32."""
    write_qwen3(tmp_path / "source", shards=3)
    return tmp_path / "source"


def change_config(folder, **changes):
    config = {**read_config(folder), **changes}
    config = {name: value for name, value in config.items() if value != "remove"}
    (folder / "config.json").write_text(json.dumps(config))


# --- The checkpoint -------------------------------------------------------------------------


def test_a_missing_shard_is_named(source, tmp_path, capfd):
    (source / SHARDS[1]).unlink()
    line = refusal(capfd, source, tmp_path / "out")
    assert f"shard {SHARDS[1]} is missing" in line and "names 12 tensors in it" in line
    (source / "model.safetensors.index.json").unlink()
    line = refusal(capfd, source, tmp_path / "out")
    assert f"shard {SHARDS[1]} is missing: expected 3" in line


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_a_truncated_shard_is_named(keep, source, tmp_path, capfd):
    path = source / SHARDS[2]
    path.write_bytes(path.read_bytes()[:keep])
    line = refusal(capfd, source, tmp_path / "out")
    assert f"{path} is cut off" in line


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        (b"\x02" + bytes(7) + b"{}" + b"x", "is damaged: 11 bytes, its header promises 10"),
        (b"\x04" + bytes(7) + b"[12]", "is not a safetensors file"),
        (b"\x04" + bytes(7) + b"{]}}", "its safetensors header is damaged"),
        (b"\x0a" + bytes(7) + b'{"x":null}', "its safetensors header is damaged"),
    ],
)
def test_a_file_that_is_no_safetensors_is_named(content, expected, source, tmp_path, capfd):
    (source / SHARDS[0]).write_bytes(content)
    line = refusal(capfd, source, tmp_path / "out")
    assert SHARDS[0] in line and expected in line


def test_a_header_whose_places_overlap_is_refused(source, tmp_path, capfd):
    path = source / SHARDS[0]
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    one, two = [n for n in header if n.endswith(("mlp.up_proj.weight", "mlp.gate_proj.weight"))][:2]
    places = header[one]["data_offsets"], header[two]["data_offsets"]
    for wrong in (places[1], [places[0][0] + 4, places[0][1]], [-4, 0]):
        header[one]["data_offsets"] = wrong
        new = json.dumps(header).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + raw[size:])
        assert "header is damaged" in refusal(capfd, source, tmp_path / "out")


def test_an_index_and_shards_that_disagree_are_refused(source, tmp_path, capfd):
    index = json.loads((source / "model.safetensors.index.json").read_text())

    def refused(weight_map):
        content = {"metadata": {}, "weight_map": weight_map}
        (source / "model.safetensors.index.json").write_text(json.dumps(content))
        return refusal(capfd, source, tmp_path / "out")

    weight_map = index["weight_map"]
    elsewhere = next(shard for shard in SHARDS if shard != weight_map[Q_PROJ])
    assert "it is not there" in refused({**weight_map, Q_PROJ: elsewhere})
    assert "it is not there" in refused({**weight_map, "extra.weight": elsewhere})
    fewer = {name: shard for name, shard in weight_map.items() if name != Q_PROJ}
    assert f"holds {Q_PROJ}, which" in refused(fewer)
    assert "expected a file name in the same folder" in refused({**weight_map, Q_PROJ: "../x"})
    assert "expected an object 'weight_map'" in refused({})
    (source / "model.safetensors.index.json").write_text("{")
    assert "not JSON" in refusal(capfd, source, tmp_path / "out")


def test_a_tensor_in_two_shards_is_refused(tmp_path, capfd):
    weights = write_qwen3(tmp_path / "source", shards=2)
    (tmp_path / "source" / "model.safetensors.index.json").unlink()
    shard = tmp_path / "source" / "model-00002-of-00002.safetensors"
    mx.save_safetensors(str(shard), weights)
    assert "expected it once" in refusal(capfd, tmp_path / "source", tmp_path / "out")


def test_a_pickle_is_refused_and_why(source, tmp_path, capfd):
    for path in source.glob("model*"):
        path.unlink()
    assert ".bin" in refusal(capfd, source, tmp_path / "out")
    (source / "pytorch_model.bin").write_bytes(b"")
    line = refusal(capfd, source, tmp_path / "out")
    assert "pytorch_model.bin is refused" in line and "can run code" in line
    assert "safe_serialization=True" in line


def test_a_wrong_shape_is_named_with_both_shapes(source, tmp_path, capfd):
    change_config(source, num_attention_heads=3)
    line = refusal(capfd, source, tmp_path / "out")
    assert "self_attn.q_proj.weight" in line and "model-0000" in line
    assert "has shape [96, 32], the config asks for [48, 32]" in line


@pytest.mark.parametrize("direction", ["hf", "mlx"])
def test_a_wrong_shape_in_a_hydrahead_checkpoint_is_named(direction, tmp_path, capfd):
    folder = tiny.GOLDEN / "hydrahead_paper"
    options = []
    if direction == "mlx":
        folder, options = convert(folder, tmp_path / "mlx"), ["--to-hf"]
        capfd.readouterr()
    weights = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.0.self_attn.linear.k_conv1d.weight"
    expected = weights[name].shape
    weights[name] = weights[name].swapaxes(1, 2)
    write_checkpoint(tmp_path / "source", read_config(folder), weights)
    line = refusal(capfd, tmp_path / "source", tmp_path / "out", *options)
    assert name in line and f"the config asks for {list(expected)}" in line


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path, capfd):
    weights = write_qwen3(tmp_path / "source")
    fewer = {name: x for name, x in weights.items() if name != Q_PROJ}
    write_checkpoint(tmp_path / "fewer", QWEN3, fewer)
    line = refusal(capfd, tmp_path / "fewer", tmp_path / "out")
    assert f"tensors are missing: {Q_PROJ}." in line
    write_checkpoint(tmp_path / "renamed", QWEN3, {**fewer, Q_PROJ + "s": weights[Q_PROJ]})
    line = refusal(capfd, tmp_path / "renamed", tmp_path / "out")
    assert f"The nearest name there is {Q_PROJ}s" in line
    more = {**weights, **{Q_PROJ + str(i): weights[Q_PROJ] for i in range(5)}}
    write_checkpoint(tmp_path / "more", QWEN3, more)
    line = refusal(capfd, tmp_path / "more", tmp_path / "out")
    assert f"{Q_PROJ}2 and 2 more" in line and f"that is known is {Q_PROJ}." in line
    untied = {name: x for name, x in weights.items() if name != "lm_head.weight"}
    write_checkpoint(tmp_path / "untied", QWEN3, untied)
    assert "lm_head.weight" in refusal(capfd, tmp_path / "untied", tmp_path / "out")


def test_tensors_that_are_no_floats_are_refused(tmp_path, capfd):
    weights = write_qwen3(tmp_path / "source")
    weights[Q_PROJ] = weights[Q_PROJ].astype(mx.int8)
    write_checkpoint(tmp_path / "int8", QWEN3, weights)
    line = refusal(capfd, tmp_path / "int8", tmp_path / "out")
    assert f"{Q_PROJ} in" in line and "is I8: expected one of F32, F16, BF16" in line


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": "remove"}, "expected 'qwen3' or 'hydrahead'"),
        ({"model_type": "qwen3_moe"}, "expected 'qwen3' or 'hydrahead'"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"layer_types": ["sliding_attention"] * 3}, "without sliding windows"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': expected 'silu'"),
        ({"head_dim": "remove"}, "head_dim is missing"),
        ({"num_hidden_layers": "remove"}, "num_hidden_layers is missing"),
        ({"rms_norm_eps": "remove"}, "rms_norm_eps is missing"),
        ({"rope_theta": "remove"}, "rope_theta is missing"),
        ({"num_key_value_heads": 4}, "is not a multiple of num_key_value_heads=4"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling={'type': 'yarn'}: 'factor' is missing"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "is quantised (quantization in"),
        ({"quantization_config": {"quant_method": "fp8"}}, "expected float weights"),
    ],
)
def test_a_config_that_cannot_be_converted_is_refused(changes, expected, source, tmp_path, capfd):
    change_config(source, **changes)
    assert expected in refusal(capfd, source, tmp_path / "out")


def test_a_config_that_is_not_there_or_no_config_is_refused(source, tmp_path, capfd):
    (source / "config.json").write_text("not json")
    assert "config.json: not JSON" in refusal(capfd, source, tmp_path / "out")
    (source / "config.json").write_text("[]")
    assert "expected a JSON object" in refusal(capfd, source, tmp_path / "out")
    (source / "config.json").unlink()
    assert "config.json: No such file" in refusal(capfd, source, tmp_path / "out")


def test_sources_and_options_that_do_not_go_together_are_refused(source, tmp_path, capfd):
    def refused(folder, *options):
        return refusal(capfd, folder, tmp_path / "out", *options)

    pytorch = tiny.GOLDEN / "hydrahead_plain"
    text = tmp_path / "text.txt"
    text.write_text("w1 w2")
    mlx = convert(pytorch, tmp_path / "mlx")
    quantised = convert(source, tmp_path / "q", "-q", "--q-group-size", 32)
    capfd.readouterr()
    heads = heads_file(tmp_path / "heads.json", [[0]] * 3, 4)
    for option in (
        ["--heads", heads],
        ["--full-ratio", "0.5"],
        ["--all-full"],
        ["--recipe", "paper"],
        ["--calibrate", text],
    ):
        line = refused(pytorch, *option)
        assert f"{option[0]} does not apply to a HydraHead checkpoint" in line
        assert f"{option[0]} does not apply" in refused(mlx, "--to-hf", *option)
    assert "--to-hf does not apply to a Qwen3 checkpoint" in refused(source, "--to-hf")
    assert "is in PyTorch's layout already" in refused(pytorch, "--to-hf")
    assert "is in MLX's layout already: use --to-hf" in refused(mlx)
    assert "is quantised" in refused(quantised, "--to-hf")
    assert "-q and --to-hf" in refused(mlx, "--to-hf", "-q")
    assert "--q-bits 8: expected -q with it" in refused(source, "--q-bits", 8)
    assert "--q-group-size 32: expected -q" in refused(source, "--q-group-size", 32)
    assert "--q-group-size 128: no weight" in refused(source, "-q", "--q-group-size", 128)
    assert "not allowed with" in refused(source, "--all-full", "--full-ratio", 0.5)
    assert "argument --q-bits: invalid choice" in refused(source, "-q", "--q-bits", "5")
    assert "--revision main" in refused(source, "--revision", "main")


@pytest.mark.parametrize(
    "options, expected",
    [(["--mlx-path", "out"], "--hf-path"), (["--hf-path", "x"], "--mlx-path is missing")],
)
def test_the_paths_must_be_given(options, expected, capfd):
    with pytest.raises(SystemExit) as error:
        mlx_hydra.convert.main(options)
    assert error.value.code == 2
    assert expected in (line := capfd.readouterr().err) and line.count("\n") == 1


def test_an_output_norm_without_a_norm_cannot_be_expressed(tmp_path, capfd):
    weights = mx.load(str(tiny.GOLDEN / "hydrahead_plain" / "model.safetensors"))
    weights["model.layers.0.self_attn.linear.o_norm.weight"] = mx.ones((16,))
    write_checkpoint(tmp_path / "source", read_config(tiny.GOLDEN / "hydrahead_plain"), weights)
    line = refusal(capfd, tmp_path / "source", tmp_path / "out")
    assert "o_norm.weight is there, but fusion.norm is false" in line


def test_two_names_for_one_tensor_are_refused(tmp_path, capfd):
    weights = mx.load(str(tiny.GOLDEN / "hydrahead_plain" / "model.safetensors"))
    weights["model.layers.0.self_attn.gdn.A_log"] = mx.ones((3,))
    write_checkpoint(tmp_path / "source", read_config(tiny.GOLDEN / "hydrahead_plain"), weights)
    line = refusal(capfd, tmp_path / "source", tmp_path / "out")
    assert "gdn.A_log" in line and "names of the same tensor" in line


def test_a_head_number_beyond_float16_is_refused(tmp_path, capfd):
    weights = write_qwen3(tmp_path / "source")
    weights[Q_PROJ][0, 0] = -1e5
    write_checkpoint(tmp_path / "source", QWEN3, weights)
    line = refusal(capfd, tmp_path / "source", tmp_path / "out", "--dtype", "float16")
    assert "holds 100000, float16 ends at 65504: use --dtype bfloat16" in line


# --- Heads and text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"full_attention_heads": [[0]] * 3, "num_layers": 28}, "made for another model"),
        ({"full_attention_heads": [[0]] * 3, "num_heads": 16}, "num_heads is 16"),
        ({"full_attention_heads": [[0]] * 4}, "has 4 layers, the model has 3"),
        ({"full_attention_heads": [[0], [6], [0]]}, "layer 1 names head 6; heads go from 0 to 5"),
        ({"full_attention_heads": [[0], [-1], [0]]}, "layer 1 names head -1"),
        ({"full_attention_heads": [[0], ["1"], [0]]}, "layer 1 names head '1'"),
        ({"full_attention_heads": [[0], [1, 1], [0]]}, "names a head twice"),
        ({"full_attention_heads": [[], [], []]}, "at least one head"),
        ({"heads": [[0]]}, "expected an object with 'full_attention_heads'"),
    ],
)
def test_a_heads_file_that_does_not_fit_is_refused(content, expected, source, tmp_path, capfd):
    (tmp_path / "heads.json").write_text(json.dumps(content))
    line = refusal(capfd, source, tmp_path / "out", "--heads", tmp_path / "heads.json")
    assert "heads.json" in line and expected in line


def test_a_heads_file_that_cannot_be_read_is_refused(source, tmp_path, capfd):
    heads = tmp_path / "heads.json"
    assert "No such file" in refusal(capfd, source, tmp_path / "out", "--heads", heads)
    heads.write_text("{")
    assert "not JSON" in refusal(capfd, source, tmp_path / "out", "--heads", heads)


@pytest.mark.parametrize("ratio", ["0", "-0.5", "1.5", "nan", "many"])
def test_a_ratio_that_is_none_is_refused(ratio, source, tmp_path, capfd):
    line = refusal(capfd, source, tmp_path / "out", f"--full-ratio={ratio}")
    assert "--full-ratio" in line


def test_a_text_that_is_none_is_refused(source, tmp_path, capfd):
    text = tmp_path / "text.txt"

    def refused(content):
        text.write_bytes(content)
        return refusal(capfd, source, tmp_path / "out", "--calibrate", text)

    assert "No such file" in refusal(capfd, source, tmp_path / "out", "--calibrate", text)
    assert "it is empty" in refused(b"")
    assert "it is empty" in refused(b" \n\t")
    assert "not UTF-8 text (byte 4 is 0xff)" in refused(b"good\xff")
    assert "has no tokenizer for it" in refused(b"w1 w2")
    write_qwen3(tmp_path / "small", vocab_size=40)
    tiny.write_tokenizer(tmp_path / "small")
    text.write_text("w1 w50")
    line = refusal(capfd, tmp_path / "small", tmp_path / "out", "--calibrate", text)
    assert "gives token 56, the model knows 40: it is another model's" in line


# --- Where from, where to -------------------------------------------------------------------


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path, capfd):
    line = refusal(capfd, tmp_path / "nowhere", tmp_path / "out")
    assert "no such folder, and not a repository (owner/name) either" in line
    (tmp_path / "file.safetensors").write_text("")
    line = refusal(capfd, tmp_path / "file.safetensors", tmp_path / "out")
    assert "is a file: expected the folder" in line
    assert "--hf-path '': no such folder" in refusal(capfd, "", tmp_path / "out")


def test_a_repository_that_cannot_be_fetched_is_one_line(tmp_path, capfd, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError("cannot\nreach\nthe hub")

    monkeypatch.setattr(mlx_hydra.hub, "snapshot_download", snapshot_download)
    line = refusal(capfd, "owner/name", tmp_path / "out")
    assert "owner/name: no such folder, and the hub does not give it: cannot" in line


def test_an_output_that_is_taken_is_refused_and_kept(source, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    assert "is not empty" in refusal(capfd, source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "kept"
    assert "is a file" in refusal(capfd, source, tmp_path / "out" / "precious")
    assert "is not empty" in refusal(capfd, source, source)
    # Known before anything is fetched.
    assert "is not empty" in refusal(capfd, "owner/name", tmp_path / "out")
    (tmp_path / "out" / "precious").unlink()
    assert load(convert(source, tmp_path / "out"))


def test_an_output_that_cannot_be_made_is_named(source, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    with pytest.raises(SystemExit) as stopped:
        convert(source, out)
    error = capfd.readouterr().err
    assert (stopped.value.code, error) == (2, f"error: {out} cannot be made: Not a directory.\n")


def test_folders_above_the_output_are_made_and_unmade(source, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", fails_after(5, OSError(28, "No space left on device")))
        with pytest.raises(SystemExit):
            convert(source, tmp_path / "a" / "b" / "out")
    line = capfd.readouterr().err
    assert f"{tmp_path / 'a' / 'b' / 'out'}: No space left on device; what was" in line
    assert leftovers(tmp_path, "source") == set()
    assert load(convert(source, tmp_path / "a" / "b" / "out"))


# --- Cut short ------------------------------------------------------------------------------


def fails_after(count, error):
    """Stands in for Step.run: the error comes with the tensor after ``count`` of them."""
    run, calls = Step.run, []

    def failing(self, reader):
        calls.append(self)
        if len(calls) > count:
            raise error
        yield from run(self, reader)

    return failing


def test_an_interrupt_leaves_nothing_and_a_rerun_works(source, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Step, "run", fails_after(10, KeyboardInterrupt()))
        with pytest.raises(SystemExit) as error:
            convert(source, tmp_path / "out")
    assert error.value.code == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert leftovers(tmp_path, "source") == set()
    assert load(convert(source, tmp_path / "out"))


def in_child(*options, before: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, after some lines of Python."""
    code = f"{before}\nfrom mlx_hydra.convert import main\nmain({list(map(str, options))!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


KILL_AT_TENSOR_20 = """
import os, signal
from mlx_hydra.checkpoints.writer import ShardWriter
write, names = ShardWriter.write, []
def killing(self, name, array):
    write(self, name, array)
    names.append(name)
    if len(names) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.write = killing
"""


def test_a_killed_run_is_never_taken_for_whole_and_a_rerun_works(source, tmp_path):
    options = ("--hf-path", source, "--mlx-path", tmp_path / "out")
    assert in_child(*options, before=KILL_AT_TENSOR_20).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = leftovers(tmp_path, "source")
    assert (tmp_path / left / "model.safetensors").exists()
    (tmp_path / left / "old-folder").mkdir()
    assert load(convert(source, tmp_path / "out"))
    assert leftovers(tmp_path, "source", "out") == set()
    assert not (tmp_path / "out" / "old-folder").exists()
    convert(source, tmp_path / "fresh")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "fresh")


def test_two_runs_to_one_place_do_not_mix(source, tmp_path, capfd):
    with writer.staged_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        line = refusal(capfd, source, tmp_path / "out")
        assert "is being written by another run" in line
        assert (folder / "half").exists()
    assert leftovers(tmp_path / "out") == {"half"}


LIMIT_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path):
    """A limit on the size of files ends a write as a full disk does, without being root."""
    out = tmp_path / "out"
    run = in_child("--hf-path", source, "--mlx-path", out, before=LIMIT_FILES)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert f"error: {out}: File too large; what was written is removed." in run.stderr
    assert leftovers(tmp_path, "source") == set()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_write_that_fails_is_an_error_of_the_writer(tmp_path):
    spec = writer.TensorSpec("x", (1000, 1000), mx.float32)
    with (
        pytest.raises(OSError) as error,
        writer.staged_folder(tmp_path / "out") as folder,
        writer.ShardWriter(folder, [spec]) as shards,
    ):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to("/dev/full")
        shards.write("x", mx.zeros((1000, 1000)))
    assert "No space left on device; what was written is removed" in str(error.value)
    assert leftovers(tmp_path) == set()


def test_a_disk_that_is_too_small_is_told_before_the_start(source, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000})
    )
    line = refusal(capfd, source, tmp_path / "out")
    assert f"{tmp_path}: 0.3 MB are needed, 0.1 MB are free" in line
