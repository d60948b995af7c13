"""HydraHead (arXiv 2606.20097) on a Qwen3 backbone, in mlx-lm's manner.

An attention layer holds two kinds of heads: a few keep causal softmax attention, the others are
Gated DeltaNet heads (arXiv 2412.06464). docs/architecture.md tells which choices are the paper's.
"""

from typing import Any, Optional, Union

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
from ..ops.head_attention import Parts, head_attention_parts, head_attention_prefill
from ..ops.head_attention_inputs import head_attention_inputs
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
from .compiled_prefill import CompiledPrefill, key_of
from .compiled_step import CompiledStep, KVBuffers, Remembered, runs_on_gpu
from .positions import rope_for, rotation_of
from .side_by_side import SideBySide, is_inside_transformation

# Tokens whose layers keep a GPU busy for longer than Python takes to build the next.
PREFILL = 256


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
        self._rotation = rotation_of(self.rope, D) if switches.rope else None
        # RoPE of another kind may want to know where it is.
        self.takes_arrays = not switches.rope or self._rotation is not None

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
        q, k, v, *gate = projected or [projection(x) for projection in self.projections]
        q, k, v = self.heads(q, k, v, offset)
        if cache is not None:
            k, v = append(cache, k, v)
        o = self.attend(q, k, v, mask, cache)
        return o, gate[0] if gate else None

    def step(self, projected, mask, cache, offset) -> Union[mx.array, Parts]:
        """What attention gives a few tokens, or what :func:`gated_delta_step` makes that of.

        Args:
            projected: the projections side by side ``[B, T, N]``, or ``[B, N]`` of a token, and
                others after them.
        """
        heads = self.n_heads, self.n_kv_heads
        q, k, v = self.heads(projected, None, None, offset, heads)
        k, v = append(cache, k, v)
        if isinstance(cache, KVBuffers):
            return head_attention_parts(q, k, v, self.kv_index, scale=self.scale, offset=offset)
        return self.attend(q, k, v, mask, cache)

    def heads(self, q, k, v, offset, heads=None) -> tuple[mx.array, ...]:
        """Queries with the log scale, keys and values ``[B, H, T, D]``, of their projections."""
        return head_attention_inputs(
            *(q, k, v, self.q_norm.weight, self.k_norm.weight),
            eps=self.q_norm.eps,
            offset=offset,
            log_scale_base=self.log_scale_base,
            rope=self.rope if "rope" in self else None,
            rotation=self._rotation,
            heads=heads,
        )

    def attend(self, q, k, v, mask, cache) -> mx.array:
        """Attend to all keys and values of a cache; ``[B, H, T, D]``."""
        T, quantised = q.shape[2], {}
        if hasattr(cache, "bits"):
            quantised = {"group_size": cache.group_size, "bits": cache.bits}
        offset = (k[0] if quantised else k).shape[2] - T
        if isinstance(cache, KVBuffers):
            # Which are read whole: what a token sees of them is told by an array.
            mask = cache.position.seen
            offset = cache.position.offset if mask is None else offset
        return head_attention(
            q,
            k,
            v,
            self.kv_index,
            scale=self.scale,
            offset=offset,
            mask=mask if isinstance(mask, mx.array) else None,
            **quantised,
        )

    def attend_from(self, q, k, v, where, splits) -> mx.array:
        """What :meth:`attend` gives, of the first key and value and an array of the offset."""
        return head_attention_prefill(
            q, k, v, self.kv_index, scale=self.scale, offset=where, splits=splits
        )


