"""The lora command's data, checked line by line in the forms that mlx-lm's lora takes."""

import importlib.util
import json
import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .config import expect


def check_data(args: Namespace) -> None:
    """Raise a ValueError unless mlx-lm can train or test on ``--data``."""
    datasets = importlib.util.find_spec("datasets") is not None
    if getattr(args, "hf_dataset", None):
        if not datasets:
            raise ValueError("hf_dataset: the package datasets is missing (pip install datasets).")
        return
    if args.data is None:
        raise ValueError("--data is missing: expected a folder with train.jsonl.")
    folder = Path(args.data)
    if not folder.exists():
        if datasets and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.data):
            return
        hint = "" if datasets else "; for data sets of the hub the package datasets is missing"
        raise ValueError(f"--data {args.data}: no such folder{hint}.")
    for name, needed in (("train", args.train), ("valid", False), ("test", args.test)):
        file = folder / f"{name}.jsonl"
        if file.is_file():
            count = count_examples(file, args)
            used = args.test if name == "test" else args.train
            if used and count < args.batch_size:
                raise ValueError(
                    f"{file}: {count} examples are less than a batch (--batch-size "
                    f"{args.batch_size})."
                )
        elif needed:
            raise ValueError(f"--data {args.data}: expected a folder with {name}.jsonl in it.")


def count_examples(file: Path, args: Namespace) -> int:
    """The examples in a JSONL file, all of the one form that mlx-lm takes them to be."""
    forms, checks, count = forms_of(args), None, 0
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                count += 1
                example = json.loads(line)
                if not isinstance(example, dict):
                    raise ValueError("expected an object")
                # As in mlx-lm, the first example tells the form of all.
                checks = checks or next((f for f in forms if f.keys() <= example.keys()), None)
                if checks is None:
                    wanted = "; or ".join(" and ".join(form) for form in forms)
                    raise ValueError(f"expected the fields {wanted}")
                for name, check in checks.items():
                    if name not in example:
                        raise ValueError(f"{name!r} is missing")
                    check(name, example[name])
                if checks is not forms[-1]:
                    check_tools(example.get("tools"))
                elif args.mask_prompt:
                    raise ValueError(f"--mask-prompt: {name!r} has no prompt")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {count}: {error}.") from error
    if not count:
        raise ValueError(f"{file} is empty.")
    return count


def forms_of(args: Namespace) -> list[dict[str, Callable[[str, Any], None]]]:
    """The fields of each form, in mlx-lm's order, with what checks their values."""
    names = []
    for part in ("prompt", "completion", "chat", "text"):
        name = getattr(args, f"{part}_feature", "messages" if part == "chat" else part)
        expect(isinstance(name, str), f"{part}_feature", name, "a field's name")
        names.append(name)
    prompt, completion, chat, text = names
    check_chat = partial(check_messages, fewest=2 if args.mask_prompt else 1)
    return [{prompt: check_text, completion: check_text}, {chat: check_chat}, {text: check_text}]


def check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name!r} is not text")
    if not text.strip():
        raise ValueError(f"{name!r} is empty")
    check_unicode(name, text)


def check_unicode(name: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise ValueError(f"{name!r} has half a character, \\u{code:04x}, in it") from error


def check_messages(name: str, messages: Any, fewest: int) -> None:
    """A conversation, whose assistant has something to say in each of its messages."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name!r} is not a list of messages")
    if len(messages) < fewest:
        raise ValueError(f"--mask-prompt: {name!r} has no message before the last")
    for number, message in enumerate(messages, start=1):
        where = f"{name!r}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: expected an object")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"{where}: expected a role")
        calls, content = message.get("tool_calls"), message.get("content")
        check_calls(calls, where)
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"{where}: the content is not text")
        said = calls or content.strip() or message.get("reasoning_content")
        if message["role"] == "assistant" and not said:
            raise ValueError(f"{where}: the content is empty")
    check_unicode(name, messages)


def check_calls(calls: Any, where: str) -> None:
    """Tool calls as OpenAI writes them, or without the ``function`` around name and arguments."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls is not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), (str, dict))
        ):
            raise ValueError(f"{where}: expected a name and arguments in each of tool_calls")


def check_tools(tools: Any) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is not a list of objects")
    check_unicode("tools", tools)
