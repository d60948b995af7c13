"""The lora command's data: every form of mlx-lm's, and what is wrong with a line."""

import importlib.util
import json
import sys

import pytest
import tiny
from mlx_lm.tuner.datasets import load_dataset

from mlx_hydra import lora
from mlx_hydra.loading import load_tokenizer

CALL = {"name": "weather", "arguments": '{"place": "w1"}'}
ASKED = {"role": "user", "content": "w1"}
CALLING = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def refusal(capsys, folder, *options) -> str:
    """What the command says of the data in a folder, before it looks for the model."""
    with pytest.raises(SystemExit) as ended:
        lora.main(["--model", "none", "--data", str(folder), "--train", *map(str, options)])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert error.startswith("error: ") and "\n" not in error
    return error


def chat(*messages) -> bytes:
    return json.dumps({"messages": messages}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.jsonl is empty"),
        (b'{"text": "w1"}\n\n', "train.jsonl, line 2: Expecting value"),
        (b'{"text": "w1"}\n{"test": "w1"}\n', "line 2: 'text' is missing"),
        (b'{"t": "w1"}\n', "expected the fields prompt and completion; or messages; or text"),
        (b"[1]\n", "line 1: expected an object"),
        (b'{"text": "\xff"}\n', "not UTF-8 text"),
        (b'{"text": ""}\n', "line 1: 'text' is empty"),
        (b'{"text": "w1"}\n{"text": " \\n"}\n', "line 2: 'text' is empty"),
        (b'{"text": 5}', "line 1: 'text' is not text"),
        (b'{"text": "w1 \\ud800"}', "line 1: 'text' has half a character, \\ud800, in it"),
        (b'{"prompt": "w1", "completion": null}', "line 1: 'completion' is not text"),
        (b'{"prompt": ["w1"], "completion": "w1"}', "line 1: 'prompt' is not text"),
        (b'{"prompt": "w1", "completion": " "}', "line 1: 'completion' is empty"),
        (b'{"prompt": "w1", "completion": "\\udfff"}', "'completion' has half a character"),
        (b'{"prompt": "w1", "completion": "w2", "tools": "w3"}', "'tools' is not a list"),
        (b'{"messages": "hi"}', "line 1: 'messages' is not a list of messages"),
        (b'{"messages": []}', "line 1: 'messages' is not a list of messages"),
        (b'{"messages": ["hi"]}', "line 1: 'messages', message 1: expected an object"),
        (chat(ASKED, {"content": "w1"}), "'messages', message 2: expected a role"),
        (chat({"role": "user"}), "message 1: the content is not text"),
        (chat({"role": "user", "content": [ASKED]}), "message 1: the content is not text"),
        (chat(ASKED, {"role": "assistant", "content": ""}), "message 2: the content is empty"),
        (chat({"role": "user", "content": "\ud800"}), "'messages' has half a character"),
        (chat({**CALLING, "tool_calls": CALL}), "message 1: tool_calls is not a list"),
        (chat({**CALLING, "tool_calls": ["w1"]}), "expected a name and arguments in each of"),
        (chat({**CALLING, "tool_calls": [{"name": "w1"}]}), "expected a name and arguments in"),
        (chat({**CALLING, "tool_calls": []}), "message 1: the content is not text"),
        (b'{"messages": [{"role": "user", "content": "w1"}], "tools": ["w1"]}', "'tools' is not a"),
    ],
)
def test_wrong_data_is_told_in_a_line(capsys, tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    assert message in refusal(capsys, tmp_path)


def test_prompts_that_cannot_be_masked(capsys, tmp_path):
    for content, message in (
        (b'{"text": "w1"}', "line 1: --mask-prompt: 'text' has no prompt"),
        (chat(ASKED), "line 1: --mask-prompt: 'messages' has no message before the last"),
    ):
        (tmp_path / "train.jsonl").write_bytes(content)
        assert message in refusal(capsys, tmp_path, "--mask-prompt")


def test_fields_of_other_names(capsys, tmp_path):
    settings = tmp_path / "s.yaml"
    settings.write_text("{prompt_feature: q, completion_feature: a, chat_feature: c}")
    for content, message in (
        (b'{"q": "w1", "a": 5}', "line 1: 'a' is not text"),
        (b'{"c": "hi"}', "line 1: 'c' is not a list of messages"),
        (b'{"messages": "hi"}', "expected the fields q and a; or c; or text"),
    ):
        (tmp_path / "train.jsonl").write_bytes(content)
        assert message in refusal(capsys, tmp_path, "-c", settings)
    settings.write_text("text_feature: [text]")
    assert "text_feature=['text']: expected a field's name" in refusal(
        capsys, tmp_path, "-c", settings
    )


@pytest.mark.parametrize(
    "example",
    [
        {"text": "w1"},
        {"prompt": "w1", "completion": "w2", "tools": TOOLS},
        {"messages": [{"role": "system", "content": ""}, ASKED], "tools": None},
        {"messages": [ASKED, CALLING, {"role": "tool", "content": ""}], "tools": TOOLS},
        {"messages": [ASKED, {**CALLING, "content": None, "tool_calls": [CALL]}, ASKED]},
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": "w1 \U0001f600", "tool_calls": None},
            ]
        },
    ],
)
def test_what_mlx_lm_takes_is_taken(tmp_path, example):
    (tmp_path / "train.jsonl").write_text(json.dumps(example))
    options = ["--model", "none", "--data", str(tmp_path), "--train", "--batch-size", "1"]
    args = lora.parse_args(options)
    lora.check_data(args)
    tiny.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, {"model_type": "hydrahead"})
    train_set, *_ = load_dataset(args, tokenizer)
    tokens, _ = train_set.process(train_set[0])
    assert len(tokens) > 1


def test_data_of_the_hub_needs_its_package(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "the package datasets is missing" in refusal(capsys, "owner/name")
    (tmp_path / "s.yaml").write_text("hf_dataset: {path: owner/name}")
    message = refusal(capsys, "owner/name", "-c", tmp_path / "s.yaml")
    assert "hf_dataset: the package datasets is missing" in message