def tokens_of(x: mx.array) -> int:
    """T of ``x [B, T, dim]``; in a compiled step it is ``[B, dim]``, and 1."""
    return 1 if x.ndim == 2 else x.shape[1]


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
            cache.advance(q.shape[1])
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

    def empty_states(self, B: int, dtype: mx.Dtype) -> list[mx.array]:
        """What the cache of B sequences holds before the first token."""
        H, D = self.n_heads, self.head_dim
        states = {RECURRENT: mx.zeros((B, H, D, D), mx.float32)}
        if self.taps:
            states[CONV] = mx.zeros((B, self.taps - 1, 3 * H * D), dtype)
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
        cache.advance(tokens_of(projected))
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
        self.side_by_side, self._out = SideBySide(), SideBySide()

    def __call__(self, x, full_mask=None, linear_mask=None, cache=None, offset=0) -> mx.array:
        heads = self.fused_heads(x, full_mask, linear_mask, cache, offset)
        return self.output(heads) if self.is_step(x, cache) else self.o_proj(heads)

    def of_sum(self, h, update, norm, cache, offset) -> tuple[mx.array, mx.array]:
        """The sum of a compiled step's ``[B, dim]`` each, and what this makes of its norm."""
        backend = self.step_backend(h, cache)
        if backend == "ops" or h.dtype != update.dtype:
            h = h + update
            return h, self(norm(h), None, None, cache, offset)
        h, projected = self.side_by_side.of_sum(h, update, norm, self.projections)
        return h, self.output(self._step(projected, None, None, cache, offset, backend))

    def is_step(self, x, cache) -> bool:
        """Whether x is a token or a few, for which the host's work is what takes time."""
        if tokens_of(x) == 1 and cache is not None and not self.training and runs_on_gpu():
            return True
        return self.step_backend(x, cache) != "ops"

    def output(self, heads) -> mx.array:
        """What o_proj makes of the heads, of weights that lie turned; not for training."""
        return self._out.apart(heads, [self.o_proj])[0]

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
            projected = self.side_by_side(x, self.projections)
            return self._step(projected, full_mask, linear_mask, cache, offset, backend)
        if x.ndim == 2:
            return self.fused_heads(x[:, None], full_mask, linear_mask, cache, offset)[:, 0]
        kinds, of_full, of_linear, biases = [], None, None, (None, None)
        if "linear" in self and cache is not None and not self.training and runs_on_gpu():
            projected = self.side_by_side.unbiased(x, self.projections)
            biases = self.gate_biases()
            of_full = self.full.projections if "full" in self else []
            of_full, of_linear = projected[: len(of_full)], projected[len(of_full) :]
        if "full" in self:
            o, gate = self.full(x, full_mask, full_part(cache), offset, of_full)
            kinds.append(self.full_outputs(o, gate, biases[0]))
        if "linear" in self:
            o, gate = self.linear(x, linear_mask, linear_part(cache), offset, of_linear)
            kinds.append(self.linear_outputs(o, gate, biases[1]))
        return self.fused(kinds).astype(x.dtype)

    def full_outputs(self, o, gate=None, gate_bias=None) -> HeadOutputs:
        o = o.transpose(0, 2, 1, 3)
        return HeadOutputs(o, gate, self.full_eps, "sigmoid", _like(gate_bias, gate))

    def linear_outputs(self, o, gate=None, gate_bias=None) -> HeadOutputs:
        return HeadOutputs(o, gate, self.linear_eps, "silu", _like(gate_bias, gate))

    def gate_biases(self) -> tuple[Optional[mx.array], Optional[mx.array]]:
        """Of the full and the linear heads: what has yet to be added to joined projections."""
        pairs = list(zip(self.projections, self.side_by_side.biases(self.projections)))
        gates = [self[kind].get("g_proj") if kind in self else None for kind in ("full", "linear")]
        if any(b is not None and all(layer is not gate for gate in gates) for layer, b in pairs):
            raise ValueError("HydraHead attention: of its projections only g_proj may have a bias.")
        return tuple(next((b for layer, b in pairs if layer is gate), None) for gate in gates)

    def join(self) -> None:
        """Have the products that stand for several layers, as a first token would."""
        self._out.join([self.o_proj])
        if "linear" in self:
            self.side_by_side.join(self.projections)

    def forget(self) -> None:
        """Let go of those products."""
        self._out.forget()
        self.side_by_side.forget()

    def fused(self, kinds) -> mx.array:
        """What o_proj reads of one kind of heads or two."""
        if "fusion" in self:
            return fuse_kinds(kinds, self.fusion.gamma)
        o, gate, *_ = kinds[0]
        o = o.flatten(2)
        return o if gate is None else o * mx.sigmoid(gate)

    def _step(self, projected, full_mask, linear_mask, cache, offset, backend):
        """A few tokens, of all projections side by side: attention, and one kernel for the rest."""
        of_full_heads = {}
        full_bias, linear_bias = self.gate_biases()
        if "full" in self:
            *_, gate_at, end = self.full.ends
            of_full_heads = {
                "first": end,
                "full": self.full.step(projected, full_mask, full_part(cache), offset),
                "full_gate": gate_at if "g_proj" in self.full else None,
                "full_gate_bias": full_bias,
                "full_eps": self.full_eps,
            }
        return self.linear.step(
            projected,
            linear_mask,
            linear_part(cache),
            offset,
            gamma=self.fusion.gamma,
            eps=self.linear_eps,
            gate_bias=linear_bias,
            backend=backend,
            **of_full_heads,
        )


