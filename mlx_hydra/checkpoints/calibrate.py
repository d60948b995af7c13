"""Measure the teacher's heads on a text, with one of its layers in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Union

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.qwen3 import ModelArgs, TransformerBlock
from mlx_lm.utils import load_tokenizer

from .reader import CheckpointReader

MAX_TOKENS = 1024
# No tokenizer needs more text than this for that many tokens.
MAX_CHARACTERS = 32 * MAX_TOKENS
CHUNK = 512


class Calibration:
    """The RMS of each head's output in a Qwen3 checkpoint over the start of a text.

    head_rms: for each layer, for each of the teacher's heads, a float, once measured.

    Raises:
        ValueError: the text is empty or not UTF-8.
    """

    def __init__(self, reader: CheckpointReader, path: Union[str, Path]):
        self.head_rms: list[list[float]] = []
        self._reader, self._path = reader, path
        self._text = read_text(path)

    def measure(self, advance: Callable[[], None] = lambda: None) -> None:
        """Fill ``head_rms``; ``advance`` is called after each layer.

        Raises:
            ValueError: the checkpoint has no tokenizer for the text, or another model's.
        """
        args = ModelArgs.from_dict(self._reader.config)
        tokens = self._tokens(args.vocab_size)
        h = self._embedded(tokens)
        for layer in range(args.num_hidden_layers):
            block = self._block(args, layer)
            recorder = Recorder(block.self_attn.o_proj, args.num_attention_heads)
            block.self_attn.o_proj = recorder
            cache = KVCache()
            for i, chunk in enumerate(h):
                h[i] = block(chunk, create_attention_mask(chunk, cache), cache)
                mx.eval(h[i], recorder.squares)
            count = len(tokens) * args.head_dim
            self.head_rms.append(mx.sqrt(recorder.squares / count).tolist())
            advance()

    def _tokens(self, vocab_size: int) -> list[int]:
        folder = self._reader.folder
        try:
            tokenizer = load_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--calibrate {self._path}: {folder} has no tokenizer for it ({error})."
            ) from error
        tokens = tokenizer.encode(self._text[:MAX_CHARACTERS])[:MAX_TOKENS]
        if not tokens:
            raise ValueError(f"--calibrate {self._path}: {folder} has no tokenizer for it.")
        if max(tokens) >= vocab_size:
            raise ValueError(
                f"--calibrate {self._path}: the tokenizer in {folder} gives token {max(tokens)}, "
                f"the model knows {vocab_size}: it is another model's."
            )
        return tokens

    def _embedded(self, tokens: list[int]) -> list[mx.array]:
        """The text in chunks ``[1, <= CHUNK, hidden]``, float32."""
        embeddings = self._reader.read("model.embed_tokens.weight")
        h = embeddings[mx.array(tokens)].astype(mx.float32)[None]
        mx.eval(h)
        return mx.split(h, range(CHUNK, len(tokens), CHUNK), axis=1)

    def _block(self, args: ModelArgs, layer: int) -> TransformerBlock:
        block = TransformerBlock(args)
        prefix = f"model.layers.{layer}."
        weights = [
            (name, self._reader.read(prefix + name).astype(mx.float32))
            for name, _ in tree_flatten(block.parameters())
        ]
        block.load_weights(weights)
        mx.eval(block.parameters())
        return block


class Recorder:
    """Stands in for o_proj and adds up the squares of what it reads, float32 ``[H]``."""

    def __init__(self, o_proj, num_heads: int):
        self.squares = mx.zeros((num_heads,))
        self._o_proj = o_proj

    def __call__(self, x: mx.array) -> mx.array:
        squares = x.reshape(-1, len(self.squares), x.shape[-1] // len(self.squares)).square()
        self.squares = self.squares + squares.sum((0, 2))
        return self._o_proj(x)


def read_text(path: Union[str, Path]) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--calibrate {path}: not UTF-8 text (byte {error.start} is "
            f"0x{error.object[error.start]:02x})."
        ) from error
    except OSError as error:
        raise ValueError(f"--calibrate {path}: {error.strerror}.") from error
    if not text.strip():
        raise ValueError(f"--calibrate {path}: it is empty.")
    return text
