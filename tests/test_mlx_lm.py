"""HydraHead under mlx-lm's own commands and generators."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm import generate, load, stream_generate
from mlx_lm.generate import BatchGenerator

from mlx_hydra import convert

TRUST = ["--trust-remote-code"] if tiny.ASKS_FOR_TRUST else []
SETTINGS = tiny.config(head_dim=32, hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What convert.py makes of a PyTorch checkpoint."""
    place = tmp_path_factory.mktemp("converted")
    saved = tiny.save(tiny.model(**SETTINGS), SETTINGS, place / "saved")
    pytorch, model = place / "pytorch", place / "model"
    convert.main(["--hf-path", str(saved), "--to-hf", "--mlx-path", str(pytorch)])
    convert.main(["--hf-path", str(pytorch), "--mlx-path", str(model)])
    return model


@pytest.fixture(scope="module")
def loaded(folder):
    return tiny.load(folder)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def prompts(*lengths, seed=0):
    return [tiny.tokens(n, seed=seed + n)[0].tolist() for n in lengths]


def expect_alone(model, prompt, tokens, logprobs):
    """Each token is what greedy decoding of this prompt alone takes, from the same logprobs.

    ``logprobs`` are whole vectors, or those of the tokens taken; None where mlx-lm tells none.
    """
    logits = model(mx.array(prompt + tokens[:-1])[None])[0, -len(tokens) :]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    taken = expected[np.arange(len(tokens)), tokens]
    assert (expected.max(-1) - taken < 1e-4).all()
    if logprobs is None:
        return
    found = np.array(logprobs)
    assert tiny.distance(found, taken if found.ndim == 1 else expected) < 1e-4


def collect(generator, found, until=None):
    """Run a batch generator, keeping each sequence's responses; ``until`` may stop it early."""
    while until is None or not until():
        prompt_responses, responses = generator.next()
        for r in responses:
            found.setdefault(r.uid, []).append(r)
        if not prompt_responses and not responses:
            return


def expect_all_alone(model, inputs, found):
    assert found.keys() == inputs.keys()
    for uid, responses in found.items():
        tokens = [r.token for r in responses]
        logprobs = [np.array(r.logprobs) for r in responses]
        expect_alone(model, inputs[uid], tokens, logprobs)


def test_it_loads_as_it_was_saved(model):
    inputs = tiny.tokens(30)
    assert mx.array_equal(model(inputs), tiny.model(**SETTINGS)(inputs))


@pytest.mark.parametrize("prefill_step_size", [1, 16, 2048])
def test_streamed_tokens_are_the_greedy_ones(loaded, prefill_step_size):
    model, tokenizer = loaded
    (prompt,) = prompts(50)
    responses = list(
        stream_generate(
            model, tokenizer, prompt, max_tokens=12, prefill_step_size=prefill_step_size
        )
    )
    tokens = [r.token for r in responses]
    expect_alone(model, prompt, tokens, [np.array(r.logprobs) for r in responses])
    assert "".join(r.text for r in responses) == tokenizer.decode(tokens)


def test_generated_text_goes_on_from_a_prompt_cache(loaded):
    model, tokenizer = loaded
    (prompt,) = prompts(40)
    whole = generate(model, tokenizer, prompt, max_tokens=8)
    cache = model.make_cache()
    model(mx.array(prompt[:25])[None], cache=cache)
    assert generate(model, tokenizer, prompt[25:], max_tokens=8, prompt_cache=cache) == whole


@pytest.mark.parametrize(
    "sizes",
    [
        {"prefill_step_size": 4},
        {"prefill_step_size": 16, "prefill_batch_size": 2, "completion_batch_size": 3},
        {"prefill_step_size": 7, "prefill_batch_size": 3},
        {},
    ],
    ids=str,
)
def test_a_batch_of_mixed_lengths_is_what_its_members_are_alone(loaded, sizes):
    model, tokenizer = loaded
    inputs = prompts(1, 2, 5, 4, 70, 33, 17)
    counts = [9, 1, 14, 3, 6, 12, 2]
    texts, token_ids, logprobs = tiny.batch_generate(
        model, tokenizer, inputs, max_tokens=counts, **sizes
    )
    assert [len(tokens) for tokens in token_ids] == counts
    for prompt, tokens, of_them in zip(inputs, token_ids, logprobs):
        expect_alone(model, prompt, tokens, of_them)
    assert texts == [tokenizer.decode(tokens) for tokens in token_ids]


