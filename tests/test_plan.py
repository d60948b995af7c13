"""The plan: its parts are what a run measures, and its largest context is the largest."""

import gc
import json
import re
import sys

import mlx.core as mx
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_hydra import plan
from mlx_hydra.generate import digest, new_cache
from mlx_hydra.models.cache import cache_bytes
from mlx_hydra.models.hydrahead import Model, ModelArgs
from mlx_hydra.plan import Planner


def sizes(hidden, intermediate, heads, kv_heads, head_dim, full) -> dict:
    return tiny.config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=len(full),
        full_attention_heads=full,
    )


EIGHTH = sizes(64, 128, 8, 4, 32, [[0]] * 4)
DEEP = sizes(64, 128, 8, 4, 32, [[0]] * 12)
RAGGED = sizes(64, 128, 8, 4, 32, [[0, 1, 2, 4], [], [7]])
LARGER = sizes(256, 768, 8, 4, 64, [[0, 1]] * 3)
ALL_FULL = sizes(64, 128, 8, 4, 32, [list(range(8))] * 2)


def measure(config, tokens, step, kv_bits):
    gc.collect()
    of_others = mx.get_active_memory()
    model = Model(ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    weights = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    cache = new_cache(model, config, kv_bits)
    mx.clear_cache()
    mx.reset_peak_memory()
    digest(model, cache, [5] * tokens, step, lambda done: None)
    return weights, mx.get_peak_memory() - of_others, cache_bytes(cache)


on_cpu = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="the estimate is set by peaks measured on a CPU"
)


@on_cpu
@pytest.mark.parametrize(
    ("config", "tokens", "step", "kv_bits"),
    [
        (EIGHTH, 300, 64, None),
        (EIGHTH, 1500, 500, None),
        (EIGHTH, 1000, 256, 8),
        (DEEP, 400, 200, None),
        (RAGGED, 1500, 500, None),
        (LARGER, 600, 256, None),
        (LARGER, 500, 256, 4),
        (ALL_FULL, 1500, 512, None),
    ],
)
def test_the_plan_is_near_the_measured_peak(config, tokens, step, kv_bits):
    weights, peak, held = measure(config, tokens, step, kv_bits)
    planned = Planner.for_model(config, weights, 4, step, kv_bits).plan(tokens)
    assert 0.9 * peak <= planned.total <= 1.5 * peak
    assert planned.linear_attention_state == held["linear_attention"]
    kv = held["full_attention"]
    # At most one growth step more than is held.
    assert kv <= planned.full_attention_cache <= kv * (tokens + 512) / tokens


@on_cpu
@pytest.mark.parametrize("config", [ALL_FULL, RAGGED])
def test_scores_stay_within_some_blocks(config, monkeypatch):
    for module in ("mlx_hydra.ops.head_attention", "mlx_hydra.plan"):
        monkeypatch.setattr(sys.modules[module], "SCORE_BYTES", 1 << 20)
    weights, peak, _ = measure(config, 2000, 500, None)
    assert peak <= Planner.for_model(config, weights, 4, 500, None).plan(2000).total


@given(
    memory=st.integers(0, 1 << 36),
    step=st.sampled_from([1, 100, 2048]),
    kv_bits=st.sampled_from([None, 4]),
)
def test_the_largest_context_is_the_largest(memory, step, kv_bits):
    planner = Planner.for_model(LARGER, 1 << 24, 4, step, kv_bits)
    largest = planner.largest_context(memory)
    assert largest == 0 or planner.plan(largest).total <= memory
    assert planner.plan(largest + 1).total > memory


def test_quantised_keys_and_small_steps_need_less():
    def total(step, kv_bits):
        return Planner.for_model(EIGHTH, 0, 4, step, kv_bits).plan(100_000).total

    assert total(2048, 4) < total(2048, 8) < total(2048, None)
    assert total(256, None) < total(2048, None)


