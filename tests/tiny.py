"""Tiny HydraHead models with random weights, and the helpers that tests of them share."""

import inspect
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchResponse
from mlx_lm.models import qwen3
from mlx_lm.utils import save_config, save_model

from mlx_hydra.models.hydrahead import Model, ModelArgs

GOLDEN = Path(__file__).parent / "golden"
SHIM = "from mlx_hydra.models.hydrahead import Model, ModelArgs\n"

# A layer with both kinds of heads, one with linear heads alone, one with full heads alone. The
# first full heads share a KV head unevenly, and the model's first layer caches no keys.
RAGGED = [[], [0, 1, 3], [0, 1, 2, 3]]

VOCABULARY = 61

# mlx-lm 0.32 runs the file that a model brings along only where told to; 0.31, the last for
# Python 3.10, runs it unasked.
ASKS_FOR_TRUST = "trust_remote_code" in inspect.signature(mlx_lm.load).parameters
TRUSTED = {"trust_remote_code": True} if ASKS_FOR_TRUST else {}

# transformers 5 writes rope_theta there; of mlx-lm's Qwen3, 0.32 alone looks for it.
READS_ROPE_PARAMETERS = "rope_parameters" in qwen3.ModelArgs.__dataclass_fields__

# A GPU runs ahead of what it is asked to wait for, and holds more at its peak.
exact_peak = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="the peak of memory is exact on the CPU alone"
)


def config(**changes) -> dict:
    """A config.json with the paper's switches; ``changes`` replace its fields."""
    return {
        "model_type": "hydrahead",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "full_attention_heads": RAGGED,
        "full_attention": {"rope": False, "log_scale_base": 16, "gate": True},
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": 4,
            "rope": True,
            "gate": True,
        },
        "fusion": {"norm": True, "eps": 1e-6},
        **changes,
    }


def model(seed: int = 0, **changes) -> Model:
    """A model whose every parameter matters: none is left at zero, one, or a common value."""
    built = Model(ModelArgs.from_dict(config(**changes)))
    rng = np.random.default_rng(seed)
    weights = [
        (name, mx.array(_random(name, x.shape, rng).astype(np.float32)))
        for name, x in sorted(tree_flatten(built.parameters()))
    ]
    built.load_weights(weights)
    built.eval()
    mx.eval(built.parameters())
    return built


def _random(name, shape, rng):
    kind = name.removesuffix(".weight").rpartition(".")[2]
    normal = rng.standard_normal(shape)
    if "norm" in kind:
        return 1 + 0.2 * normal
    if kind == "gamma":
        return rng.uniform(0.5, 2, shape)
    if kind == "A_log":
        return rng.uniform(-2, 1, shape)
    if kind == "dt_bias":
        return rng.uniform(-2, 1, shape)
    if kind == "bias":
        return 0.5 * normal + 0.5
    if kind.endswith("conv1d"):
        return 0.4 * normal
    if kind == "embed_tokens":
        return normal
    return 1.5 * normal / np.sqrt(shape[-1])


def tokens(length: int, batch: int = 1, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)))


def in_steps(model, inputs, step: int, cache=None) -> mx.array:
    """Logits of a sequence that is read ``step`` tokens at a time."""
    cache = model.make_cache() if cache is None else cache
    logits = []
    for start in range(0, inputs.shape[1], step):
        logits.append(model(inputs[:, start : start + step], cache=cache))
        mx.eval(logits[-1], [c.state for c in cache])
    return mx.concatenate(logits, axis=1)


def greedy(model, prompt, count: int, cache=None) -> tuple[list[int], list[list[float]]]:
    """What argmax decoding gives: the tokens, and the log-probabilities each was taken from."""
    cache = model.make_cache() if cache is None else cache
    logits = model(mx.array(prompt)[None], cache=cache)[0, -1]
    chosen, logprobs = [], []
    for _ in range(count):
        logprobs.append((logits - mx.logsumexp(logits)).tolist())
        chosen.append(int(np.argmax(logprobs[-1])))
        logits = model(mx.array([[chosen[-1]]]), cache=cache)[0, -1]
    return chosen, logprobs


def distance(a, b) -> float:
    """The largest difference of two arrays; infinite where one has NaN or another shape."""
    a, b = (np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x for x in (a, b))
    if a.shape != b.shape:
        return float("inf")
    worst = float(np.max(np.abs(a - b), initial=0))
    return float("inf") if np.isnan(worst) else worst


def save(model: Model, settings: dict, folder: Path) -> Path:
    """Write a model as a conversion would, with the file that lets plain mlx-lm load it."""
    save_model(folder, model)
    save_config(
        {**settings, "model_file": "hydrahead.py", "eos_token_id": 1}, folder / "config.json"
    )
    (folder / "hydrahead.py").write_text(SHIM)
    write_tokenizer(folder)
    return folder


def load(folder: Path, **options):
    """A saved model and its tokenizer from mlx-lm, which runs the file beside the weights."""
    return mlx_lm.load(str(folder), **options, **TRUSTED)


def batch_generate(model, tokenizer, prompts, **options) -> tuple[list, list, list]:
    """mlx-lm's answers to prompts read as one batch: texts, tokens, and the tokens' logprobs.

    mlx-lm 0.31 returns texts alone. A word is a token here, and the logprobs are None.
    """
    if "token_ids" in BatchResponse.__dataclass_fields__:
        options |= {"return_token_ids": True, "return_logprobs": True}
        response = mlx_lm.batch_generate(model, tokenizer, prompts, **options)
        return response.texts, response.token_ids, response.logprobs
    texts = mlx_lm.batch_generate(model, tokenizer, prompts, **options).texts
    return texts, [tokenizer.encode(text) for text in texts], [None] * len(texts)


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """A word is ``wNN``; the template has a token for each role, as chat models do."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<eos>", "<system>", "<user>", "<assistant>", "<query>"]
    words = special + [f"w{i}" for i in range(VOCABULARY - len(special))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def golden_model(name: str) -> tuple[Model, dict]:
    """A golden checkpoint in MLX's layout, and its golden tokens and logits.

    The mapping is written out here, apart from the converter's, so that the two check each other.
    """
    settings = json.loads((GOLDEN / name / "config.json").read_text()) | {
        "head_order": "full_first"
    }
    args = ModelArgs.from_dict(settings)
    weights = mx.load(str(GOLDEN / name / "model.safetensors"))
    for key, w in weights.items():
        if "conv1d" in key:
            weights[key] = w.swapaxes(1, 2)
        elif "self_attn.o_proj" in key or key.endswith("gamma"):
            full = sorted(args.full_attention_heads[int(key.split(".")[2])])
            order = full + [h for h in range(args.num_attention_heads) if h not in full]
            heads = w.reshape(*w.shape[:-1], args.num_attention_heads, -1)
            weights[key] = heads[..., mx.array(order), :].reshape(w.shape)
    model = Model(args)
    model.load_weights(list(weights.items()))
    return model.eval(), mx.load(str(GOLDEN / f"{name}.safetensors"))