def _like(bias, gate):
    return None if bias is None else bias.astype(gate.dtype)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.self_attn = Attention(args, layer)
        self.mlp = MLP(args.hidden_size, args.intermediate_size)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._side_by_side, self._down = SideBySide(), SideBySide()

    def __call__(self, x, full_mask=None, linear_mask=None, cache=None, offset=0) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), full_mask, linear_mask, cache, offset)
        x = self.post_attention_layernorm(h)
        return h + (self.feed_forward(x) if self.self_attn.is_step(x, cache) else self.mlp(x))

    def of_sum(self, h, update, cache, offset) -> tuple[mx.array, mx.array]:
        """What ``self(h + update)`` is the sum of, in a compiled step: ``[B, dim]`` each."""
        h, update = self.self_attn.of_sum(h, update, self.input_layernorm, cache, offset)
        mlp, norm = self.mlp, self.post_attention_layernorm
        if type(mlp) is not MLP:
            h = h + update
            return h, mlp(norm(h))
        of_both = [mlp.gate_proj, mlp.up_proj]
        h, x = self._side_by_side.of_sum(h, update, norm, of_both, together=True)
        return h, self._down.apart(x, [mlp.down_proj])[0]

    def feed_forward(self, x, together=True) -> mx.array:
        """What the MLP makes of x, of weights that lie turned; not for training.

        Its first two products together, as for a token, or one by one.
        """
        mlp, products = self.mlp, self._side_by_side
        if type(mlp) is not MLP:
            return mlp(x)
        run = products.apart if together else products.one_by_one
        gate, up = run(x, [mlp.gate_proj, mlp.up_proj])
        return self._down.apart(swiglu(gate, up), [mlp.down_proj])[0]

    def join(self) -> None:
        """Have the products that stand for several layers, as a first token would."""
        if type(self.mlp) is MLP:
            self._side_by_side.join([self.mlp.gate_proj, self.mlp.up_proj])
            self._down.join([self.mlp.down_proj])
        self.self_attn.join()

    def forget(self) -> None:
        """Let go of those products."""
        self._side_by_side.forget()
        self._down.forget()
        self.self_attn.forget()


class HydraHeadModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._remembered = Remembered()
        self._compiled_step, self._compiled_prefill = CompiledStep(is_ours), CompiledPrefill()

    def __call__(
        self,
        inputs: mx.array,
        cache: Optional[list[Any]] = None,
        input_embeddings: Optional[mx.array] = None,
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if cache is None:
            cache = [None] * len(self.layers)
        parts = self._compiled_step.takes(self.layers, h, cache)
        known = not self.training and self._remembered.remembers(self.layers)
        if known and parts:
            return self.norm(self._compiled_step(self.layers, h, parts))
        prefills = cache[0] is not None and h.shape[1] >= PREFILL and kernels_run()
        if self.training or not (known or self._remembered.is_empty):
            # The weights are others, or will be soon: these would be held beside them.
            for kept in (
                *(self._remembered, self._compiled_step, self._compiled_prefill),
                *self.layers,
            ):
                kept.forget()

        # Linear layers keep no offset: all layers take it from the first that caches keys.
        first_full = next((c for c in map(full_part, cache) if c is not None), None)
        first_linear = next((c for c in map(linear_part, cache) if c is not None), None)
        # A copy: mlx-lm 0.31 adds to the offsets of a batch in place.
        offset = 0 if first_full is None else first_full.offset + 0
        full_mask = create_attention_mask(h, first_full)
        linear_mask = padding_mask(first_linear, h.shape[1])

        run, entering = None, key_of(h) if prefills else None
        of_ours = prefills and all(map(is_ours, self.layers))
        plain = linear_mask is None and not isinstance(full_mask, mx.array)
        # Weights that gradients are asked of are others; embeddings may be asked, too.
        if known and of_ours and plain and (input_embeddings is None or begin(h)):
            run = self._compiled_prefill.runner(self.layers, h, cache, offset)
        for i, (layer, c) in enumerate(zip(self.layers, cache)):
            h = layer(h, full_mask, linear_mask, c, offset) if run is None else run(i, h, c)
            # Not the last: of most steps of a prefill its output is not asked for.
            if prefills and layer is not self.layers[-1]:
                begin(h)
        first = of_ours and run is None and not self.training
        if first:
            if runs_on_gpu():
                # Weights, which a token would join, and which would be held as they were.
                for layer in self.layers:
                    layer.join()
            self._compiled_prefill.remember(entering)
        if (first or parts) and not known:
            self._remembered.remember(self.layers)
        return self.norm(depends_on_counters(h, cache))


def is_ours(layer: nn.Module) -> bool:
    """Whether a layer does what its parts do; one of a class made of ours may do more."""
    if type(layer) is not TransformerBlock or type(layer.self_attn) is not Attention:
        return False
    kinds = {"full": FullAttention, "linear": LinearAttention}
    return all(type(layer.self_attn.get(kind)) in (of, type(None)) for kind, of in kinds.items())


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
