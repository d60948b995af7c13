"""HydraHead (arXiv 2606.20097) on a Qwen3 backbone, in mlx-lm's manner.

An attention layer holds two kinds of heads: a few keep causal softmax attention, the others are
Gated DeltaNet heads (arXiv 2412.06464). docs/architecture.md tells which choices are the paper's.
"""

import math
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.qwen3 import MLP

from ..config import LayerHeads, ModelArgs
from ..ops import gated_delta, head_attention
from ..ops.backend import kernels_run
from ..ops.fuse_heads import HeadOutputs, fuse_kinds
from ..ops.gated_delta_inputs import gated_delta_inputs
from ..ops.gated_delta_step import MOST_TOKENS, Weights, gated_delta_step, step_backend
from ..ops.head_attention import head_attention_prefill
from .cache import (
    CONV,
    RECURRENT,
    append,
    depends_on_counters,
    full_part,
    linear_part,
    make_cache,
    padding_mask,
)
from .compiled_prefill import CompiledPrefill
from .compiled_step import CompiledStep, KVBuffers, runs_on_gpu
from .positions import log_scales, rope_for, rotation_of
from .side_by_side import SideBySide, is_inside_transformation

# Tokens whose layers keep a GPU busy for longer than Python takes to build the next; and every
# how many layers the GPU is told to begin, which costs the host as much as a tenth of a layer.
PREFILL, LAYERS_AT_ONCE = 256, 2


def may_quantize(path: str) -> bool:
    """Whether a module may be quantised: not the small projections of decay and update rate."""
    return not path.endswith(("linear.a_proj", "linear.b_proj"))


def may_cast(path: str) -> bool:
    """Whether a parameter may leave float32: not the decay's own, and not gamma."""
    return not path.endswith(("A_log", "dt_bias", "gamma"))