def test_a_run_that_does_not_fit_is_refused_with_what_would():
    planner = Planner.for_model(EIGHTH, 10**6, 4, 2048)
    memory = 100 * 10**6
    planner.check(planner.largest_context(memory), memory)
    with pytest.raises(ValueError, match="--kv-bits 4 or --prefill-step-size 256") as error:
        planner.check(10**6, memory)
    assert f"{planner.largest_context(memory):,} tokens" in str(error.value)
    with pytest.raises(ValueError, match=r"tokens\.$"):
        Planner.for_model(EIGHTH, 10**6, 4, 64, 4).check(10**7, memory)


def test_a_type_that_is_not_known_has_no_plan():
    with pytest.raises(ValueError, match="No plan for this model type"):
        plan.show_plan(None, [1000], as_json=False)


def test_dense_models_are_planned_and_others_are_not():
    dense = {k: v for k, v in EIGHTH.items() if k != "full_attention_heads"}
    planner = Planner.for_model(dense | {"model_type": "qwen3"}, 0, 4, 512)
    heads = EIGHTH["num_key_value_heads"] * EIGHTH["num_hidden_layers"]
    tokens = 10_000
    held = planner.plan(tokens)
    assert held.full_attention_cache == heads * 2 * 32 * 4 * (tokens + plan.CACHE_STEP)
    assert held.linear_attention_state == 0
    assert Planner.for_model(dense | {"model_type": "mamba"}, 0, 4, 512) is None
    with pytest.raises(ValueError, match="lacks num_attention_heads"):
        Planner.for_model({"model_type": "llama"}, 0, 4, 512)


def test_group_sizes_are_what_mlx_can_quantise():
    assert [plan.kv_group_size(d) for d in (32, 64, 96, 128)] == [32, 64, 32, 64]
    with pytest.raises(ValueError, match="head_dim=80 is not a multiple of 32"):
        plan.kv_group_size(80)
    assert plan.head_dim({"hidden_size": 64, "num_attention_heads": 4}) == 16
    assert plan.head_dim({"text_config": {"head_dim": 128}}) == 128
    with pytest.raises(ValueError, match="head_dim"):
        plan.head_dim({})


def test_free_memory_is_read_from_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(plan, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(plan, "CGROUP", tmp_path)
    assert plan.machine_memory() > 1 << 28
    plan.MEMINFO.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    assert plan.machine_memory() == 4000 * 1024
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.machine_memory() == 4000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert plan.machine_memory() == 600000


@pytest.mark.parametrize(
    ("info", "memory"),
    [
        ({"max_recommended_working_set_size": 12, "memory_size": 16}, 12),
        ({"free_memory": 70, "total_memory": 80}, 70),
    ],
)
def test_a_gpu_tells_its_memory(monkeypatch, info, memory):
    monkeypatch.setattr(plan.mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(plan.mx, "device_info", lambda: info)
    assert plan.machine_memory() == memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.model(), tiny.config(), tmp_path_factory.mktemp("model"))


def test_the_command_prints_a_table(folder, capsys):
    plan.main(["--model", str(folder), "--tokens", "1000", "2000"])
    out = capsys.readouterr().out
    for words in ("1,000 tokens", "2,000 tokens", "linear-attention state", "yes"):
        assert words in out
    assert re.search(r"The largest context that fits is [\d,]+ tokens", out)


def test_the_command_prints_json(folder, capsys):
    plan.main(["--model", str(folder), "--tokens", "1000", "--json"])
    found = json.loads(capsys.readouterr().out)
    parts = ("weights", "full_attention_cache", "linear_attention_state", "prefill")
    assert found["total"] == sum(found[part] for part in parts)
    weights = mx.load(str(folder / "model.safetensors"))
    assert found["weights"] == sum(x.nbytes for x in weights.values())
    assert found["tokens"] == 1000 and found["largest_context"] > 1000


@pytest.mark.parametrize(
    "arguments", [["--tokens", "0"], ["--prefill-step-size", "0"], ["--tokens"]]
)
def test_the_command_refuses_senseless_numbers(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        plan.main(["--model", str(folder), *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
