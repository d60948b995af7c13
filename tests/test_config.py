import json

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mlx_hydra.config import (
    LayerHeads,
    ModelArgs,
    check_heads,
    from_known_fields,
    load_heads,
    spread_heads,
)

ALL_FULL = [[0, 1, 2, 3]] * 3


def args(**changes):
    return ModelArgs.from_dict(tiny.config(**changes))


def refusal(action, *arguments, **options) -> str:
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as error:
        action(*arguments, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "full, num_heads, num_kv_heads, kv_heads, kv_index, linear",
    [
        ([1], 4, 2, (0,), (0,), (0, 2, 3)),
        ([3, 0], 4, 2, (0, 1), (0, 1), (1, 2)),
        ([0, 1, 4], 6, 3, (0, 2), (0, 0, 1), (2, 3, 5)),
        ([5, 4], 6, 3, (2,), (0, 0), (0, 1, 2, 3)),
        ([], 4, 2, (), (), (0, 1, 2, 3)),
        ([0, 1, 2, 3], 4, 1, (0,), (0, 0, 0, 0), ()),
        ([1, 3], 4, 4, (1, 3), (0, 1), (0, 2)),
    ],
)
def test_full_heads_keep_only_the_kv_heads_that_they_read(
    full, num_heads, num_kv_heads, kv_heads, kv_index, linear
):
    heads = LayerHeads.split(full, num_heads, num_kv_heads)
    assert heads.full == tuple(sorted(full))
    assert (heads.linear, heads.kv_heads, heads.kv_index) == (linear, kv_heads, kv_index)
    assert heads.order == heads.full + heads.linear


