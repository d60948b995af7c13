"""Models and their tokenizers, from folders or the Hugging Face hub, without running their code."""

import difflib
import hashlib
import inspect
import json
import math
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PretrainedConfig

from .checkpoints.reader import ELEMENT_BYTES, CheckpointReader, read_header
from .config import MODEL_TYPE
from .hub import find_folder

# What mlx-lm fetches of a repository.
FETCHED = (
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)

# What a tokenizer's tokens depend on, whichever tokenizer it is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
)

# What tokenizer_config.json has beside that.
NO_TOKENS = ("chat_template", "model_max_length", "padding_side", "truncation_side")

# mlx-lm 0.31, the last for Python 3.10, runs a model's own file unasked; read_config does ask.
ASKS_FOR_TRUST = "trust_remote_code" in inspect.signature(mlx_lm.utils.load_model).parameters


def load(
    path_or_repo: str,
    adapter_path: Optional[str] = None,
    tokenizer_config: Optional[dict] = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, TokenizerWrapper, dict]:
    """Load any model that mlx-lm knows, HydraHead among them, laid out for this device.

    Args:
        path_or_repo: a model folder, or a repository on the hub.
        adapter_path: a folder of trained adapters.
        tokenizer_config: options for transformers' ``from_pretrained``.
        trust_remote_code: whether a file in the folder may be run; HydraHead models need none.

    Returns:
        The model, its tokenizer and its configuration.

    Raises:
        ValueError, OSError: no such model, a broken one, or one of a type that is not known.
    """
    path = find_model(path_or_repo)
    model, config = load_model(path, adapter_path, trust_remote_code)
    return model, load_tokenizer(path, config, tokenizer_config), config


def find_model(path_or_repo: str) -> Path:
    """The folder of a model, downloaded where it is a repository on the hub."""
    return find_folder("--model", path_or_repo, FETCHED)


def read_config(path: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """A model's configuration, as mlx-lm reads it.

    Raises:
        ValueError: there is none, or its model type is not known.
    """
    try:
        config = mlx_lm.utils.load_config(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a model folder: it has no config.json.") from error
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not JSON: {error}.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path / 'config.json'} names no model_type.")
    if config["model_type"] == MODEL_TYPE:
        # A saved model carries a file for mlx-lm to run; the installed package does the same.
        config.pop("model_file", None)
    if not trust_remote_code:
        if "model_file" in config:
            raise ValueError(
                f"{path} needs its own file {config['model_file']!r} to be run, which is not done."
            )
        _check_model_type(config["model_type"], path)
    return config


def _check_model_type(model_type: str, path: Path) -> None:
    known = {MODEL_TYPE, *mlx_lm.utils.MODEL_REMAPPING}
    known.update(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    if model_type not in known:
        nearest = difflib.get_close_matches(str(model_type), known, 1, 0)[0]
        raise ValueError(
            f"{path / 'config.json'}: model_type {model_type!r} is not known to mlx-lm or "
            f"mlx_hydra; the nearest is {nearest!r}."
        )


def load_tokenizer(
    path: Path, config: dict, tokenizer_config: Optional[dict] = None
) -> TokenizerWrapper:
    """A model's tokenizer; ``tokenizer_config`` goes to transformers' ``from_pretrained``."""
    options = dict(tokenizer_config or {})
    if config["model_type"] == MODEL_TYPE:
        # Else transformers reads the config itself, and warns that it does not know the type.
        options["config"] = PretrainedConfig()
    try:
        return mlx_lm.utils.load_tokenizer(path, options, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} has no tokenizer that can be loaded: {reason}") from error


def load_model(
    path: Path, adapter_path: Optional[str] = None, trust_remote_code: bool = False
) -> tuple[nn.Module, dict]:
    """A model with its weights in memory, and its configuration."""
    config = read_config(path, trust_remote_code)
    weight_files(path, adapter_path)
    changes = {"model_file": config.get("model_file")}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope and config.get("rope_theta") is None:
        # transformers 5 writes them there, where mlx-lm 0.31 does not look.
        changes["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            changes["rope_scaling"] = rope
    try:
        model, config = mlx_lm.utils.load_model(
            path,
            lazy=True,
            model_config=changes,
            **({"trust_remote_code": trust_remote_code} if ASKS_FOR_TRUST else {}),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} does not fit its model type: {error}.") from error
    if adapter_path is not None:
        model = mlx_lm.utils.load_adapters(model, adapter_path)
        model.eval()
    if mx.default_device() == mx.cpu:
        _lay_out_for_cpu(model)
    mx.eval(model.parameters())
    return model, config


def _lay_out_for_cpu(model: nn.Module) -> None:
    # MLX's CPU kernels are built for float32: a 4-bit product with bfloat16 activations is ten
    # times slower, and one whose weight is stored transposed 1.7 times faster.
    model.set_dtype(mx.float32)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = mx.contiguous(module.weight.T).T


def weight_files(path: Path, adapter_path: Optional[str] = None) -> list[Path]:
    """The safetensors files of a model and of its adapters, all there and none cut off."""
    files = CheckpointReader(path).shards
    if adapter_path is not None:
        file = Path(adapter_path) / "adapters.safetensors"
        if not file.is_file():
            raise ValueError(f"--adapter-path {adapter_path} holds no adapters.safetensors.")
        read_header(file)
        files = [*files, file]
    return files


def weight_sizes(path: Path, adapter_path: Optional[str] = None) -> tuple[int, int]:
    """Bytes of all weights as :func:`load` holds them, and of one number of the activations."""
    cpu = mx.default_device() == mx.cpu
    total, activation = 0, 4 if cpu else 2
    for file in weight_files(path, adapter_path):
        for tensor in read_header(file).values():
            element = ELEMENT_BYTES[tensor.dtype]
            if cpu and tensor.dtype in ("F16", "BF16"):
                element = 4
            # Small parameters, as that of the decay, are float32 in half-precision models too.
            if tensor.dtype == "F32" and len(tensor.shape) > 1:
                activation = 4
            total += math.prod(tensor.shape) * element
    return total, activation


def fingerprint(path: Path, adapter_path: Optional[str] = None) -> str:
    """What tells a model from every other: a hash of its files, the same in a copied folder."""
    files = [path / "config.json"]
    if adapter_path is not None:
        files.append(Path(adapter_path) / "adapter_config.json")
    return hash_of(files + weight_files(path, adapter_path))


def tokenizer_fingerprint(path: Path) -> str:
    """What tells a model's tokenizer from others: a hash of what its tokens depend on."""
    settings = {}
    if (file := path / "tokenizer_config.json").exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in NO_TOKENS}
    files = [file for name in TOKENIZER_FILES for file in sorted(path.glob(name))]
    known = json.dumps(settings, sort_keys=True) + hash_of(files)
    return hashlib.sha256(known.encode()).hexdigest()


def hash_of(files: Iterable[Path]) -> str:
    """A hash of files' names and contents, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
