"""Conversion end to end, through the command: what comes out computes what it should."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from checkpoint_files import (
    QWEN3,
    convert,
    copy_golden,
    heads_file,
    load,
    read_bytes,
    read_config,
    write_checkpoint,
    write_qwen3,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_model

import mlx_hydra.convert
import mlx_hydra.hub
from mlx_hydra.models.hydrahead import may_cast
from mlx_hydra.ops.gated_delta_inputs import short_convolution

GOLDEN_QWEN3 = ["qwen3_tied", "qwen3_untied", "qwen3_yarn"]
GOLDEN_HYDRAHEAD = ["hydrahead_paper", "hydrahead_ragged", "hydrahead_plain"]
HEADS = [[1, 4], [0, 1, 5], [0, 1, 2, 3, 4, 5]]  # for write_qwen3: ragged, then whole layer


def relative_error(actual, expected) -> float:
    return tiny.distance(actual, expected) / mx.abs(expected).max().item()


# --- From Qwen3 -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["config.json", "config_hub.json"])
@pytest.mark.parametrize("name", GOLDEN_QWEN3)
def test_with_all_heads_full_the_teacher_is_kept_to_the_bit(name, config, tmp_path):
    source = copy_golden(name, tmp_path / "source")
    shutil.move(source / config, source / "config.json")
    model = load(convert(source, tmp_path / "out", "--all-full", "--recipe", "exact"))
    teacher = load(source)
    golden = mx.load(str(tiny.GOLDEN / f"{name}.safetensors"))

    logits = model(golden["tokens"])
    assert relative_error(logits, golden["logits"]) < 1e-4
    assert mx.array_equal(logits, teacher(golden["tokens"]))

    steps = tiny.in_steps(model, golden["tokens"], 1, make_prompt_cache(model))
    assert relative_error(steps, golden["decode_logits"]) < 1e-4
    teachers = tiny.in_steps(teacher, golden["tokens"], 1, make_prompt_cache(teacher))
    assert mx.array_equal(steps, teachers)


def test_with_recipe_exact_a_layer_of_full_heads_is_the_teachers(tmp_path):
    write_qwen3(tmp_path / "source")
    heads = heads_file(tmp_path / "heads.json", HEADS, 6)
    model = load(convert(tmp_path / "source", tmp_path / "out", "--heads", heads, "--recipe=exact"))
    layer, teachers = model.layers[2], load(tmp_path / "source").layers[2]
    assert "fusion" not in layer.self_attn
    x = mx.random.normal((2, 9, 32), key=mx.random.key(1))
    assert mx.array_equal(layer(x, full_mask="causal"), teachers(x, mask="causal"))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head", range(6))
def test_with_recipe_exact_a_full_head_alone_is_the_teachers(layer, head, tmp_path):
    """Only the head's own columns of o_proj are left, in the teacher and in its conversion."""
    weights = write_qwen3(tmp_path / "source")
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    keep = np.zeros(96, np.float32)
    keep[16 * head : 16 * (head + 1)] = 1
    weights[name] = weights[name] * mx.array(keep)
    write_checkpoint(tmp_path / "source", QWEN3, weights)
    heads = heads_file(tmp_path / "heads.json", HEADS, 6)
    model = load(convert(tmp_path / "source", tmp_path / "out", "--heads", heads, "--recipe=exact"))

    x = mx.random.normal((1, 9, 32), key=mx.random.key(1))
    ours = model.layers[layer].self_attn(x, full_mask="causal")
    teachers = load(tmp_path / "source").layers[layer].self_attn(x, mask="causal")
    same = tiny.distance(ours, teachers) < 1e-5 * mx.abs(teachers).max().item()
    assert same == (head in HEADS[layer])


