"""generate.py from end to end, on tiny random models."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.chat
import mlx_lm.server
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, RotatingKVCache
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_hydra import generate, mlx_lm_commands
from mlx_hydra.documents import demo
from mlx_hydra.documents.prompt import build_prompt
from mlx_hydra.documents.read import Document
from mlx_hydra.loading import fingerprint, load

ROOT = Path(__file__).parent.parent
QUESTION = "w3 w1 w4"
TEXT = " ".join(f"w{7 * i % 50}" for i in range(150))
KEYS = {
    "text",
    "prompt_tokens",
    "prompt_tps",
    "generation_tokens",
    "generation_tps",
    "peak_memory_bytes",
    "cache_bytes",
    "backend",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    settings = tiny.config(head_dim=32)
    return tiny.save(tiny.model(head_dim=32), settings, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same sizes with other weights."""
    settings = tiny.config(head_dim=32)
    return tiny.save(tiny.model(1, head_dim=32), settings, tmp_path_factory.mktemp("other"))


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(capsys):
    """Run the command: its exit code, and the lines of standard output and standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = 0
        try:
            generate.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def ask(run, folder, document):
    """Ask the model about the document; the figures of ``--json``."""

    def ask(*arguments, model=folder, document=document):
        read = () if document is None else ("--document", document)
        code, out, err = run(
            *("--model", model, *read, "--prompt", QUESTION, "--max-tokens", 12, "--json"),
            *arguments,
        )
        assert code == 0, err
        return json.loads(out[-1])

    return ask


def greedy_text(folder, text, use_chat_template=True):
    """What argmax decoding gives after the whole prompt is read at once."""
    model, tokenizer, _ = load(str(folder))
    documents = [Document("report.txt", text)] if text else []
    prompt = build_prompt(tokenizer, documents, QUESTION, use_chat_template)
    tokens, _ = tiny.greedy(model, prompt.document + prompt.question, 12)
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return tokenizer.decode(tokens), len(prompt)


def test_the_answer_is_what_greedy_decoding_gives(ask, folder):
    text, prompt_tokens = greedy_text(folder, TEXT)
    found = ask()
    assert (found["text"], found["prompt_tokens"]) == (text, prompt_tokens)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_the_size_of_a_step_changes_nothing(ask, folder, step):
    assert ask("--prefill-step-size", step)["text"] == greedy_text(folder, TEXT)[0]


def test_the_bare_text_can_be_given(ask, folder):
    text, prompt_tokens = greedy_text(folder, TEXT, use_chat_template=False)
    found = ask("--ignore-chat-template")
    assert (found["text"], found["prompt_tokens"]) == (text, prompt_tokens)
    assert found["text"] != ask()["text"]


def test_a_prompt_alone_is_answered(ask, folder):
    assert ask(document=None)["text"] == greedy_text(folder, "")[0]


def test_streamed_and_whole_answers_are_the_same(run, folder, document):
    arguments = ("--model", folder, "--document", document, "--prompt", QUESTION)
    streamed, whole = run(*arguments), run(*arguments, "--no-stream")
    assert streamed[:2] == whole[:2]
    assert streamed[0] == 0 and streamed[1][0]
    (figures,) = streamed[2]
    assert re.search(r"prompt: \d+ tokens, .* tok/s \| answer: .*peak memory: .*cache: ", figures)


def test_json_is_the_last_line(run, folder, document):
    _, out, _ = run(
        *("--model", folder, "--document", document, "--prompt", QUESTION, "--json"),
        *("--max-tokens", 3),
    )
    found = json.loads(out[-1])
    assert set(found) >= KEYS
    assert set(found["cache_bytes"]) == {"full_attention", "linear_attention"}
    assert all(count > 0 for count in found["cache_bytes"].values())
    assert found["generation_tokens"] == 3 and found["finish_reason"] == "length"
    assert found["text"] == "\n".join(out[:-1])
    assert found["peak_memory_bytes"] > sum(found["cache_bytes"].values())
    assert found["backend"] == f"ops on {'cpu' if mx.default_device() == mx.cpu else 'gpu'}"


def test_a_document_can_be_piped_in(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    piped = ask(document="-")
    assert piped["text"] == ask()["text"]


def test_several_documents_are_read(ask, document, tmp_path):
    (tmp_path / "second.txt").write_text("w20 w21 w22")
    both = ask("--document", tmp_path / "second.txt")
    # Three words, a line with each name.
    assert both["prompt_tokens"] == ask()["prompt_tokens"] + 5


def test_a_seed_fixes_what_is_sampled(ask):
    sampled = ("--temp", 1.5, "--top-p", 0.9, "--seed")
    assert ask(*sampled, 1)["text"] == ask(*sampled, 1)["text"]
    assert len({ask(*sampled, seed)["text"] for seed in range(4)}) > 1


def test_quantised_keys_take_less_memory(ask):
    plain, quantised = ask(), ask("--kv-bits", 8)
    assert quantised["cache_bytes"]["full_attention"] < 0.4 * plain["cache_bytes"]["full_attention"]
    linear = plain["cache_bytes"]["linear_attention"]
    assert quantised["cache_bytes"]["linear_attention"] == linear


class Caches(nn.Module):
    def __init__(self, *caches):
        self.caches = list(caches)

    def make_cache(self):
        return self.caches


@pytest.mark.parametrize("cache", [RotatingKVCache(8), ArraysCache(2)])
def test_a_cache_that_cannot_be_quantised_is_refused(cache):
    with pytest.raises(ValueError, match="cannot be quantised"):
        generate.new_cache(Caches(cache), {"head_dim": 64}, 4)


def test_a_terminal_shows_progress(run, folder, document, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ("--model", folder, "--document", document, "--prompt", QUESTION)
    _, out, err = run(*arguments, "--prefill-step-size", 20)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", " ".join(err))
    assert re.search(r"reading .* 15\d/15\d tokens [\d,]+ tok/s .* MB, peak .* MB", shown)
    monkeypatch.delenv("FORCE_COLOR")
    assert run(*arguments)[1] == out


@pytest.mark.parametrize("options", [(), ("--kv-bits", 8), ("--ignore-chat-template",)])
def test_a_digested_document_is_reused(ask, run, monkeypatch, tmp_path, folder, document, options):
    kept = ("--prompt-cache", tmp_path / "kept", *options)
    first = ask(*kept)
    assert first["reused_tokens"] == 0
    monkeypatch.setattr(generate, "digest", lambda *_: pytest.fail("the document is read again"))
    second = ask(*kept)
    assert second["text"] == first["text"] == ask_again(run, folder, document, kept)
    assert 150 <= second["reused_tokens"] < second["prompt_tokens"] == first["prompt_tokens"]


def ask_again(run, folder, document, kept):
    """The same question after another one: the file must not have grown with it."""
    base = ("--model", folder, "--document", document, "--json", "--max-tokens", 12, *kept)
    run(*base, "--prompt", "w9 w9 w9 w9")
    code, out, err = run(*base, "--prompt", QUESTION)
    assert code == 0 and any("are reused from" in line for line in err)
    return json.loads(out[-1])["text"]


def test_a_cache_of_something_else_is_refused(ask, run, folder, other, document, tmp_path):
    kept = tmp_path / "kept.safetensors"
    ask("--prompt-cache", kept)
    before = kept.read_bytes()
    base = ("--prompt", QUESTION, "--prompt-cache", kept)
    changed = tmp_path / "changed.txt"
    changed.write_text(TEXT + " w1")
    for arguments, told in (
        (("--model", other, "--document", document), "another model"),
        (("--model", folder, "--document", changed), "another document"),
        (("--model", folder, "--document", document, "--kv-bits", 4), "without --kv-bits"),
    ):
        code, out, err = run(*base, *arguments)
        assert (code, out, len(err)) == (2, [], 1) and told in err[0]
    assert kept.read_bytes() == before
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert ask("--prompt-cache", kept, model=copied)["reused_tokens"] > 0
    kept.write_bytes(before[:1000])
    code, out, err = run(*base, "--model", folder, "--document", document)
    assert (code, out, len(err)) == (2, [], 1) and "kept.safetensors" in err[0]


def test_the_plan_reads_no_weights(run, folder, document, monkeypatch):
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("weights are read"))
    base = ("--model", folder, "--document", document, "--prompt", QUESTION, "--plan")
    code, out, err = run(*base, "--max-tokens", 10)
    assert (code, err) == (0, []) and "The largest context that fits is" in out[-1]
    _, out, _ = run(*base, "--max-tokens", 10, "--json")
    tokens = json.loads(out[-1])["tokens"]
    _, out, _ = run(*base, "--max-tokens", -1, "--json")
    assert json.loads(out[-1])["tokens"] == tokens - 10


def test_a_run_that_does_not_fit_is_refused_before_it_starts(run, folder, document, monkeypatch):
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(generate, "machine_memory", lambda: 700_000)
    code, out, err = run("--model", folder, "--document", document, "--prompt", QUESTION)
    assert (code, out, len(err)) == (2, [], 1)
    assert re.search(r"largest context that fits is [\d,]+ tokens; --kv-bits 4", err[0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "{folder}"], "has nothing to read"),
        (["--model", "{folder}", "--document", "{document}"], "--prompt is missing"),
        (["--model", "{folder}", "--prompt", " "], "expected a question"),
        (["--model", "{folder}", "--prompt", "w1", "--prompt-cache", "c"], "--document"),
        (["--model", "/no/where", "--prompt", "w1"], "no such folder"),
        (["--model", "{document}", "--prompt", "w1"], "is a file"),
        (["--model", "{tmp_path}", "--prompt", "w1"], "no config.json"),
        (
            ["--model", "{folder}", "--prompt", "w1", "--adapter-path", "/no"],
            "adapters.safetensors",
        ),
        (["--model", "{folder}", "--document", "/no.txt", "--prompt", "w1"], "/no.txt"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--temp", "-1"], "--temp -1.0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(1 << 64)], "within 64 bits"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--prefill-step-size", "0"], "--prefill-step-size 0"),
        (["--kv-bits", "5"], "--kv-bits"),
        (["--documnet", "a"], "unrecognized arguments"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run, folder, document, tmp_path, arguments, told):
    places = {"folder": folder, "document": document, "tmp_path": tmp_path}
    code, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ") and told in err[0]


def test_a_model_that_the_hub_does_not_give_is_told_in_one_line(run, monkeypatch):
    def refuse(*args, **options):
        raise OSError("401 Client Error.\nRepository Not Found for url")

    monkeypatch.setattr("mlx_hydra.hub.snapshot_download", refuse)
    code, _, err = run("--model", "owner/name", "--prompt", "w1")
    assert (code, len(err)) == (2, 1) and "the hub does not give it: 401 Client Error." in err[0]


def test_a_prompt_beyond_the_models_positions_is_noted(run, folder, document, tmp_path):
    short = shutil.copytree(folder, tmp_path / "short")
    break_config(short, max_position_embeddings=8)
    asked = ["--document", document, "--prompt", QUESTION, "--max-tokens", 2]
    code, _, err = run("--model", short, *asked)
    assert code == 0 and "are more than the 8 that this model is made for" in err[0]
    _, _, err = run("--model", folder, *asked)
    assert "made for" not in "".join(err)


def break_config(path, **changes):
    settings = json.loads((path / "config.json").read_text())
    settings.update(changes)
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if v is not None})
    )


def truncate(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def reshape(path):
    weights = mx.load(str(path / "model.safetensors"))
    weights["model.norm.weight"] = mx.ones((5,))
    mx.save_safetensors(str(path / "model.safetensors"), weights)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "model.safetensors"),
        (reshape, "shape"),
        (lambda path: (path / "model.safetensors").unlink(), "safetensors"),
        (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "config.json").write_text("{}"), "names no model_type"),
        (
            lambda path: break_config(path, model_type="hydrohead", model_file=None),
            "the nearest is 'hydrahead'",
        ),
        (lambda path: break_config(path, model_type="custom"), "its own file 'hydrahead.py'"),
        (lambda path: break_config(path, hidden_size=None), "hidden_size"),
        (lambda path: break_config(path, full_attention_heads=[[9], [], []]), "head 9"),
        (lambda path: [f.unlink() for f in path.glob("tokenizer*")], "no tokenizer"),
    ],
)
def test_a_broken_model_is_told_in_one_line(run, folder, tmp_path, damage, told):
    broken = shutil.copytree(folder, tmp_path / "broken")
    # The index would tell of some of this before anything is read.
    (broken / "model.safetensors.index.json").unlink()
    damage(broken)
    code, out, err = run("--model", broken, "--prompt", "w1")
    assert (code, out, len(err)) == (2, [], 1)
    assert told in err[0] and len(err[0]) < 400


def test_an_interrupted_run_leaves_nothing(run, folder, document, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    base = ("--model", folder, "--document", document, "--prompt", QUESTION)
    kept = tmp_path / "cache" / "kept.safetensors"
    kept.parent.mkdir()
    for place in ("mlx_hydra.generate.digest", "mlx_hydra.documents.prompt_cache.read_header"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            assert run(*base, "--prompt-cache", kept) == (130, [], ["interrupted"])
        assert list(kept.parent.iterdir()) == []


def test_memory_that_runs_out_is_told_in_one_line(run, folder, document, monkeypatch):
    def fail(message):
        def digest(*_):
            raise RuntimeError(message)

        monkeypatch.setattr(generate, "digest", digest)

    base = ("--model", folder, "--document", document, "--prompt", QUESTION)
    fail("[malloc] Unable to allocate 123 bytes.")
    assert run(*base) == (2, [], ["error: [malloc] Unable to allocate 123 bytes."])
    fail("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run(*base)


def test_the_script_runs_and_fails_in_one_line(folder, document):
    def script(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "generate.py", *arguments], capture_output=True, text=True
        )

    asked = script("--model", folder, "--document", document, "--prompt", QUESTION)
    assert asked.returncode == 0 and asked.stdout.strip()
    assert asked.stderr.count("\n") == 1 and asked.stderr.startswith("prompt: ")
    refused = script("--model", folder, "--document", "missing.txt", "--prompt", QUESTION)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: ")


@pytest.fixture
def bundle(folder, document, tmp_path, monkeypatch):
    """A demo whose first question the model answers right and whose second it does not."""
    answer = greedy_text(folder, TEXT)[0].split()[0]
    questions = tmp_path / "questions.json"
    questions.write_text(
        json.dumps(
            {
                "questions": [
                    {"question": QUESTION, "answer": answer, "position": 0.07},
                    {"question": f"{QUESTION} w5", "answer": "never", "position": 0.5},
                ]
            }
        )
    )
    for name, path in (("MODEL", folder), ("REPORT", document), ("QUESTIONS", questions)):
        monkeypatch.setattr(demo, name, path)
    return questions


def test_the_bundled_demo_answers_its_first_question(run, monkeypatch, tmp_path):
    # The report's first tenth, in which that fact stands: all of it takes half a minute.
    text = demo.REPORT.read_text(encoding="utf-8")
    start = tmp_path / "report.txt"
    start.write_text(text[: len(text) // 10], encoding="utf-8")
    monkeypatch.setattr(demo, "REPORT", start)
    code, out, _ = run()
    assert code == 0
    assert out[-1].endswith("the answer is right.")


def test_without_arguments_the_demo_runs(run, bundle):
    code, out, _ = run()
    assert code == 0
    assert out[0].startswith("Reading report.txt: ") and out[1] == f"Question: {QUESTION}"
    assert out[-1].endswith("(it stands 7% into the report): the answer is right.")


def test_the_demo_can_be_asked_something_else(run, bundle, document):
    code, out, _ = run("--prompt", f"{QUESTION} w5")
    assert code == 1
    assert out[-1].startswith("Expected: never") and out[-1].endswith("the answer is wrong.")
    _, out, _ = run("--prompt", "w9", "--max-tokens", 4)
    assert len(out) == 1
    _, elsewhere, _ = run("--prompt", "w9", "--max-tokens", 4, "--document", document)
    assert elsewhere == out


def test_a_missing_demo_is_told_in_one_line(run, bundle):
    bundle.unlink()
    code, out, err = run()
    assert (code, out, len(err)) == (2, [], 1) and "--model and --document" in err[0]


def test_adapters_are_applied(ask, folder, tmp_path):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    (adapters / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": parameters})
    )
    model, _, _ = load(str(folder))
    linear_to_lora_layers(model, 3, parameters)
    added = [(n, x) for n, x in tree_flatten(model.parameters()) if n.endswith(("_a", "_b"))]
    mx.random.seed(0)
    mx.save_safetensors(
        str(adapters / "adapters.safetensors"), {n: mx.random.normal(x.shape) for n, x in added}
    )
    assert ask("--adapter-path", adapters)["text"] != ask()["text"]
    assert fingerprint(folder, adapters) != fingerprint(folder)


def test_a_dense_model_is_read_too(run, folder, document, tmp_path):
    dense = shutil.copytree(tiny.GOLDEN / "qwen3_tied", tmp_path / "dense")
    tiny.write_tokenizer(dense)
    _, out, _ = run(
        *("--model", dense, "--document", document, "--prompt", QUESTION, "--json"),
        *("--max-tokens", 3),
    )
    found = json.loads(out[-1])
    assert found["backend"].startswith("mlx_lm on ")
    assert found["cache_bytes"]["linear_attention"] == 0 < found["cache_bytes"]["full_attention"]


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the layout is for a CPU")
def test_half_precision_is_float32_on_a_cpu(folder, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    weights = mx.load(str(folder / "model.safetensors"))
    half_weights = {n: w.astype(mx.bfloat16) for n, w in weights.items()}
    mx.save_safetensors(str(half / "model.safetensors"), half_weights)
    model, _, _ = load(str(half))
    held = dict(tree_flatten(model.parameters()))
    assert {w.dtype for w in held.values()} == {mx.float32}
    assert all(mx.array_equal(held[n], w.astype(mx.float32)) for n, w in half_weights.items())


@pytest.mark.parametrize(
    ("module", "command"),
    [(mlx_lm.server, mlx_lm_commands.server), (mlx_lm.chat, mlx_lm_commands.chat)],
)
def test_mlx_lms_commands_do_not_run_a_models_own_file(
    folder, tmp_path, monkeypatch, module, command
):
    suspect = shutil.copytree(folder, tmp_path / "suspect")
    (suspect / "hydrahead.py").write_text("raise SystemExit('the file was run')")
    loaded = []

    def main():
        loaded.append(module.load(str(suspect), adapter_path=None, trust_remote_code=False))
        loaded.append(module.load(str(suspect), return_config=True))

    monkeypatch.setattr(module, "main", main)
    monkeypatch.setattr(module, "load", module.load)
    command()
    (model, tokenizer), (_, _, config) = loaded
    assert isinstance(model, nn.Module) and tokenizer.eos_token == "<eos>"
    assert config["model_type"] == "hydrahead"


@pytest.mark.parametrize("command", [mlx_lm_commands.server, mlx_lm_commands.chat])
def test_mlx_lms_commands_tell_of_a_missing_model_in_one_line(monkeypatch, capsys, command):
    monkeypatch.setattr("sys.argv", ["command", "--model", "/no/where", "--port", "1"])
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --model /no/where: no such folder")
