"""Read long documents once, in steps, and answer a question about them."""

import itertools
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_TEMP,
    DEFAULT_TOP_P,
    GenerationResponse,
    generate_step,
    generation_stream,
    stream_generate,
    wired_limit,
)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import kernels
from .cli import ArgumentParser, command
from .config import MODEL_TYPE
from .documents import demo
from .documents.progress import reading_progress
from .documents.prompt import Prompt, build_prompt
from .documents.prompt_cache import Origin, cache_path, load_cache, save_cache
from .documents.read import read_documents
from .loading import (
    find_model,
    fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    weight_sizes,
)
from .models.cache import cache_bytes
from .ops import resolve_backend
from .plan import (
    KV_BITS,
    Planner,
    default_step,
    head_dim,
    in_bytes,
    kv_group_size,
    machine_memory,
    show_plan,
)


@dataclass(frozen=True)
class Task:
    """What is to be read and asked; ``known`` where the right answer is."""

    model: str
    documents: Sequence[str]
    prompt: str
    known: Optional[demo.Question] = None


@dataclass(frozen=True)
class Answer:
    """A text, and the figures of the run that gave it.

    finish_reason: "stop" where the model ended it, "length" where --max-tokens did.
    prompt_tokens: all of the prompt; ``reused_tokens`` of them came from a prompt cache.
    prompt_tps, generation_tps: tokens a second, the prompt's without those that were reused.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory_bytes: int
    cache_bytes: dict[str, int]
    backend: str

    def figures(self) -> str:
        reused = f" ({self.reused_tokens:,} reused)" if self.reused_tokens else ""
        full, linear = map(in_bytes, self.cache_bytes.values())
        ended = " (all of --max-tokens)" if self.finish_reason == "length" else ""
        return (
            f"prompt: {self.prompt_tokens:,} tokens{reused}, {self.prompt_tps:,.1f} tok/s | "
            f"answer: {self.generation_tokens:,} tokens{ended}, "
            f"{self.generation_tps:,.1f} tok/s | "
            f"peak memory: {in_bytes(self.peak_memory_bytes)} | "
            f"cache: {full} full attention, {linear} linear attention | {self.backend}"
        )


def parse_args(argv: Optional[Sequence[str]]) -> Namespace:
    parser = ArgumentParser(
        description="Read long documents and answer a question about them. Without arguments, "
        "the bundled demo model reads the bundled report."
    )
    add = parser.add_argument
    add("--model", help="model folder or hub repository (default: the bundled demo model)")
    add("--adapter-path", help="folder of trained adapters")
    add(
        "--document",
        action="append",
        default=[],
        metavar="FILE",
        help="text to read, UTF-8; - for standard input; may be given several times",
    )
    add("--prompt", help="the question about the documents")
    add("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="of the answer; -1: no limit")
    add("--temp", type=float, default=DEFAULT_TEMP, help="sampling temperature; 0: greedy")
    add("--top-p", type=float, default=DEFAULT_TOP_P, help="nucleus sampling")
    add("--seed", type=int, help="of the sampling")
    add(
        "--prefill-step-size",
        type=int,
        default=default_step(),
        help="tokens read at a time; fewer need less memory (default: %(default)s)",
    )
    add(
        "--prompt-cache",
        metavar="FILE",
        help="keep the digested documents in this .safetensors file, or reuse them from it; a file "
        "serves just the documents and the model that it was made from",
    )
    add("--kv-bits", type=int, choices=KV_BITS, help="bits of the cached keys and values")
    add("--ignore-chat-template", action="store_true", help="give the model the bare text")
    add("--plan", action="store_true", help="print the memory that the run needs, and stop")
    add("--json", action="store_true", help="print answer and figures as a last line of JSON")
    add("--no-stream", action="store_true", help="print the answer when it is whole")
    args = parser.parse_args(argv)
    for name, holds, expected in (
        ("max_tokens", args.max_tokens > 0 or args.max_tokens == -1, "1 or more, or -1"),
        ("temp", args.temp >= 0, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "over 0 and up to 1"),
        ("prefill_step_size", args.prefill_step_size > 0, "1 or more"),
        ("seed", args.seed is None or 0 <= args.seed < 1 << 64, "0 or more, within 64 bits"),
        ("prompt", args.prompt is None or args.prompt.strip(), "a question"),
    ):
        if not holds:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {getattr(args, name)!r}: expected {expected}.")
    return args


def choose_task(args: Namespace) -> Task:
    """What the options ask for, with the bundled demo where they leave it open.

    Raises:
        ValueError: a document or a question is missing.
    """
    if args.model is None:
        questions = demo.load_questions()
        if not args.document:
            asked = args.prompt or questions[0].question
            known = next((q for q in questions if q.question == asked), None)
            return Task(str(demo.MODEL), [str(demo.REPORT)], asked, known)
    if args.prompt is None:
        if args.document:
            raise ValueError("--prompt is missing: what is to be asked about the document?")
        raise ValueError(
            f"--model {args.model} has nothing to read: give --document FILE and --prompt TEXT, "
            "or --prompt alone."
        )
    if args.prompt_cache is not None and not args.document:
        raise ValueError("--prompt-cache keeps a digested document: give it with --document.")
    return Task(args.model or str(demo.MODEL), args.document, args.prompt)


def new_cache(model: nn.Module, config: dict, kv_bits: Optional[int]) -> list[Any]:
    """An empty cache; keys and values are quantised from the first token on, if at all."""
    cache = make_prompt_cache(model)
    if kv_bits is None:
        return cache
    group_size = kv_group_size(head_dim(config))
    refused = ValueError("--kv-bits: the cache of this model cannot be quantised.")
    if not any(hasattr(part, "to_quantized") for part in cache):
        raise refused
    try:
        return [
            part.to_quantized(group_size=group_size, bits=kv_bits)
            if hasattr(part, "to_quantized")
            else part
            for part in cache
        ]
    except NotImplementedError as error:
        raise refused from error


def digest(
    model: nn.Module,
    cache: list[Any],
    tokens: Sequence[int],
    step: int,
    show: Callable[[int], None],
) -> None:
    """Bring tokens into a cache, ``step`` at a time; ``show`` is told how many are in."""
    with wired_limit(model, [generation_stream]):
        for _ in generate_step(
            mx.array(tokens),
            model,
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=step,
            prompt_progress_callback=lambda done, _: show(done),
        ):
            pass


def print_text(
    responses: Iterable[GenerationResponse], stream: bool
) -> tuple[str, GenerationResponse]:
    """Print an answer, as it comes or when it is whole; give the text and the last response."""
    text = ""
    for response in responses:
        text += response.text
        if stream:
            print(response.text, end="", flush=True)
    print("" if stream else text)
    return text, response


def read_and_answer(
    args: Namespace,
    path: Path,
    backend: str,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    file: Optional[Path],
) -> Answer:
    """Read the documents, or take them from the prompt cache ``file``; then answer and print."""
    cache = origin = None
    if file is not None:
        origin = Origin(prompt.document, fingerprint(path, args.adapter_path), args.kv_bits)
        if file.exists():
            cache = load_cache(file, origin)
            note(f"{len(prompt.document):,} tokens of the document are reused from {file}.")
    model, config = load_model(path, args.adapter_path)
    reused = 0 if cache is None else len(prompt.document)

    with reading_progress(len(prompt)) as show:
        seconds = 0.0
        if cache is None:
            cache = new_cache(model, config, args.kv_bits)
            start = time.perf_counter()
            if prompt.document:
                digest(model, cache, prompt.document, args.prefill_step_size, show)
            seconds = time.perf_counter() - start
            if file is not None:
                save_cache(file, cache, origin)
        responses = stream_generate(
            model,
            tokenizer,
            prompt.question,
            max_tokens=args.max_tokens,
            sampler=make_sampler(args.temp, args.top_p),
            prompt_cache=cache,
            prefill_step_size=args.prefill_step_size,
            prompt_progress_callback=lambda done, _: show(len(prompt.document) + done),
        )
        first = next(responses)
    seconds += len(prompt.question) / first.prompt_tps
    text, last = print_text(itertools.chain([first], responses), not args.no_stream)
    return Answer(
        text=text,
        finish_reason=last.finish_reason,
        prompt_tokens=len(prompt),
        reused_tokens=reused,
        prompt_tps=(len(prompt) - reused) / seconds,
        generation_tokens=last.generation_tokens,
        generation_tps=last.generation_tps,
        peak_memory_bytes=mx.get_peak_memory(),
        cache_bytes=cache_bytes(cache),
        backend=backend,
    )


def backend_name(config: dict) -> str:
    gpu = kernels.gpu_backend()
    supported = ("ops",) if gpu is None else (gpu, "ops")
    name = resolve_backend("auto", supported) if config["model_type"] == MODEL_TYPE else "mlx_lm"
    return f"{name} on {'cpu' if mx.default_device() == mx.cpu else 'gpu'}"


def note(text: str) -> None:
    print(text, file=sys.stderr)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    task = choose_task(args)
    file = None if args.prompt_cache is None else cache_path(args.prompt_cache)
    documents = read_documents(task.documents)
    path = find_model(task.model)
    config = read_config(path)
    backend = backend_name(config)
    tokenizer = load_tokenizer(path, config)
    prompt = build_prompt(tokenizer, documents, task.prompt, not args.ignore_chat_template)

    sizes = weight_sizes(path, args.adapter_path)
    planner = Planner.for_model(config, *sizes, args.prefill_step_size, args.kv_bits)
    tokens = len(prompt) + max(args.max_tokens, 0)
    if args.plan:
        show_plan(planner, [tokens], args.json)
        return
    if planner is not None:
        planner.check(tokens, machine_memory())
    positions = config.get("max_position_embeddings") or tokens
    if tokens > positions:
        note(f"{tokens:,} tokens are more than the {positions:,} that this model is made for.")

    mx.reset_peak_memory()
    if args.seed is not None:
        mx.random.seed(args.seed)
    if task.known is not None:
        print(f"Reading {demo.REPORT.name}: {len(prompt):,} tokens with the question.")
        print(f"Question: {task.prompt}")
    answer = read_and_answer(args, path, backend, tokenizer, prompt, file)
    if task.known is not None:
        verdict = "right" if task.known.is_answered_by(answer.text) else "wrong"
        print(
            f"Expected: {task.known.answer} (it stands {task.known.position:.0%} into the "
            f"report): the answer is {verdict}."
        )
    note(answer.figures())
    if file is not None and not answer.reused_tokens:
        note(f"The digested document is kept in {file}.")
    if args.json:
        print(json.dumps(asdict(answer)))
    if task.known is not None and verdict == "wrong":
        sys.exit(1)