class FullAttention(nn.Module):
    """The heads that keep softmax attention, and the KV heads that they read."""

    def __init__(self, args: ModelArgs, heads: LayerHeads):
        super().__init__()
        switches = args.full_attention
        dim, D = args.hidden_size, args.head_dim
        self.n_heads, self.n_kv_heads = len(heads.full), len(heads.kv_heads)
        self.kv_index = heads.kv_index
        self.scale = D**-0.5
        self.log_scale_base = switches.log_scale_base

        self.q_proj = nn.Linear(dim, self.n_heads * D, bias=False)
        self.k_proj = nn.Linear(dim, self.n_kv_heads * D, bias=False)
        self.v_proj = nn.Linear(dim, self.n_kv_heads * D, bias=False)
        if switches.gate:
            self.g_proj = nn.Linear(dim, self.n_heads * D, bias=True)
        self.q_norm = nn.RMSNorm(D, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(D, eps=args.rms_norm_eps)
        if switches.rope:
            self.rope = rope_for(args)
        # RoPE of another kind may want to know where it is.
        self.takes_arrays = not switches.rope or rotation_of(self.rope, D) is not None

    @property
    def projections(self) -> list[nn.Module]:
        gate = [self.g_proj] if "g_proj" in self else []
        return [self.q_proj, self.k_proj, self.v_proj, *gate]

    @property
    def ends(self) -> list[int]:
        """The channels where each projection's outputs end, side by side."""
        D = self.q_norm.weight.size
        queries, keys = self.n_heads * D, self.n_kv_heads * D
        ends = [queries, queries + keys, queries + 2 * keys]
        return [*ends, ends[-1] + queries] if "g_proj" in self else ends

    def __call__(
        self, x, mask, cache, offset, projected=None
    ) -> tuple[mx.array, Optional[mx.array]]:
        T, compiled = x.shape[1], isinstance(cache, KVBuffers)
        if compiled:
            mask = cache.position.seen
        projected = projected or [projection(x) for projection in self.projections]
        where = cache.position.scalar if compiled else offset
        q, k, v, *gate = self.heads(projected, T, where)
        scale, a = self.scale, self.log_scale_base
        if a is not None:
            if T == 1 and isinstance(offset, int):
                # One position: its factor is a number, and costs no operation.
                scale *= math.log(offset + a) / math.log(a)
            elif compiled and mask is None:
                scale = cache.position.log_scale(a, scale)
            elif compiled:
                q = (q * cache.position.log_scale(a, 1.0)).astype(q.dtype)
            else:
                q = (q * self.log_scales(T, offset)).astype(q.dtype)
        where = offset if compiled and mask is None else None
        if cache is not None:
            k, v = append(cache, k, v)
        o = self.attend(q, k, v, mask, cache, scale=scale, offset=where)
        return o, gate[0] if gate else None

    def heads(self, projected, T, where) -> list[mx.array]:
        """Queries, keys and values of the projections ``[B, H, T, D]``, and what else there is."""
        q, k, v, *gate = projected
        q = heads_first(self.q_norm(by_head(q, self.n_heads)), T)
        k = heads_first(self.k_norm(by_head(k, self.n_kv_heads)), T)
        v = heads_first(by_head(v, self.n_kv_heads), T)
        if "rope" in self:
            q, k = self.rope(q, offset=where), self.rope(k, offset=where)
        return [q, k, v, *gate]

    def attend(self, q, k, v, mask, cache, *, scale, offset=None) -> mx.array:
        """Attend to all keys and values of a cache; ``[B, T, H, D]``."""
        T, quantised = q.shape[2], {}
        if hasattr(cache, "bits"):
            quantised = {"group_size": cache.group_size, "bits": cache.bits}
        keys = k[0] if quantised else k
        o = head_attention(
            q,
            k,
            v,
            self.kv_index,
            scale=scale,
            offset=keys.shape[2] - T if offset is None else offset,
            mask=mask if isinstance(mask, mx.array) else None,
            **quantised,
        )
        return o.transpose(0, 2, 1, 3)

    def attend_from(self, q, k, v, where, splits) -> mx.array:
        """What :meth:`attend` gives, of the first key and value and an array of the offset."""
        o = head_attention_prefill(
            q, k, v, self.kv_index, scale=self.scale, offset=where, splits=splits
        )
        return o.transpose(0, 2, 1, 3)

    def log_scales(self, T, offset):
        """s_t = log(t + a) / log(a), HypeNet's (2601.22156): ``[T, 1]`` or ``[B, 1, T, 1]``."""
        if isinstance(offset, int):
            return log_scales(offset, T, self.log_scale_base)
        # Left padding has positions below zero, which nothing reads.
        t = mx.maximum(offset[:, None, None] + mx.arange(T), 0).astype(mx.float32)
        return (mx.log(t + self.log_scale_base) / math.log(self.log_scale_base))[..., None]


def by_head(x: mx.array, heads: int) -> mx.array:
    """``[B, T, H * D]`` as ``[B, T, H, D]``, and for one token as ``[B, H, 1, D]`` at once."""
    B, T, _ = x.shape
    return x.reshape((B, heads, 1, -1) if T == 1 else (B, T, heads, -1))


def tokens_of(x: mx.array) -> int:
    """T of ``x [B, T, dim]``; in a compiled step it is ``[B, dim]``, and 1."""
    return 1 if x.ndim == 2 else x.shape[1]


def heads_first(x: mx.array, T: int) -> mx.array:
    """What :func:`by_head` gives of T tokens as ``[B, H, T, D]``.

    Nothing is to be done for one: views start no kernel, but the host handles each.
    """
    return x if T == 1 else x.transpose(0, 2, 1, 3)


class LinearAttention(nn.Module):
    """The heads that run the gated delta rule; each has keys and values of its own."""

    def __init__(self, args: ModelArgs, heads: LayerHeads):
        super().__init__()
        switches = args.linear_attention
        dim, D = args.hidden_size, args.head_dim
        self.n_heads = H = len(heads.linear)
        self.head_dim = D

        self.q_proj = nn.Linear(dim, H * D, bias=False)
        self.k_proj = nn.Linear(dim, H * D, bias=False)
        self.v_proj = nn.Linear(dim, H * D, bias=False)
        self.a_proj = nn.Linear(dim, H, bias=False)
        self.b_proj = nn.Linear(dim, H, bias=False)
        if switches.gate:
            self.g_proj = nn.Linear(dim, H * D, bias=True)
        self.q_norm = nn.RMSNorm(D, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(D, eps=args.rms_norm_eps)
        self.taps = K = switches.conv_kernel_size or 0
        if K:
            self.q_conv1d = nn.Conv1d(H * D, H * D, K, groups=H * D, bias=False)
            self.k_conv1d = nn.Conv1d(H * D, H * D, K, groups=H * D, bias=False)
            self.v_conv1d = nn.Conv1d(H * D, H * D, K, groups=H * D, bias=False)
        if switches.rope:
            self.rope = rope_for(args)
        self._rotation = rotation_of(self.rope, D) if switches.rope else None
        self.takes_arrays = not switches.rope or self._rotation is not None
        self.A_log = mx.zeros((H,))
        self.dt_bias = mx.zeros((H,))

    def __call__(
        self, x, mask, cache, offset, projected=None
    ) -> tuple[mx.array, Optional[mx.array]]:
        q, k, v, *gate, a, b = projected or [projection(x) for projection in self.projections]
        q, k, v, g, beta, past = gated_delta_inputs(
            *(q, k, v, a, b, self.weights),
            None if cache is None or not self.taps else cache[CONV],
            offset=offset,
            mask=mask,
            lengths=None if cache is None else cache.lengths,
            rope=self.rope if "rope" in self else None,
            rotation=self._rotation,
        )
        state = None if cache is None else cache[RECURRENT]
        o, state = gated_delta(q, k, v, g, beta, state, mask)
        if cache is not None:
            cache[RECURRENT] = state
            if self.taps:
                cache[CONV] = past
            cache.advance(x.shape[1])
            # Else all layers' states are made at the end of a prefill step, and until then each
            # holds the sequences it is made from.
            o = mx.depends(o, [s for s in cache.cache if s is not None])
        return o, gate[0] if gate else None

    def step_backend(self, x, cache) -> str:
        """What runs :meth:`step` on the next tokens; ``"ops"`` where nothing does."""
        if cache is None or cache.lengths is not None or not self.takes_arrays:
            return "ops"
        if self.taps and len({w.dtype for w in self.weights.convolution}) > 1:
            return "ops"
        return step_backend(x.dtype, tokens_of(x), self.head_dim, self.taps)

    @property
    def projections(self) -> list[nn.Module]:
        gate = [self.g_proj] if "g_proj" in self else []
        return [self.q_proj, self.k_proj, self.v_proj, *gate, self.a_proj, self.b_proj]

    def empty_states(self, h: mx.array) -> list[mx.array]:
        """What the cache of ``h [B, T, hidden]`` holds before the first token."""
        B, H, D = len(h), self.n_heads, self.head_dim
        states = {RECURRENT: mx.zeros((B, H, D, D), mx.float32)}
        if self.taps:
            states[CONV] = mx.zeros((B, self.taps - 1, 3 * H * D), h.dtype)
        return [states[place] for place in sorted(states)]

    @property
    def weights(self) -> Weights:
        convolution = None
        if self.taps:
            convolution = self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight
        return Weights(
            self.q_norm.weight,
            self.k_norm.weight,
            self.A_log,
            self.dt_bias,
            self.q_norm.eps,
            convolution,
        )

    def step(self, projected, mask, cache, offset, **others) -> mx.array:
        """What :func:`gated_delta_step` makes of the projections of a few tokens."""
        o, state, past = gated_delta_step(
            projected,
            self.weights,
            state=cache[RECURRENT],
            past=cache[CONV] if self.taps else None,
            offset=offset,
            mask=mask,
            rotation=self._rotation,
            **others,
        )
        cache[RECURRENT] = state
        if self.taps:
            cache[CONV] = past
        cache.advance(projected.shape[1])
        return o


class Fusion(nn.Module):
    """One learned weight a head, full heads first; it stays float32."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.gamma = mx.ones((num_heads,))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        heads = args.layer_heads(layer)
        self.full_eps = args.fusion.eps if args.fusion.norm is True else None
        self.linear_eps = args.fusion.eps if args.fusion.norm else None
        if heads.full:
            self.full = FullAttention(args, heads)
        if heads.linear:
            self.linear = LinearAttention(args, heads)
        if args.is_fused(layer):
            self.fusion = Fusion(args.num_attention_heads)
        self.o_proj = nn.Linear(
            args.num_attention_heads * args.head_dim, args.hidden_size, bias=False
        )
        self.side_by_side = SideBySide()

    def __call__(self, x, full_mask=None, linear_mask=None, cache=None, offset=0) -> mx.array:
        return self.o_proj(self.fused_heads(x, full_mask, linear_mask, cache, offset))

    @property
    def projections(self) -> list[nn.Module]:
        """Those of the full heads, then those of the linear ones."""
        kinds = [self[kind] for kind in ("full", "linear") if kind in self]
        return [projection for heads in kinds for projection in heads.projections]

    def step_backend(self, x, cache) -> str:
        """What runs the fused step on the next tokens; ``"ops"`` where each part runs by itself."""
        if tokens_of(x) > MOST_TOKENS or "linear" not in self:
            return "ops"
        return self.linear.step_backend(x, linear_part(cache))

    def fused_heads(self, x, full_mask=None, linear_mask=None, cache=None, offset=0) -> mx.array:
        """What o_proj reads: head outputs ``[B, T, H * D]``, full heads first.

        Of x ``[B, dim]``, the token of a compiled step, ``[B, H * D]``.
        """
        if (backend := self.step_backend(x, cache)) != "ops":
            return self._step(x, full_mask, linear_mask, cache, offset, backend)
        if x.ndim == 2:
            return self.fused_heads(x[:, None], full_mask, linear_mask, cache, offset)[:, 0]
        kinds, of_full, of_linear = [], None, None
        if "linear" in self and cache is not None and not self.training and runs_on_gpu():
            projected = self.side_by_side.apart(x, self.projections)
            of_full = self.full.projections if "full" in self else []
            of_full, of_linear = projected[: len(of_full)], projected[len(of_full) :]
        if "full" in self:
            o, gate = self.full(x, full_mask, full_part(cache), offset, of_full)
            kinds.append(self.full_outputs(o, gate))
        if "linear" in self:
            o, gate = self.linear(x, linear_mask, linear_part(cache), offset, of_linear)
            kinds.append(self.linear_outputs(o, gate))
        return self.fused(kinds).astype(x.dtype)

    def full_outputs(self, o, gate=None) -> HeadOutputs:
        return HeadOutputs(o, gate, self.full_eps, "sigmoid")

    def linear_outputs(self, o, gate=None) -> HeadOutputs:
        return HeadOutputs(o, gate, self.linear_eps, "silu")

    def fused(self, kinds) -> mx.array:
        """What o_proj reads of one kind of heads or two."""
        if "fusion" in self:
            return fuse_kinds(kinds, self.fusion.gamma)
        o, gate, *_ = kinds[0]
        o = o.flatten(2)
        return o if gate is None else o * mx.sigmoid(gate)

    def _step(self, x, full_mask, linear_mask, cache, offset, backend):
        """A few tokens: one product for all projections, and one kernel for what follows."""
        of_full_heads = {}
        rows = self.side_by_side(x, self.projections)
        projected = rows.reshape(len(x), tokens_of(x), -1)
        if "full" in self:
            *parts, _ = mx.split(projected, self.full.ends, axis=-1)
            o, gate = self.full(projected, full_mask, full_part(cache), offset, parts)
            of_full_heads = {
                "first": self.full.ends[-1],
                "full": o,
                "full_gate": None if gate is None else self.full.ends[-2],
                "full_eps": self.full_eps,
            }
        fused = self.linear.step(
            projected,
            linear_mask,
            linear_part(cache),
            offset,
            gamma=self.fusion.gamma,
            eps=self.linear_eps,
            backend=backend,
            **of_full_heads,
        )
        return fused.reshape(*x.shape[:-1], -1)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.self_attn = Attention(args, layer)
        self.mlp = MLP(args.hidden_size, args.intermediate_size)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._side_by_side = SideBySide()

    def __call__(self, x, full_mask=None, linear_mask=None, cache=None, offset=0) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), full_mask, linear_mask, cache, offset)
        mlp, x = self.mlp, self.post_attention_layernorm(h)
        is_token = tokens_of(x) == 1 and cache is not None and not self.training and runs_on_gpu()
        if not is_token and self.self_attn.step_backend(x, cache) == "ops":
            return h + mlp(x)
        gate, up = self._side_by_side.apart(x, [mlp.gate_proj, mlp.up_proj])
        return h + mlp.down_proj(swiglu(gate, up))

    def join(self) -> None:
        """Have the products that stand for several layers, as a first token would."""
        self._side_by_side.join([self.mlp.gate_proj, self.mlp.up_proj])
        if "linear" in self.self_attn:
            self.self_attn.side_by_side.join(self.self_attn.projections)

    def forget(self) -> None:
        """Let go of products that stand for several layers."""
        self._side_by_side.forget()
        self.self_attn.side_by_side.forget()


class HydraHeadModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._compiled_step = CompiledStep()
        self._compiled_prefill = CompiledPrefill()

    def __call__(
        self,
        inputs: mx.array,
        cache: Optional[list[Any]] = None,
        input_embeddings: Optional[mx.array] = None,
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if cache is None:
            cache = [None] * len(self.layers)
        compiles = self._compiled_step.takes(self.layers, h, cache)
        remembers = self._compiled_step.remembers(self.layers)
        if remembers and compiles:
            return self.norm(self._compiled_step(self.layers, h, cache))
        prefills = cache[0] is not None and h.shape[1] >= PREFILL and kernels_run()
        knows_others = not (remembers or self._compiled_step.is_empty) or not (
            self._compiled_prefill.is_empty or self._compiled_prefill.remembers(self.layers)
        )
        if self.training or knows_others:
            # The weights are others, or will be soon: these would be held beside them.
            self._compiled_step.forget()
            self._compiled_prefill.forget()
            for layer in self.layers:
                layer.forget()

        # Linear layers keep no offset: all layers take it from the first that caches keys.
        first_full = next((c for c in map(full_part, cache) if c is not None), None)
        first_linear = next((c for c in map(linear_part, cache) if c is not None), None)
        # A copy: mlx-lm 0.31 adds to the offsets of a batch in place.
        offset = 0 if first_full is None else first_full.offset + 0
        full_mask = create_attention_mask(h, first_full)
        linear_mask = padding_mask(first_linear, h.shape[1])

        run = None
        of_ours = all(type(layer) is TransformerBlock for layer in self.layers)
        plain = linear_mask is None and not isinstance(full_mask, mx.array)
        # Weights that gradients are asked of are others; embeddings may be asked, too.
        if prefills and of_ours and plain and (input_embeddings is None or begin(h)):
            run = self._compiled_prefill.runner(self.layers, h, cache, offset)
        for i, (layer, c) in enumerate(zip(self.layers, cache)):
            h = layer(h, full_mask, linear_mask, c, offset) if run is None else run(i, h, c)
            # Not the last: of most steps of a prefill its output is not asked for.
            if prefills and i % LAYERS_AT_ONCE == 0 and layer is not self.layers[-1]:
                begin(h)
        if compiles:
            self._compiled_step.remember(self.layers)
        if prefills and of_ours and run is None:
            if runs_on_gpu():
                # Weights, which a token would join, and which would be held as they were.
                for layer in self.layers:
                    layer.join()
            self._compiled_prefill.remember(self.layers, h)
        return self.norm(depends_on_counters(h, cache))


def begin(h: mx.array) -> bool:
    """Have the GPU work on a layer while Python builds the next ones.

    False inside mx.compile or mx.grad, where there is nothing to run yet.
    """
    try:
        mx.async_eval(h)
    except ValueError as error:
        if not is_inside_transformation(error):
            raise
        return False
    return True


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = HydraHeadModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: Optional[list[Any]] = None,
        input_embeddings: Optional[mx.array] = None,
    ) -> mx.array:
        h = self.model(inputs, cache, input_embeddings)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)

    def make_cache(self) -> list:
        return make_cache(self.args)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if self.args.head_order != "full_first":
            raise ValueError(
                "This is a HydraHead checkpoint in PyTorch's layout (head_order "
                f"{self.args.head_order!r}); bring it over with convert.py --hf-path first."
            )
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    @property
    def quant_predicate(self):
        return lambda path, _: may_quantize(path)

    @property
    def cast_predicate(self):
        return may_cast
