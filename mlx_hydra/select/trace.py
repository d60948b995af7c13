"""What a pair of prompts leaves in a Qwen3 model: the heads' outputs where they matter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.models.qwen3 import Model

from .probes import Pair

PREFILL_STEP = 2048

# lambda of the paper's Eq 9.
DECAY = 0.9


class Trace:
    """The clean run of a pair, and the heads' outputs in the counterfactual one.

    With attention frozen to its clean outputs no position depends on another, so what patching
    needs of a run are the positions that it asks about (the sites): the swapped tokens and the
    answer's. Both runs share the cache of the text before the first swapped token.

    L layers, H heads of size D, P sites of which the last J predict the answer, T tokens:

    sites: their positions, ascending; the answer's are the last.
    segments: for each stretch of sites its first site, its end, and the position it starts at.
    heads: for each layer the heads' outputs ``[P, H, D]``, float32.
    other: the same in the counterfactual run; empty where it was not asked for.
    attended: for each layer the attention's output ``[P, hidden]``, float32.
    residual: for each layer what it reads ``[P, hidden]``, float32; after the last, what the final
        norm reads.
    cache: for each layer the clean run's keys and values of all T tokens.
    macs: multiply-adds that the two runs took.

    Args:
        counterfactual: whether the other run is made.
    """

    def __init__(self, model: Model, pair: Pair, *, counterfactual: bool = True):
        self.model, self.pair = model, pair
        self.layers = model.model.layers
        self.num_heads, self.head_dim = model.args.num_attention_heads, model.args.head_dim
        self.answer_length = len(pair.answer)
        self.sites, self.segments = [], []
        for start, end in pair.segments:
            first = len(self.sites)
            self.sites += range(start, end)
            self.segments.append((first, len(self.sites), start))

        tokens, shared = pair.clean_tokens, pair.changed[0]
        self.length = len(tokens)
        self.macs = {"clean": self.forward_macs(0, self.length)}
        self.cache = make_prompt_cache(model)
        prefill(model, tokens[:shared], self.cache)
        self.other: list[mx.array] = []
        if counterfactual:
            self.macs["counterfactual"] = self.forward_macs(shared, self.length)
            copies = copy_cache(self.cache)
            self.other = self._heads_at_sites(pair.counterfactual_tokens[shared:], copies)
            del copies
        self.heads = self._heads_at_sites(tokens[shared:], self.cache)
        self._follow(tokens)

    def readout(self, residual: mx.array) -> mx.array:
        """The pair's readout, from what the final norm reads.

        Args:
            residual: ``[..., >= J, hidden]``, the answer's sites last.

        Returns:
            ``[...]``, float32.
        """
        hidden = self.model.model.norm(residual[..., -self.answer_length :, :])
        return readout_of(self.model, self.pair, hidden)

    def forward_macs(self, start: int, end: int) -> int:
        """Multiply-adds of reading the tokens from ``start`` to ``end`` after those before."""
        width = self.num_heads * self.head_dim
        linear = (end - start) * (self.projection_macs + self.mlp_macs)
        return len(self.layers) * (linear + width * (end * end - start * start))

    @property
    def projection_macs(self) -> int:
        """Multiply-adds of q, k, v and o for a token in a layer."""
        args = self.model.args
        heads = 2 * args.num_attention_heads + 2 * args.num_key_value_heads
        return args.hidden_size * heads * args.head_dim

    @property
    def mlp_macs(self) -> int:
        """Multiply-adds of the MLP for a token in a layer."""
        return 3 * self.model.args.hidden_size * self.model.args.intermediate_size

    def _heads_at_sites(self, tokens: list[int], cache: list[KVCache]) -> list[mx.array]:
        recorders = []

        def record(o_proj):
            recorders.append(Recorder(o_proj, self.sites, cache[0].offset))
            return recorders[-1]

        with replaced_o_proj(self.model, record):
            prefill(self.model, tokens, cache, recorders)
        return [recorder.taken(self.num_heads) for recorder in recorders]

    def _follow(self, tokens: list[int]) -> None:
        """Fill ``residual`` and ``attended`` from the heads' outputs."""
        at_sites = mx.array([tokens[site] for site in self.sites])
        x = self.model.model.embed_tokens(at_sites).astype(mx.float32)
        self.residual, self.attended = [x], []
        for layer, heads in zip(self.layers, self.heads):
            self.attended.append(layer.self_attn.o_proj(heads.flatten(-2)))
            x = after_mlp(layer, x + self.attended[-1])
            self.residual.append(x)
        mx.eval(self.residual, self.attended)