@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_every_head_has_one_place_and_reads_its_own_kv_head(num_kv_heads, group, data):
    num_heads = num_kv_heads * group
    full = data.draw(st.sets(st.integers(0, num_heads - 1)))
    heads = LayerHeads.split(full, num_heads, num_kv_heads)
    assert sorted(heads.order) == list(range(num_heads))
    assert [heads.kv_heads[i] for i in heads.kv_index] == [h // group for h in heads.full]
    assert set(heads.kv_index) == set(range(len(heads.kv_heads)))


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 30), st.integers(1, 6), st.integers(1, 5))
def test_a_share_of_heads_is_spread_evenly_in_whole_groups(ratio, layers, num_kv_heads, group):
    num_heads = num_kv_heads * group
    heads = spread_heads(ratio, layers, num_heads, num_kv_heads)
    check_heads(heads, layers, num_heads)
    counts = [len(chosen) for chosen in heads]
    assert sum(counts) == max(layers, round(ratio * layers * num_heads))
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    for start in range(layers):  # evenly: no stretch of layers holds more than its share
        for stop in range(start + 1, layers + 1):
            share = sum(counts) * (stop - start) / layers
            assert abs(sum(counts[start:stop]) - share) < 1
    for chosen in heads:
        used = LayerHeads.split(chosen, num_heads, num_kv_heads).kv_heads
        assert len(used) == -(-len(chosen) // group)
        assert chosen == sorted(chosen)


def test_the_groups_in_use_move_on_from_layer_to_layer():
    heads = spread_heads(0.125, 28, 16, 8)
    assert heads[:3] == [[0, 1], [2, 3], [4, 5]]
    assert sum(map(len, heads)) == 56
    used = [LayerHeads.split(chosen, 16, 8).kv_heads for chosen in heads]
    assert {len(kv) for kv in used} == {1}
    assert {kv[0] for kv in used} == set(range(8))


@pytest.mark.parametrize(
    "ratio, count", [(0.125, 56), (0.1, 45), (0.11, 49), (0.001, 28), (1, 448)]
)
def test_the_number_of_full_heads_is_the_nearest_to_the_share(ratio, count):
    assert sum(map(len, spread_heads(ratio, 28, 16, 8))) == count


def test_all_heads_can_be_chosen():
    assert spread_heads(1.0, 3, 4, 2) == ALL_FULL


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(ratio):
    assert f"--full-ratio {ratio}" in refusal(spread_heads, ratio, 2, 4, 2)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: expected an integer from 1 up"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"head_dim": None}, "head_dim=None"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': expected true or false"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6'"),
        ({"rope_scaling": [2.0]}, "rope_scaling=[2.0]"),
        ({"rope_theta": None, "rope_parameters": "yarn"}, "rope_parameters='yarn'"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"head_order": "sorted"}, "head_order='sorted': expected one of full_first, teacher"),
        ({"full_attention_heads": [[0], [1]]}, "2 layers, the model has 3"),
        ({"full_attention_heads": [[0], [4], []]}, "layer 1 names head 4; heads go from 0 to 3"),
        ({"full_attention_heads": [[0], [-1], []]}, "layer 1 names head -1"),
        ({"full_attention_heads": [[0], [1.0], []]}, "layer 1 names head 1.0"),
        ({"full_attention_heads": [[0], ["1"], []]}, "layer 1 names head '1'"),
        ({"full_attention_heads": [[True], [], []]}, "layer 0 names head True"),
        ({"full_attention_heads": [[0], [2, 2], []]}, "layer 1 names a head twice: [2, 2]"),
        ({"full_attention_heads": [[], [], []]}, "at least one head must stay full"),
        ({"full_attention_heads": None}, "full_attention_heads"),
        ({"full_attention_heads": [0, 1, 2]}, "full_attention_heads"),
        ({"full_attention": {"rop": True}}, "full_attention.rop is not a field; did you mean"),
        ({"linear_attention": {"conv_size": 4}}, "did you mean 'conv_kernel_size'?"),
        ({"fusion": {"epsilon": 1}}, "fusion.epsilon is not a field; did you mean 'eps'?"),
        ({"full_attention": {"log_scale_base": 1}}, "full_attention.log_scale_base=1"),
        ({"full_attention": {"log_scale_base": "64"}}, "full_attention.log_scale_base='64'"),
        ({"full_attention": {"log_scale_base": float("nan")}}, "log_scale_base=nan"),
        ({"full_attention": {"log_scale_base": float("inf")}}, "log_scale_base=inf"),
        ({"full_attention": None}, "full_attention=None"),
        ({"linear_attention": {"kind": "mamba"}}, "linear_attention.kind='mamba'"),
        ({"linear_attention": {"conv_kernel_size": 1}}, "linear_attention.conv_kernel_size=1"),
        ({"linear_attention": {"conv_kernel_size": 2.5}}, "linear_attention.conv_kernel_size=2.5"),
        ({"linear_attention": {"conv_kernel_size": "4"}}, "linear_attention.conv_kernel_size='4'"),
        ({"full_attention": {"rope": "yes"}}, "full_attention.rope='yes': expected true or false"),
        ({"linear_attention": {"gate": None}}, "linear_attention.gate=None"),
        ({"fusion": {"eps": -1}}, "fusion.eps=-1"),
        ({"fusion": {"eps": None}}, "fusion.eps=None"),
        ({"linear_attention": [4]}, "linear_attention=[4]"),
        ({"fusion": {"norm": "full"}}, "fusion.norm='full': expected true, false or 'linear'"),
        ({"fusion": {"norm": 1}}, "fusion.norm=1"),
        ({"fusion": {"norm": 0}}, "fusion.norm=0"),
        ({"fusion": {"norm": None}}, "fusion.norm=None"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_field_and_value(changes, named):
    assert named in refusal(args, **changes)


def test_a_config_without_a_head_map_is_refused_by_name():
    settings = tiny.config()
    del settings["full_attention_heads"]
    assert "full_attention_heads" in refusal(ModelArgs.from_dict, settings)


def test_fields_of_others_are_passed_over():
    # A config.json carries many that are transformers' own.
    assert args(architectures=["HydraHeadForCausalLM"], torch_dtype="bfloat16") == args()


def test_switches_left_out_are_the_papers():
    found = args(full_attention={}, linear_attention={}, fusion={})
    assert found.full_attention.rope is False
    assert found.full_attention.log_scale_base is None
    assert found.full_attention.gate is True
    assert found.linear_attention.conv_kernel_size == 4
    assert found.linear_attention.rope is True
    assert found.linear_attention.gate is True
    assert found.fusion.norm is True
    settings = tiny.config()
    for name in ("full_attention", "linear_attention", "fusion"):
        del settings[name]
    assert ModelArgs.from_dict(settings) == found


def test_rope_parameters_of_transformers_5_are_understood():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    found = args(rope_theta=None, rope_parameters=yarn)
    assert (found.rope_theta, found.rope_scaling) == (5e5, yarn)


def test_heads_are_taken_in_any_order():
    assert args(full_attention_heads=[[3, 0], [], [1]]).layer_heads(0).full == (0, 3)


@pytest.mark.parametrize(
    "norm, fused",
    [(True, [True] * 3), ("linear", [True, True, False]), (False, [True, True, False])],
)
def test_a_layer_of_full_heads_alone_has_gamma_only_where_they_are_normed(norm, fused):
    found = args(fusion={"norm": norm})
    assert [found.is_fused(layer) for layer in range(3)] == fused


def test_a_dictionary_becomes_its_dataclass():
    assert from_known_fields(LayerHeads, dict.fromkeys(LayerHeads.__annotations__, ()), "x")


def write(folder, content):
    path = folder / "heads.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_heads_file_is_read_sorted_and_may_say_how_it_was_made(tmp_path):
    content = {
        "num_layers": 3,
        "num_heads": 4,
        "full_attention_heads": [[2, 0], [], [3]],
        "method": "receiver",
        "scores": [[0.1] * 4] * 3,
    }
    assert load_heads(write(tmp_path, content), 3, 4) == [[0, 2], [], [3]]
    bare = {"full_attention_heads": [[1], [], []]}
    assert load_heads(write(tmp_path, bare), 3, 4) == [[1], [], []]


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", "not JSON"),
        ("[[0], [1], [2]]", "expected an object with 'full_attention_heads'"),
        ({"heads": []}, "expected an object with 'full_attention_heads'"),
        ({"full_attention_heads": "all"}, "expected an object with 'full_attention_heads'"),
        ({"full_attention_heads": [0, 1, 2]}, "expected a list of heads a layer"),
        ({"full_attention_heads": [[0]] * 2}, "2 layers, the model has 3"),
        ({"full_attention_heads": [[0], [7], []]}, "layer 1 names head 7"),
        ({"full_attention_heads": [[], [], []]}, "at least one head"),
        (
            {"num_layers": 28, "full_attention_heads": [[0]] * 3},
            "made for another model: num_layers is 28, this model has 3",
        ),
        (
            {"num_heads": 16, "full_attention_heads": [[0]] * 3},
            "made for another model: num_heads is 16, this model has 4",
        ),
    ],
)
def test_a_heads_file_that_does_not_fit_is_refused_with_its_name(tmp_path, content, named):
    path = write(tmp_path, content)
    message = refusal(load_heads, path, 3, 4)
    assert named in message
    assert str(path) in message


def test_a_heads_file_that_cannot_be_read_is_refused_with_its_name(tmp_path):
    missing = tmp_path / "no.json"
    assert f"--heads {missing}: No such file" in refusal(load_heads, missing, 3, 4)
    assert f"--heads {tmp_path}: Is a directory" in refusal(load_heads, tmp_path, 3, 4)
    binary = tmp_path / "heads.bin"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert f"--heads {binary}: not JSON" in refusal(load_heads, binary, 3, 4)
