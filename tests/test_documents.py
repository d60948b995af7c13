"""Documents: what is read, what is refused, and how a question is put after them."""

import codecs
import io
import json
import sys

import pytest
import tiny
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_hydra.documents import demo
from mlx_hydra.documents.prompt import build_prompt
from mlx_hydra.documents.read import Document, read_documents


def read(tmp_path, data: bytes) -> str:
    path = tmp_path / "report.txt"
    path.write_bytes(data)
    return read_documents([str(path)])[0].text


def test_text_comes_back_whole(tmp_path):
    text = "Zürich, 東京\n\n  and more"
    assert read(tmp_path, text.encode()) == text
    assert read(tmp_path, codecs.BOM_UTF8 + text.encode()) == text
    assert read(tmp_path, f"\n\n{text} \n".encode()) == text


def test_stdin_is_a_document(monkeypatch, tmp_path):
    (tmp_path / "a").write_text("from a file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    documents = read_documents([str(tmp_path / "a"), "-"])
    assert [d.text for d in documents] == ["from a file", "from a pipe"]
    assert documents[1].name == "stdin"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty"),
        (b" \n\t \n", "empty"),
        (codecs.BOM_UTF8, "empty"),
        (b"text\0more", "binary document (a zero byte at offset 4)"),
        (bytes(range(128, 256)) * 4, "binary document, or not in UTF-8 (first undecodable byte"),
        ("Text".encode("utf-16"), "UTF-16"),
        (b"na\xefve text, only one slip", "byte 0xef at offset 2"),
        (codecs.BOM_UTF8 + b"na\xefve text, only one slip", "byte 0xef at offset 5"),
        (b"cut in the middle of a character \xc3", "byte 0xc3 at offset 33"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path, data, told):
    with pytest.raises(ValueError, match=r"--document .*report\.txt") as error:
        read(tmp_path, data)
    assert told in str(error.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        read_documents([str(tmp_path / "nothing.txt")])
    with pytest.raises(OSError, match="is a directory"):
        read_documents([str(tmp_path)])
    with pytest.raises(ValueError, match="twice"):
        read_documents(["-", "-"])


def make_tokenizer(folder, template=None, bos=False):
    """Byte-level BPE, so that words merge across whatever is not kept apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "<user>", "<end>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the report ends here.\n\nWhat is in it? What? Why?"] * 9, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if bos else None, eos_token="<end>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REPORT = Document("report.txt", "the report ends here.")


def test_without_a_template_the_message_is_the_text(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    prompt = build_prompt(tokenizer, [REPORT], "What?")
    assert tokenizer.decode(prompt.document) == REPORT.text
    assert tokenizer.decode(prompt.question) == "\n\nWhat?"
    assert len(prompt) == len(prompt.document) + len(prompt.question)


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("m.content", "m.content | trim")])
def test_the_template_goes_around_the_message(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template)
    prompt = build_prompt(tokenizer, [REPORT], " What? ".strip())
    assert tokenizer.decode(prompt.document) == f"<user>{REPORT.text}"
    assert tokenizer.decode(prompt.question) == "\n\nWhat?<end><assistant>"
    bare = build_prompt(tokenizer, [REPORT], "What?", use_chat_template=False)
    assert tokenizer.decode(bare.document + bare.question) == f"{REPORT.text}\n\nWhat?"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_no_question_moves_the_end_of_the_document(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template)
    prompts = [build_prompt(tokenizer, [REPORT], q) for q in ("What is in it?", "Why?", "?")]
    assert len({tuple(p.document) for p in prompts}) == 1
    # The tokenizer merges across the boundary if it is given both parts at once.
    whole = tokenizer.encode(f"{REPORT.text}\n\nWhat is in it?", add_special_tokens=False)
    apart = build_prompt(tokenizer, [REPORT], "What is in it?", use_chat_template=False)
    assert whole != apart.document + apart.question


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("documents", [[], [REPORT]])
def test_the_first_special_token_comes_once(tmp_path, template, documents):
    tokenizer = make_tokenizer(tmp_path, template, bos=True)
    prompt = build_prompt(tokenizer, documents, "What?")
    ids = prompt.document + prompt.question
    assert ids[0] == 0 and ids.count(0) == 1


def test_several_documents_carry_their_names(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    documents = [Document("a.txt", "first"), Document("b.txt", "second")]
    prompt = build_prompt(tokenizer, documents, "What?")
    assert tokenizer.decode(prompt.document) == "a.txt\nfirst\n\nb.txt\nsecond"


def test_without_documents_all_is_the_question(tmp_path):
    prompt = build_prompt(make_tokenizer(tmp_path, TEMPLATE), [], "user")
    assert prompt.document == []
    assert prompt.question == load_tokenizer(tmp_path).apply_chat_template(
        [{"role": "user", "content": "user"}], add_generation_prompt=True
    )


def test_a_template_that_rewrites_the_message_is_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path, TEMPLATE.replace("m.content", "m.content | upper"))
    with pytest.raises(ValueError, match="--ignore-chat-template"):
        build_prompt(tokenizer, [REPORT], "What?")


def test_long_documents_raise_no_warning(tmp_path, caplog):
    tiny.write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 4}))
    prompt = build_prompt(load_tokenizer(tmp_path), [Document("a", "w1 " * 50)], "w2")
    assert len(prompt.document) > 50
    assert caplog.records == []


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("4711", True),
        ("The code is 4711.", True),
        ("14711", False),
        ("47119", False),
        ("", False),
    ],
)
def test_an_answer_is_right_where_it_holds_the_expected_words(text, right):
    assert demo.Question("Which code?", "4711", 0.1).is_answered_by(text) == right