class Recorder:
    """Stands in for o_proj and keeps what it reads at some positions of the text.

    pieces: of each chunk that has such positions ``[at most P, H * D]``.

    Args:
        sites: the positions, ascending.
        start: the position of the first token that it will read.
    """

    def __init__(self, o_proj, sites: Sequence[int], start: int):
        self.pieces: list[mx.array] = []
        self._o_proj, self._sites, self._start = o_proj, sites, start

    def __call__(self, x: mx.array) -> mx.array:
        local = [site - self._start for site in self._sites]
        if local := [place for place in local if 0 <= place < x.shape[1]]:
            # By index, which copies: a slice would hold the whole chunk.
            self.pieces.append(x[0, mx.array(local)])
        self._start += x.shape[1]
        return self._o_proj(x)

    def taken(self, num_heads: int) -> mx.array:
        """The heads' outputs at all sites ``[P, H, D]``, float32."""
        taken = mx.concatenate(self.pieces).astype(mx.float32)
        return taken.reshape(len(taken), num_heads, -1)


@contextmanager
def replaced_o_proj(model: Model, replacement) -> Iterator[None]:
    """Put ``replacement(o_proj)`` in the place of each layer's o_proj for a while."""
    attentions = [layer.self_attn for layer in model.model.layers]
    originals = [attention.o_proj for attention in attentions]
    try:
        for attention, o_proj in zip(attentions, originals):
            attention.o_proj = replacement(o_proj)
        yield
    finally:
        for attention, o_proj in zip(attentions, originals):
            attention.o_proj = o_proj


def prefill(
    model: Model,
    tokens: Sequence[int],
    cache: list[KVCache],
    recorders: Sequence[Recorder] = (),
) -> Optional[mx.array]:
    """Read tokens a chunk at a time; the last chunk's hidden states after the final norm."""
    hidden = None
    for start in range(0, len(tokens), PREFILL_STEP):
        chunk = mx.array(tokens[start : start + PREFILL_STEP])[None]
        hidden = model.model(chunk, cache=cache)
        held = [(c.keys, c.values) for c in cache]
        mx.eval(hidden, held, [recorder.pieces for recorder in recorders])
    return hidden


def copy_cache(cache: list[KVCache]) -> list[KVCache]:
    """Copies that go on from the same text without a change to the originals."""
    copies = []
    for one in cache:
        copy = KVCache()
        if one.offset:
            # Slices: an assignment into an array changes it for all who hold it.
            copy.keys = one.keys[..., : one.offset, :]
            copy.values = one.values[..., : one.offset, :]
            copy.offset = one.offset
        copies.append(copy)
    return copies


def readout_of(model: Model, pair: Pair, hidden: mx.array) -> mx.array:
    """The paper's Eq 9: how far the answer leads over the distractor, in logits.

    Args:
        hidden: the final norm's outputs at the answer's positions ``[..., J, hidden]``.

    Returns:
        ``[...]``, float32.
    """
    rows = unembedding(model, pair.answer) - unembedding(model, pair.distractor)
    decay = DECAY ** mx.arange(len(pair.answer))
    return (hidden.astype(mx.float32) * rows * (decay / decay.sum())[:, None]).sum((-1, -2))


def after_mlp(layer, x: mx.array) -> mx.array:
    return x + layer.mlp(layer.post_attention_layernorm(x))


def unembedding(model: Model, tokens: Sequence[int]) -> mx.array:
    """The rows of the output matrix that belong to tokens ``[len(tokens), hidden]``, float32."""
    ids = mx.array(tokens)
    if model.args.tie_word_embeddings:
        return model.model.embed_tokens(ids).astype(mx.float32)
    head = model.lm_head
    if "scales" not in head:
        return head.weight[ids].astype(mx.float32)
    packed = [head[name][ids] for name in ("weight", "scales", "biases") if name in head]
    rows = mx.dequantize(*packed, group_size=head.group_size, bits=head.bits, mode=head.mode)
    return rows.astype(mx.float32)