def test_a_batch_is_what_its_members_are_alone_without_convolution_or_linear_heads():
    for changes in (
        {"linear_attention": {"conv_kernel_size": None}},
        {"full_attention_heads": [[0, 1, 2, 3]] * 3},
        {"full_attention": {"rope": True}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ):
        model = tiny.model(**changes)
        generator = BatchGenerator(model, max_tokens=6, prefill_step_size=8)
        inputs = prompts(3, 1, 30, 11, seed=1)
        uids = generator.insert(inputs)
        found = {}
        collect(generator, found)
        expect_all_alone(model, dict(zip(uids, inputs)), found)


def test_sequences_come_and_go_while_others_decode(model):
    generator = BatchGenerator(model, max_tokens=20, prefill_step_size=8, prefill_batch_size=2)
    inputs, found = {}, {}

    def insert(*lengths, **options):
        new = prompts(*lengths, seed=len(inputs))
        uids = generator.insert(new, **options)
        inputs.update(zip(uids, new))
        return uids

    first = insert(3, 40, 1)
    collect(generator, found, lambda: len(found.get(first[0], ())) >= 4)
    second = insert(25, 2, max_tokens=[5, 30])
    collect(generator, found, lambda: len(found.get(second[1], ())) >= 2)
    removed = generator.remove([first[0], second[0]], return_prompt_caches=True)
    third = insert(90, 6)
    collect(generator, found)

    # One was removed while it decoded, the other while its prompt was read.
    assert 4 <= len(found[first[0]]) < 20
    assert second[0] not in found
    cache, tokens = removed[second[0]]
    assert tokens == inputs.pop(second[0])[: len(tokens)]
    expect_cache_of(model, cache, tokens)
    for uid in (first[1], first[2], *third):
        assert len(found[uid]) == 20
    assert len(found[second[1]]) == 30
    expect_all_alone(model, inputs, found)
    cache, tokens = removed[first[0]]
    expect_cache_of(model, cache, tokens)


def expect_cache_of(model, cache, tokens):
    """A cache goes on as one that has just read these tokens."""
    fresh = model.make_cache()
    model(mx.array(tokens)[None], cache=fresh)
    following = tiny.tokens(6, seed=99)
    assert tiny.distance(model(following, cache=cache), model(following, cache=fresh)) < 1e-4


def test_caches_handed_in_and_out_go_on_where_they_were(model):
    started = prompts(30, 7, 64)
    caches = [model.make_cache() for _ in started]
    for prompt, cache in zip(started, caches):
        model(mx.array(prompt)[None], cache=cache)
    # One sequence has nothing cached, beside three that have.
    more = prompts(5, 20, 1, 9, seed=50)
    generator = BatchGenerator(model, max_tokens=7, prefill_step_size=6)
    uids = generator.insert(
        more, caches=[*caches, None], all_tokens=[*(list(p) for p in started), []]
    )
    found = {}
    collect(generator, found)
    inputs = {u: s + m for u, s, m in zip(uids, [*started, []], more)}
    expect_all_alone(model, inputs, found)
    for uid, responses in found.items():
        last = responses[-1]
        assert last.finish_reason == "length"
        assert last.all_tokens == inputs[uid] + [r.token for r in responses]
        expect_cache_of(model, last.prompt_cache, last.all_tokens)


def test_a_prompt_in_segments_can_be_kept_at_each_end(model):
    whole, other = prompts(45, 12)
    generator = BatchGenerator(model, max_tokens=5, prefill_step_size=10)
    (uid, _) = generator.insert_segments([[whole[:20], whole[20:]], [other]])
    kept, found = {}, {}
    while uid not in found:
        prompt_responses, responses = generator.next()
        for r in responses:
            found.setdefault(r.uid, []).append(r)
        ends = [r.uid for r in prompt_responses if r.end_of_segment and not r.end_of_prompt]
        for key, (cache, tokens) in generator.extract_cache(ends).items():
            kept.setdefault(key, []).append((cache, list(tokens)))
    assert [tokens for _, tokens in kept[uid]] == [whole[:20], whole[:-1]]
    for cache, tokens in kept[uid]:
        expect_cache_of(model, cache, tokens)


# What follows runs mlx-lm's commands in processes that have not imported mlx_hydra: the model's
# own file brings it in. One process runs many commands, for importing takes most of their time.
RUNNER = """
import contextlib, importlib, io, json, sys
results = []
for command, argv, typed in json.loads(sys.argv[1]):
    assert "mlx_hydra" not in sys.modules or results
    sys.argv, sys.stdin, out = [command, *argv], io.StringIO(typed), io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module("mlx_lm." + command).main()
    results.append(out.getvalue())
print(json.dumps(results))
"""


def run_commands(*commands) -> list[str]:
    """What mlx-lm's commands print; each is a name, its arguments, and maybe what is typed in."""
    calls = [(name, [*argv, *TRUST], "".join(typed)) for name, argv, *typed in commands]
    child = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(calls)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return [re.sub(r"\x1b\[[\d;]*m", "", text) for text in json.loads(child.stdout)]


def arguments(model, prompt=None, **options):
    given = {"model": model, "prompt": prompt, **options}
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    return [str(part) for flag in flags if flag[1] is not None for part in flag]


def chat_tokens(tokenizer, text):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )


def words(length, seed=0):
    return " ".join(f"w{i % 55}" for i in tiny.tokens(length, seed=seed)[0].tolist())


def test_the_commands_generate_cache_and_chat(loaded, folder, tmp_path):
    model, tokenizer = loaded
    document, question = words(60), words(5, seed=1)
    text = f"{document} {question}"
    plain, quantised = tmp_path / "plain.safetensors", tmp_path / "quantised.safetensors"
    greedy = {"max_tokens": 12, "temp": 0, "verbose": "False"}
    kv_bits = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    found = run_commands(
        ("generate", arguments(folder, text, **greedy)),
        ("cache_prompt", arguments(folder, document, prompt_cache_file=plain)),
        ("generate", arguments(folder, question, prompt_cache_file=plain, **greedy)),
        ("generate", arguments(folder, text, **greedy, **kv_bits)),
        ("cache_prompt", arguments(folder, document, prompt_cache_file=quantised, **kv_bits)),
        (
            "generate",
            arguments(folder, question, prompt_cache_file=quantised, **greedy, **kv_bits),
        ),
        ("chat", arguments(folder, max_tokens=12, temp=0), f"{text}\nq\n"),
    )
    prompt = chat_tokens(tokenizer, text)
    expected = generate(model, tokenizer, prompt, max_tokens=12)
    assert found[0].strip() == expected
    assert found[2].strip() == expected
    with_bits = generate(
        model,
        tokenizer,
        prompt,
        max_tokens=12,
        kv_bits=8,
        kv_group_size=32,
        quantized_kv_start=0,
    )
    assert found[3].strip() == with_bits
    assert found[5].strip()
    assert " ".join(expected.split()) in " ".join(found[6].split())