@pytest.mark.parametrize("recipe", ["paper", "exact"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_each_head_keeps_its_own_weights(recipe, dtype, tmp_path):
    source = write_qwen3(tmp_path / "source", dtype=dtype)
    heads = heads_file(tmp_path / "heads.json", HEADS, 6)
    out = convert(tmp_path / "source", tmp_path / "out", "--heads", heads, "--recipe", recipe)
    weights = mx.load(str(out / "model.safetensors"))
    new = {name for name in weights if name not in source}
    for name in set(source) & set(weights) - {n for n in source if "o_proj" in n}:
        assert mx.array_equal(source[name], weights[name]) and weights[name].dtype == dtype

    for layer, full in enumerate(HEADS):
        prefix = f"model.layers.{layer}.self_attn."

        def head_of(tensors, name, place, prefix=prefix):
            rows = tensors[prefix + name][16 * place : 16 * (place + 1)]
            new.discard(prefix + name)
            return np.array(rows.astype(mx.float32))

        linear = [h for h in range(6) if h not in full]
        kv_heads = sorted({h // 2 for h in full})
        for branch, chosen in (("full", full), ("linear", linear)):
            for place, head in enumerate(chosen):
                ours = head_of(weights, f"{branch}.q_proj.weight", place)
                assert (ours == head_of(source, "q_proj.weight", head)).all()
                at = kv_heads.index(head // 2) if branch == "full" else place
                for part in "kv":
                    ours = head_of(weights, f"{branch}.{part}_proj.weight", at)
                    assert (ours == head_of(source, f"{part}_proj.weight", head // 2)).all()
            for part in "qk" if chosen else "":
                ours = weights[f"{prefix}{branch}.{part}_norm.weight"]
                new.discard(f"{prefix}{branch}.{part}_norm.weight")
                assert mx.array_equal(ours, source[f"{prefix}{part}_norm.weight"])
        assert weights[f"{prefix}full.k_proj.weight"].shape[0] == 16 * len(kv_heads)
        for place, head in enumerate(full + linear):
            ours = weights[prefix + "o_proj.weight"][:, 16 * place : 16 * (place + 1)]
            teachers = source[prefix + "o_proj.weight"][:, 16 * head : 16 * (head + 1)]
            assert mx.array_equal(ours, teachers)

    endings = {name.split(".", 4)[4] for name in new}
    assert endings == {
        *(f"linear.{x}.weight" for x in ("a_proj", "b_proj", "g_proj")),
        *(f"linear.{x}_conv1d.weight" for x in "qkv"),
        *("linear.A_log", "linear.dt_bias", "linear.g_proj.bias", "fusion.gamma"),
        *({"full.g_proj.weight", "full.g_proj.bias"} if recipe == "paper" else ()),
    }


def test_what_is_new_starts_where_it_should(tmp_path):
    write_qwen3(tmp_path / "source", dtype=mx.bfloat16)
    model = load(convert(tmp_path / "source", tmp_path / "out", "--full-ratio", 0.34))
    layer = model.layers[0].self_attn
    linear, full = layer.linear, layer.full
    for name in ("A_log", "dt_bias"):
        assert linear[name].dtype == mx.float32
    assert layer.fusion.gamma.dtype == mx.float32
    assert layer.fusion.gamma.tolist() == [1.0] * 6

    x = mx.random.normal((1, 5, 32), key=mx.random.key(0)).astype(mx.bfloat16)
    gates = nn.silu(linear.g_proj(x)), mx.sigmoid(full.g_proj(x))
    assert tiny.distance(gates[0], mx.ones(gates[0].shape)) < 0.01
    assert tiny.distance(gates[1], mx.ones(gates[1].shape)) < 0.03

    A = mx.exp(linear.A_log)
    step = nn.softplus(linear.a_proj(x).astype(mx.float32) + linear.dt_bias)
    assert 1 <= A.min().item() < A.max().item() <= 16
    assert 1e-3 < step.min().item() < 4e-3 and 4e-2 < step.max().item() < 0.1
    assert len(set(step[0, 0].tolist())) == linear.n_heads
    assert tiny.distance(mx.sigmoid(linear.b_proj(x)), mx.full((1, 5, linear.n_heads), 0.5)) == 0

    inputs = mx.random.normal((1, 7, 3 * 16 * linear.n_heads), key=mx.random.key(2))
    assert tiny.distance(short_convolution(inputs, linear.weights.convolution)[0], inputs) == 0


def test_the_config_is_the_teachers_and_the_recipe(tmp_path):
    source = copy_golden("qwen3_yarn", tmp_path / "source")
    teacher = read_config(source)
    paper = read_config(convert(source, tmp_path / "paper", "--full-ratio", 0.5))
    exact = read_config(convert(source, tmp_path / "exact", "--full-ratio", 0.5, "--recipe=exact"))
    assert paper["full_attention"] == {"rope": False, "log_scale_base": 512, "gate": True}
    assert exact["full_attention"] == {"rope": True, "log_scale_base": None, "gate": False}
    assert (paper["fusion"]["norm"], exact["fusion"]["norm"]) == (True, "linear")
    for config in (paper, exact):
        assert config["model_type"] == "hydrahead"
        assert config["architectures"] == ["HydraHeadForCausalLM"]
        assert config["head_order"] == "full_first"
        assert config["full_attention_heads"] == [[0, 1], [2, 3], [0, 1]]
        assert config["fusion"]["eps"] == teacher["rms_norm_eps"]
        for name in ("rope_parameters", "vocab_size", "head_dim", "dtype", "hidden_act"):
            assert config[name] == teacher[name]
        assert "layer_types" not in config and "use_sliding_window" not in config


def test_without_a_choice_a_quarter_of_the_heads_stays_full(tmp_path, capsys):
    write_qwen3(tmp_path / "source", num_attention_heads=8, num_key_value_heads=4)
    out = convert(tmp_path / "source", tmp_path / "out")
    assert read_config(out)["full_attention_heads"] == [[0, 1], [2, 3], [4, 5]]
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "6 of 24 heads are full (25.0%)" in printed.out
    assert "3 of 12 KV heads (25.0%, whole groups)" in printed.out
    heads = heads_file(tmp_path / "heads.json", [[0, 2]] * 3, 8)
    convert(tmp_path / "source", tmp_path / "scattered", "--heads", heads)
    assert "6 of 12 KV heads (50.0%, groups in part)" in capsys.readouterr().out


def test_what_is_not_needed_is_left_out(tmp_path):
    weights = write_qwen3(tmp_path / "source", tie_word_embeddings=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((8,))
    write_checkpoint(tmp_path / "more", {**QWEN3, "tie_word_embeddings": True}, weights)
    convert(tmp_path / "source", tmp_path / "out")
    convert(tmp_path / "more", tmp_path / "out2")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "out2")


# --- Calibration ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["paper", "exact"])
def test_gamma_starts_at_the_rms_of_the_teachers_heads(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_hydra.checkpoints.calibrate.CHUNK", 7)
    write_qwen3(tmp_path / "source")
    tiny.write_tokenizer(tmp_path / "source")
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).integers(0, 50, 40)
    text.write_text(" ".join(f"w{i}" for i in words))
    options = ("--heads", heads_file(tmp_path / "heads.json", HEADS, 6), "--recipe", recipe)
    out = convert(tmp_path / "source", tmp_path / "out", *options, "--calibrate", text)

    teacher, tokenizer = tiny.load(tmp_path / "source")
    inputs = []
    for block in teacher.layers:
        block.self_attn.o_proj = Spy(block.self_attn.o_proj, inputs)
    teacher(mx.array(tokenizer.encode(text.read_text()))[None])
    gammas = [layer.self_attn for layer in load(out).layers]
    for layer, full in enumerate(HEADS):
        o = np.array(inputs[layer]).reshape(40, 6, 16)
        rms = np.sqrt((o**2).mean((0, 2)))
        linear = [h for h in range(6) if h not in full]
        expected = [1.0 if recipe == "exact" else rms[h] for h in full] + [rms[h] for h in linear]
        if recipe == "exact" and not linear:
            assert "fusion" not in gammas[layer]
            continue
        gamma = gammas[layer].fusion.gamma
        assert gamma.dtype == mx.float32
        np.testing.assert_allclose(np.array(gamma), expected, rtol=1e-4)


class Spy:
    def __init__(self, inner, inputs):
        self.inner, self.inputs = inner, inputs

    def __call__(self, x):
        self.inputs.append(x)
        return self.inner(x)


def test_a_long_text_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_hydra.checkpoints.calibrate.MAX_TOKENS", 16)
    write_qwen3(tmp_path / "source")
    tiny.write_tokenizer(tmp_path / "source")
    for name, count in (("short", 16), ("long", 100)):
        (tmp_path / name).write_text(" ".join(f"w{i % 50}" for i in range(count)))
        convert(tmp_path / "source", tmp_path / f"{name}-out", "--calibrate", tmp_path / name)
    assert read_bytes(tmp_path / "short-out") == read_bytes(tmp_path / "long-out")


# --- From PyTorch and back ------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_HYDRAHEAD)
def test_a_pytorch_checkpoint_gives_its_golden_logits(name, tmp_path):
    model = load(convert(tiny.GOLDEN / name, tmp_path / "out"))
    golden = mx.load(str(tiny.GOLDEN / f"{name}.safetensors"))
    assert relative_error(model(golden["tokens"]), golden["logits"]) < 1e-4
    assert relative_error(tiny.in_steps(model, golden["tokens"], 1), golden["logits"]) < 1e-4


@pytest.mark.parametrize("name", GOLDEN_HYDRAHEAD)
def test_a_pytorch_checkpoint_comes_back_as_it_was(name, tmp_path):
    out = convert(tiny.GOLDEN / name, tmp_path / "out")
    back = convert(out, tmp_path / "back", "--to-hf")
    assert read_bytes(back) == read_bytes(tiny.GOLDEN / name)
    assert read_config(back) == read_config(tiny.GOLDEN / name)
    assert not (back / "hydrahead.py").exists()


@st.composite
def head_maps(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = st.lists(st.integers(0, kv_heads * group - 1), unique=True)
    maps = draw(st.tuples(heads, heads).filter(any))
    return kv_heads * group, kv_heads, [list(m) for m in maps]


@settings(max_examples=15)
@given(
    head_maps(),
    st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    st.sampled_from([None, 2, 4]),
    st.sampled_from([True, False, "linear"]),
    st.booleans(),
)
def test_there_and_back_is_the_identity(heads, dtype, conv, norm, gate):
    num_heads, kv_heads, full = heads
    changes = {
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "full_attention_heads": full,
        "full_attention": {"gate": gate},
        "linear_attention": {"conv_kernel_size": conv, "gate": gate},
        "fusion": {"norm": norm},
        "tie_word_embeddings": gate,
    }
    model = tiny.model(**changes)
    weights = {
        name: x.astype(dtype) if may_cast(name) else x
        for name, x in tree_flatten(model.parameters())
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = {
            **tiny.config(**changes),
            "head_order": "full_first",
            "model_file": "hydrahead.py",
        }
        write_checkpoint(folder / "mlx", config, weights, shards=2)
        convert(folder / "mlx", folder / "hf", "--to-hf")
        convert(folder / "hf", folder / "back")
        assert read_bytes(folder / "back") == read_bytes(folder / "mlx")
        assert read_config(folder / "back") == read_config(folder / "mlx")
        convert(folder / "back", folder / "again", "--to-hf")
        assert read_bytes(folder / "again") == read_bytes(folder / "hf")


def test_gamma_and_decay_are_float32_under_mlx_whatever_they_were(tmp_path):
    weights = mx.load(str(tiny.GOLDEN / "hydrahead_paper" / "model.safetensors"))
    weights = {name: x.astype(mx.bfloat16) for name, x in weights.items()}
    write_checkpoint(tmp_path / "source", read_config(tiny.GOLDEN / "hydrahead_paper"), weights)
    out = read_bytes(convert(tmp_path / "source", tmp_path / "out"))
    for name, (dtype, _, _) in out.items():
        assert dtype == ("BF16" if may_cast(name) else "F32")


def test_flash_linear_attentions_names_are_understood(tmp_path):
    """Its layer: other module names, no norm weights on q and k, no gate bias, an output norm."""
    config = read_config(tiny.GOLDEN / "hydrahead_paper")
    weights = mx.load(str(tiny.GOLDEN / "hydrahead_paper" / "model.safetensors"))
    fla, same = {}, dict(weights)
    for name, x in weights.items():
        if ".linear." in name and name.endswith(("_norm.weight", "g_proj.bias")):
            same[name] = mx.ones(x.shape) if "norm" in name else mx.zeros(x.shape)
        else:
            name = name.replace(".self_attn.linear.", ".attn.linear_attn.")
            fla[name.replace(".self_attn.full.", ".full_attn.")] = x
    for layer, full in enumerate(config["full_attention_heads"]):
        norm = 1 + 0.3 * np.random.default_rng(layer).standard_normal(16, dtype=np.float32)
        fla[f"model.layers.{layer}.attn.linear_attn.o_norm.weight"] = mx.array(norm)
        o_proj = np.array(same[f"model.layers.{layer}.self_attn.o_proj.weight"])
        for head in set(range(4)) - set(full):
            o_proj[:, 16 * head : 16 * (head + 1)] *= norm
        same[f"model.layers.{layer}.self_attn.o_proj.weight"] = mx.array(o_proj)
    write_checkpoint(tmp_path / "fla", config, fla)
    write_checkpoint(tmp_path / "same", config, same)
    convert(tmp_path / "fla", tmp_path / "fla-out")
    convert(tmp_path / "same", tmp_path / "same-out")
    assert read_bytes(tmp_path / "fla-out") == read_bytes(tmp_path / "same-out")


# --- Quantisation and dtypes ----------------------------------------------------------------


@pytest.mark.parametrize("bits, group_size", [(4, 32), (8, 32), (4, 64), (8, 64)])
def test_quantised_as_mlx_lm_would(bits, group_size, tmp_path):
    write_qwen3(tmp_path / "source", dtype=mx.bfloat16)
    tiny.write_tokenizer(tmp_path / "source")
    options = ("--recipe", "exact", "--full-ratio", 0.34)
    plain = convert(tmp_path / "source", tmp_path / "plain", *options)
    q = ("-q", "--q-bits", bits, "--q-group-size", group_size)
    out = convert(tmp_path / "source", tmp_path / "out", *options, *q)

    model, config = quantize_model(load(plain), read_config(plain), group_size, bits)
    save_model(tmp_path / "peer", model)
    assert read_bytes(out) == read_bytes(tmp_path / "peer")
    for name in ("quantization", "quantization_config"):
        assert read_config(out)[name] == config["quantization"]

    # The way of mlx_lm.generate --trust-remote-code: through the file that travels along.
    shimmed, tokenizer = tiny.load(out)
    linear = shimmed.layers[0].self_attn.linear
    assert isinstance(shimmed.model.embed_tokens, nn.QuantizedEmbedding) == (group_size == 32)
    assert isinstance(linear.q_proj, nn.QuantizedLinear) == (group_size == 32)
    assert isinstance(shimmed.layers[0].mlp.down_proj, nn.QuantizedLinear)
    assert isinstance(linear.a_proj, nn.Linear)
    assert linear.A_log.dtype == linear.dt_bias.dtype == mx.float32
    assert shimmed.layers[0].self_attn.fusion.gamma.dtype == mx.float32
    tokens = mx.array(tokenizer.encode("w1 w2 w3"))[None]
    assert tiny.distance(shimmed(tokens), load(out)(tokens)) == 0


def test_the_shim_stands_alone(tmp_path, monkeypatch):
    write_qwen3(tmp_path / "source")
    out = convert(tmp_path / "source", tmp_path / "out")
    monkeypatch.delitem(sys.modules, "mlx_lm.models.hydrahead")
    if tiny.ASKS_FOR_TRUST:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_model(out)
    assert load_model(out, **tiny.TRUSTED)[0].layers
    monkeypatch.setitem(sys.modules, "mlx_hydra.models.hydrahead", None)
    with pytest.raises(ImportError, match="pip install mlx-hydra"):
        load_model(out, **tiny.TRUSTED)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_casts_all_but_what_stays_float32(dtype, tmp_path):
    write_qwen3(tmp_path / "source", dtype=mx.float32)
    plain = convert(tmp_path / "source", tmp_path / "plain")
    out = convert(tmp_path / "source", tmp_path / "out", "--dtype", dtype)
    assert read_config(out)["torch_dtype"] == dtype and "dtype" not in read_config(out)
    weights = mx.load(str(out / "model.safetensors"))
    for name, x in mx.load(str(plain / "model.safetensors")).items():
        expected = x.astype(getattr(mx, dtype)) if may_cast(name) else x
        assert weights[name].dtype == expected.dtype
        assert mx.array_equal(weights[name], expected)


# --- The folder -----------------------------------------------------------------------------


def test_what_belongs_to_the_model_is_carried_along_and_no_code(tmp_path):
    write_qwen3(tmp_path / "source", auto_map={"AutoModel": "modeling_evil.py"})
    carried = ["tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE.txt"]
    carried += ["generation_config.json", "tokenizer_config.json"]
    for name in [*carried, "modeling_evil.py", "hydrahead.py", "README.md", "optimizer.pt"]:
        (tmp_path / "source" / name).write_text(f"this is {name}")
    (tmp_path / "source" / "LICENSES").mkdir()
    out = convert(tmp_path / "source", tmp_path / "out")
    files = {path.name for path in out.iterdir()}
    weights = {"model.safetensors", "model.safetensors.index.json"}
    assert files == {*carried, *weights, "config.json", "hydrahead.py"}
    for name in carried:
        assert (out / name).read_text() == f"this is {name}"
    assert (
        "from mlx_hydra.models.hydrahead import Model, ModelArgs"
        in (out / "hydrahead.py").read_text()
    )
    assert "auto_map" not in read_config(out)

    golden = copy_golden("hydrahead_plain", tmp_path / "golden")
    config = {**read_config(golden), "auto_map": {"AutoModel": "modeling_evil.py"}}
    (golden / "config.json").write_text(json.dumps(config))
    assert "auto_map" not in read_config(convert(golden, tmp_path / "out2"))


@pytest.mark.parametrize("options", [(), ("-q", "--q-group-size", "32")])
def test_shards_and_index_are_as_mlx_lms(options, tmp_path, monkeypatch):
    write_qwen3(tmp_path / "source", dtype=mx.bfloat16, shards=3)
    whole = convert(tmp_path / "source", tmp_path / "whole", *options)
    monkeypatch.setattr(mlx_hydra.convert, "SHARD_BYTES", 30_000)
    out = convert(tmp_path / "source", tmp_path / "out", *options)
    assert read_bytes(out) == read_bytes(whole)

    shards = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert all(path.stat().st_size < 40_000 for path in out.glob("*.safetensors"))

    model = load(out)
    save_model(tmp_path / "peer", model)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    peer = json.loads((tmp_path / "peer" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == peer["metadata"]["total_size"]
    # mlx-lm leaves out parameters that are not of a leaf module, as A_log is.
    decay = sum(2 * len(layer.self_attn.linear.A_log) for layer in model.layers)
    total = peer["metadata"]["total_parameters"] + decay
    assert index["metadata"]["total_parameters"] == total
    assert list(index["weight_map"]) == list(peer["weight_map"])
    for name, shard in index["weight_map"].items():
        assert name in mx.load(str(out / shard))


def test_a_dry_run_tells_every_tensors_fate_and_writes_nothing(tmp_path, capsys):
    weights = write_qwen3(tmp_path / "source", tie_word_embeddings=True, dtype=mx.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "source", {**QWEN3, "tie_word_embeddings": True}, weights)
    options = ("-q", "--q-group-size", "64")
    convert(tmp_path / "source", tmp_path / "out", *options, "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = {}
    for line in printed.out.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 5:
            rows[cells[0] if cells[0] != "-" else cells[1]] = cells[1:]

    def row(name):
        return " | ".join(rows[name])

    prefix = "model.layers.0.self_attn."
    assert row("lm_head.weight").endswith("left out: tied to model.embed_tokens.weight")
    assert row("model.layers.0.mlp.down_proj.weight").endswith(
        "32 x 64 | 4 bits, bfloat16 | as it is"
    )
    assert "32 columns: not quantised" in row("model.embed_tokens.weight")
    assert f"{prefix}k_proj.weight | 80 x 32" in row(f"{prefix}linear.k_proj.weight")
    assert "rows of KV heads 0, 1 (2 times), 2 (2 times)" in row(f"{prefix}linear.k_proj.weight")
    assert row(f"{prefix}linear.A_log") == "- | 5 | float32 | new: A spread over heads"

    out = convert(tmp_path / "source", tmp_path / "out", *options)
    written = read_bytes(out)
    targets = {n for n in written if not n.endswith((".scales", ".biases"))}
    assert targets == set(rows) - {"lm_head.weight", "tensor"}
    assert f"{len(written)} tensors from {len(targets)} weights, 1 left out" in printed.out
    size = sum(len(data) for _, _, data in written.values())
    assert f"{size / 1e6:,.1f} MB" in printed.out


def test_a_dry_run_needs_no_place_to_write(tmp_path, capsys):
    write_qwen3(tmp_path / "source")
    mlx_hydra.convert.main(["--hf-path", str(tmp_path / "source"), "--dry-run"])
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_a_repository_is_fetched_without_its_code(tmp_path, monkeypatch):
    write_qwen3(tmp_path / "source")
    asked = {}

    def snapshot_download(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "source")

    monkeypatch.setattr(mlx_hydra.hub, "snapshot_download", snapshot_download)
    out = convert("Qwen/Qwen3-0.6B", tmp_path / "out", "--revision", "main")
    assert (out / "model.safetensors").exists()
    assert (asked["repository"], asked["revision"]) == ("Qwen/Qwen3-0.6B", "main")
    assert not any(
        p.endswith((".py", ".bin", "*")) and p != "LICENSE*" for p in asked["patterns"][:3]
    )
    assert not any(".py" in p for p in asked["patterns"])
