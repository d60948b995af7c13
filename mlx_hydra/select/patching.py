"""Activation and path patching of many heads at once, with all other attention frozen."""

from collections.abc import Mapping, Sequence
from typing import Optional

import mlx.core as mx

from .trace import Trace, after_mlp

Head = tuple[int, int]
# The heads of each layer that listen.
Receivers = Mapping[int, Sequence[int]]

# Bytes that the rows of one batch may take, and their scores in one block of attention.
ROWS_BYTES = 512 << 20
SCORES_BYTES = 64 << 20
MLP_TOKENS = 4096


def patched_readouts(
    trace: Trace, heads: Sequence[Head], hops: Sequence[Receivers] = ()
) -> tuple[mx.array, int]:
    """The readout with the output of one head at a time taken from the counterfactual run.

    All heads are one batch that grows layer by layer: a head's row begins in its own layer, with
    its output swapped, and goes through the later layers' MLPs, whose attention outputs are the
    clean run's. Without ``hops`` this is the readout of the paper's Eq 10.

    With them it is path patching. The swapped output reaches the receivers of the first hop alone
    (through residual stream and MLPs), and theirs, recomputed, those of the next; the outputs of
    the last hop's receivers alone reach the readout. Each hop is a residual stream of its own.

    Args:
        heads: (layer, head), by ascending layer.
        hops: for each hop the receivers of each layer.

    Returns:
        The readouts ``[len(heads)]``, float32, and the multiply-adds they took.
    """
    P, hidden = trace.residual[0].shape
    rows = max(1, ROWS_BYTES // (4 * P * hidden * (1 + len(hops))))
    readouts, macs = [], 0
    for start in range(0, len(heads), rows):
        batch = Batch(trace, hops)
        readouts.append(batch.run(heads[start : start + rows]))
        macs += batch.macs
        mx.eval(readouts[-1])
    return mx.concatenate(readouts), macs


class Batch:
    """Rows of patched residuals on their way up; one stream a hop, and the readout's.

    streams: ``[n, P, hidden]`` for each hop's receivers and, of the answer's sites alone
        ``[n, J, hidden]``, for the readout; None while a stream is as in the clean run.
    """

    def __init__(self, trace: Trace, hops: Sequence[Receivers]):
        self.trace, self.hops = trace, hops
        self.streams: list[Optional[mx.array]] = [None] * (len(hops) + 1)
        self.count, self.macs = 0, 0

    def run(self, heads: Sequence[Head]) -> mx.array:
        for layer in range(heads[0][0], len(self.trace.layers)):
            self._attend(layer)
            self._enter(layer, [head for at, head in heads if at == layer])
            self._feed_forward(layer)
            mx.eval([stream for stream in self.streams if stream is not None])
        if self.streams[-1] is None:
            return mx.broadcast_to(self.trace.readout(self.trace.residual[-1]), (len(heads),))
        return self.trace.readout(self.streams[-1])

    def _sites(self, stream: int) -> slice:
        return slice(None if stream < len(self.hops) else -self.trace.answer_length, None)

    def _is_read(self, stream: int, layer: int) -> bool:
        """Whether a stream is read after a layer: the readout's is, at the end."""
        return stream == len(self.hops) or layer < max(self.hops[stream])

    def _attend(self, layer: int) -> None:
        """Add the attention's outputs: the clean ones but for what receivers make of the change."""
        trace = self.trace
        # From the readout down: a hop's receivers read their stream as it is before this layer.
        for i in reversed(range(len(self.streams))):
            if not self._is_read(i, layer):
                continue
            sites = self._sites(i)
            attended = trace.attended[layer][sites]
            receivers = self.hops[i - 1].get(layer, ()) if i else ()
            source = self.streams[i - 1] if receivers else None
            if source is not None:
                heads = with_heads(
                    trace.heads[layer][sites],
                    receivers,
                    recompute(trace, layer, receivers, source, sites),
                )
                attended = trace.layers[layer].self_attn.o_proj(heads.flatten(-2))
                self.macs += self._recompute_macs(len(receivers), heads.shape[1])
                if self.streams[i] is None:
                    self.streams[i] = trace.residual[layer][sites]
            if self.streams[i] is not None:
                self.streams[i] = self.streams[i] + attended

    def _enter(self, layer: int, heads: Sequence[int]) -> None:
        """Begin the rows of a layer's heads, in all streams."""
        if not heads:
            return
        trace = self.trace
        sites = self._sites(0)
        clean, other = trace.heads[layer][sites], trace.other[layer][sites]
        swap = mx.eye(trace.num_heads)[mx.array(heads)][:, None, :, None]
        outputs = mx.where(swap > 0, other, clean).flatten(-2)
        entering = trace.layers[layer].self_attn.o_proj(outputs)
        self.macs += outputs.size * trace.model.args.hidden_size
        for i, stream in enumerate(self.streams):
            sites = self._sites(i)
            rows = trace.residual[layer][sites] + (
                entering if i == 0 else trace.attended[layer][sites]
            )
            rows = mx.broadcast_to(rows, (len(heads), *rows.shape[-2:]))
            if stream is not None:
                self.streams[i] = mx.concatenate([stream, rows])
            elif i == 0:
                self.streams[i] = rows
        self.count += len(heads)

    def _feed_forward(self, layer: int) -> None:
        for i, stream in enumerate(self.streams):
            if stream is None or not self._is_read(i, layer):
                continue
            n, sites, _ = stream.shape
            self.macs += n * sites * self.trace.mlp_macs
            block = max(1, MLP_TOKENS // sites)
            parts = []
            for start in range(0, n, block):
                parts.append(after_mlp(self.trace.layers[layer], stream[start : start + block]))
                mx.eval(parts[-1])
            self.streams[i] = mx.concatenate(parts)

    def _recompute_macs(self, receivers: int, queries: int) -> int:
        trace = self.trace
        keys = trace.length + len(trace.sites)
        linear = len(trace.sites) * trace.projection_macs
        return self.count * (linear + 2 * receivers * queries * keys * trace.head_dim)


def with_heads(clean: mx.array, heads: Sequence[int], outputs: mx.array) -> mx.array:
    """Heads' outputs ``[Q, H, D]`` with some replaced by ``[n, Q, len(heads), D]``."""
    rows = mx.broadcast_to(clean, (len(outputs), *clean.shape))
    place = mx.array(heads)[None, None, :, None]
    return mx.put_along_axis(rows, mx.broadcast_to(place, outputs.shape), outputs, axis=2)


def recompute(
    trace: Trace, layer: int, heads: Sequence[int], residual: mx.array, sites: slice
) -> mx.array:
    """Outputs of some heads where the layer reads other residuals at the sites.

    Keys and values of all other positions are the clean run's.

    Args:
        residual: ``[n, P, hidden]``, float32.
        sites: at which of them the outputs are wanted.

    Returns:
        ``[n, Q, len(heads), D]``, float32.
    """
    block = trace.layers[layer]
    attention = block.self_attn
    x = block.input_layernorm(residual)
    q = split_heads(attention.q_proj(x), attention.n_heads)
    q = at_positions(trace, attention, attention.q_norm(q))[:, :, sites]
    k = split_heads(attention.k_proj(x), attention.n_kv_heads)
    k = at_positions(trace, attention, attention.k_norm(k))
    v = split_heads(attention.v_proj(x), attention.n_kv_heads)

    group = attention.n_heads // attention.n_kv_heads
    outputs = []
    for head in heads:
        kv = head // group
        keys, values = clean_keys_and_values(trace, layer, kv)
        Q = q.shape[2]
        rows = max(1, SCORES_BYTES // (4 * Q * (len(keys) + k.shape[2])))
        parts = []
        for start in range(0, len(q), rows):
            part = slice(start, start + rows)
            scores = mx.concatenate([q[part, head] @ keys.T, q[part, head] @ k[part, kv].mT], -1)
            scores = mx.where(visible(trace, sites), scores * attention.scale, -mx.inf)
            weights = mx.softmax(scores, -1)
            far, near = weights[..., : len(keys)], weights[..., len(keys) :]
            parts.append(far @ values + near @ v[part, kv])
            mx.eval(parts[-1])
        outputs.append(mx.concatenate(parts))
    return mx.stack(outputs, 2)


def split_heads(x: mx.array, count: int) -> mx.array:
    """``[n, P, count * D]`` to ``[n, count, P, D]``."""
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def at_positions(trace: Trace, attention, x: mx.array) -> mx.array:
    """RoPE at the positions of the sites; x ``[n, heads, P, D]``."""
    parts = [attention.rope(x[:, :, a:b], offset=start) for a, b, start in trace.segments]
    return mx.concatenate(parts, 2)


def clean_keys_and_values(trace: Trace, layer: int, kv: int) -> tuple[mx.array, mx.array]:
    """A KV head's keys and values of the whole text ``[T, D]``, float32."""
    cache = trace.cache[layer]
    keys, values = (x[0, kv, : trace.length] for x in (cache.keys, cache.values))
    return keys.astype(mx.float32), values.astype(mx.float32)


def visible(trace: Trace, sites: slice) -> mx.array:
    """Which keys the sites see, of the text's and then of the sites' own: bool ``[Q, T + P]``."""
    own = mx.array(trace.sites)
    at = own[sites][:, None]
    text = mx.arange(trace.length)
    is_site = (text[:, None] == own).any(1)
    return mx.concatenate([(text <= at) & ~is_site, own <= at], -1)