def test_lora_trains_and_its_adapter_fuses_to_the_same_model(monkeypatch, loaded, folder, tmp_path):
    model, tokenizer = loaded
    data, adapter, fused = tmp_path / "data", tmp_path / "adapter", tmp_path / "fused"
    data.mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": words(30, seed=i)}) for i in range(4)]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    options = {
        "data": data,
        "adapter_path": adapter,
        "iters": 6,
        "batch_size": 2,
        "num_layers": 3,
        "learning_rate": 1e-3,
        "steps_per_report": 1,
        "val_batches": 1,
    }
    # On the CPU each compiled kernel is a run of the C++ compiler, and a step has hundreds.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    (printed, _) = run_commands(
        (
            "lora",
            ["--train", "--grad-checkpoint", *arguments(folder, **options)],
        ),
        ("fuse", arguments(folder, adapter_path=adapter, save_path=fused)),
    )
    # A row of a table; in mlx-lm 0.31 a sentence.
    loss = r"(?:^\s*\d+\s+|Train loss )([\d.]+|nan|inf)[ ,]"
    losses = [float(x) for x in re.findall(loss, printed, re.MULTILINE)]
    assert len(losses) == 6, printed
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    weights = mx.load(str(adapter / "adapters.safetensors"))
    for branch in ("full", "linear"):
        assert any(f".{branch}.q_proj.lora_b" in name for name in weights)
    adapted, _ = tiny.load(folder, adapter_path=str(adapter))
    refused, _ = tiny.load(fused)
    inputs = tiny.tokens(30)
    assert tiny.distance(adapted(inputs), model(inputs)) > 1e-2
    assert tiny.distance(adapted(inputs), refused(inputs)) < 1e-3
    prompt = chat_tokens(tokenizer, words(9))
    texts = [generate(m, tokenizer, prompt, max_tokens=8) for m in (adapted, refused)]
    assert texts[0] == texts[1]


def test_mlx_lms_converter_quantises_it_and_keeps_float32_what_must_stay(loaded, folder, tmp_path):
    out = tmp_path / "q4"
    options = {"q_bits": 4, "q_group_size": 32, "dtype": "float16"}
    convert = ["--quantize", *arguments(None, hf_path=folder, mlx_path=out, **options)]
    text = words(20)
    greedy = {"max_tokens": 8, "temp": 0, "verbose": "False"}
    (_, found) = run_commands(("convert", convert), ("generate", arguments(out, text, **greedy)))
    weights = mx.load(str(out / "model.safetensors"))
    for name, x in weights.items():
        if name.endswith(("A_log", "dt_bias", "gamma")):
            assert x.dtype == mx.float32, name
        elif x.dtype != mx.uint32:
            assert x.dtype == mx.float16, name
        quantised = f"{name.removesuffix('.weight')}.scales" in weights
        assert not (quantised and name.endswith(("a_proj.weight", "b_proj.weight"))), name
    assert "model.layers.0.self_attn.linear.g_proj.scales" in weights
    model, tokenizer = tiny.load(out)
    assert found.strip() == generate(model, tokenizer, chat_tokens(tokenizer, text), max_tokens=8)


@contextlib.contextmanager
def server(folder, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["server", *arguments(folder, host="127.0.0.1", port=port), *TRUST]
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", *argv, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert child.poll() is None, child.stderr.read()
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        child.terminate()
        child.communicate()


def ask(url, messages):
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_the_server_answers_alone_from_its_cache_and_in_parallel(loaded, folder):
    model, tokenizer = loaded

    def expected(messages):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return generate(model, tokenizer, prompt, max_tokens=8).strip()

    chat = [
        {"role": "system", "content": words(12, seed=3)},
        {"role": "user", "content": words(25, seed=4)},
    ]
    with server(folder, "--prefill-step-size", "8") as url:
        text, usage = ask(url, chat)
        assert text.strip() == expected(chat)
        again, usage_again = ask(url, chat)
        assert again == text
        # All but the last token, which has to be read to go on from.
        assert usage_again["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1

        longer = [*chat, {"role": "assistant", "content": text}]
        longer.append({"role": "user", "content": words(6, seed=5)})
        found, usage = ask(url, longer)
        assert found.strip() == expected(longer)
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0

        chats = [[{"role": "user", "content": words(n, seed=n)}] for n in (1, 40, 9, 22)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda messages: ask(url, messages)[0].strip(), chats))
        assert found == [expected(messages) for messages in chats]


def test_the_models_own_file_runs_where_it_is_trusted_and_is_not_needed_beside_us(folder, tmp_path):
    if tiny.ASKS_FOR_TRUST:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(str(folder))
    # Where mlx_hydra is imported, a model needs no file of its own.
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "hydrahead.py").unlink()
    settings = json.loads((bare / "config.json").read_text())
    del settings["model_file"]
    (bare / "config.json").write_text(json.dumps(settings))
    model, _ = load(str(bare))
    inputs = tiny.tokens(10)
    assert mx.array_equal(model(inputs), tiny.load(folder)[0](inputs))
