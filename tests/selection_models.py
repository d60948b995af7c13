"""Qwen3 models for the tests of selection: random ones, one built by hand, one in float64."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from checkpoint_files import QWEN3, write_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tiny import VOCABULARY, write_tokenizer

from mlx_hydra.select.probes import Pair


def random_model(seed: int = 0, scale: float = 1.0, **changes) -> qwen3.Model:
    """A model in which every head has a say in every later one."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**QWEN3, **sizes, **changes}))
    rng = np.random.default_rng(seed)
    weights = []
    for name, x in sorted(tree_flatten(model.parameters())):
        normal = rng.standard_normal(x.shape)
        if "norm" in name:
            value = 1 + 0.2 * normal
        elif "embed" in name:
            value = normal
        else:
            value = scale * normal / np.sqrt(x.shape[-1])
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    model.eval()
    return model


def random_pair(seed: int = 0, length: int = 40, answer: int = 3, places=(9, 20)) -> Pair:
    """Random tokens with two stretches swapped, each as long as the answer."""
    rng = np.random.default_rng(seed)
    prompt, other = rng.integers(0, 30, length).tolist(), None
    other = list(prompt)
    for place in places:
        other[place : place + answer] = rng.integers(30, 61, answer).tolist()
    first = prompt[places[0] : places[0] + answer]
    return Pair(prompt, other, first, other[places[0] : places[0] + answer], "single")


class Reference:
    """Qwen3 in float64 NumPy over all tokens, one run a question, as the papers write it."""

    def __init__(self, model: qwen3.Model):
        self.args = model.args
        self.w = {n: np.array(x, dtype=np.float64) for n, x in tree_flatten(model.parameters())}

    def norm(self, x, name):
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + self.args.rms_norm_eps)
        return x / rms * self.w[name]

    def rope(self, x):
        T, D = x.shape[1:]
        angle = np.arange(T)[:, None] * self.args.rope_theta ** (-np.arange(0, D, 2) / D)
        a, b = x[..., : D // 2], x[..., D // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def heads(self, x, layer):
        """The heads' outputs [T, H, D] and attention weights [H, T, T]."""
        a, p = self.args, f"model.layers.{layer}.self_attn."
        x = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")

        def project(name, count):
            return (x @ self.w[f"{p}{name}.weight"].T).reshape(len(x), count, -1).swapaxes(0, 1)

        H, K = a.num_attention_heads, a.num_key_value_heads
        q = self.rope(self.norm(project("q_proj", H), f"{p}q_norm.weight"))
        k = self.rope(self.norm(project("k_proj", K), f"{p}k_norm.weight"))
        v = project("v_proj", K)
        k, v = np.repeat(k, H // K, 0), np.repeat(v, H // K, 0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(a.head_dim)
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ v).swapaxes(0, 1), weights

    def run(self, tokens, used=None):
        """The final residual, and each layer's heads as computed from what the layer read.

        Args:
            used: the heads' outputs of each layer that go on instead; None for those computed.
        """
        x = self.w["model.embed_tokens.weight"][tokens]
        computed = []
        for layer in range(self.args.num_hidden_layers):
            p = f"model.layers.{layer}."
            computed.append(self.heads(x, layer)[0])
            heads = computed[-1] if used is None else used[layer]
            x = x + heads.reshape(len(x), -1) @ self.w[f"{p}self_attn.o_proj.weight"].T
            h = self.norm(x, f"{p}post_attention_layernorm.weight")
            gate = h @ self.w[f"{p}mlp.gate_proj.weight"].T
            up = h @ self.w[f"{p}mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"{p}mlp.down_proj.weight"].T
        return x, computed

    def readout(self, x, pair):
        """Eq 9 from full logits."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        logits = self.norm(x, "model.norm.weight") @ head.T
        total = weight = 0.0
        for j, (right, wrong) in enumerate(zip(pair.answer, pair.distractor)):
            z = logits[len(pair.prompt) - 1 + j]
            total += 0.9**j * (z[right] - z[wrong])
            weight += 0.9**j
        return total / weight

    def patched(self, pair, layer, head, hops=(), sites=None):
        """The readout with one head from the counterfactual, and all other attention frozen.

        Args:
            hops: lists of (layer, head) that listen one after the other, as path patching has it.
            sites: the positions where heads are swapped or recomputed; None for all.
        """
        tokens = pair.clean_tokens
        clean = self.run(tokens)[1]
        other = self.run(pair.counterfactual_tokens)[1]
        sites = range(len(tokens)) if sites is None else sites
        used = [heads.copy() for heads in clean]
        for t in sites:
            used[layer][t, head] = other[layer][t, head]
        for hop in hops:
            computed = self.run(tokens, used)[1]
            used = [heads.copy() for heads in clean]
            for at, receiver in hop:
                for t in sites:
                    used[at][t, receiver] = computed[at][t, receiver]
        return self.readout(self.run(tokens, used)[0], pair)


# The hand-built model's heads: (layer, head).
PREVIOUS, RETRIEVAL, BYSTANDER = (0, 1), (1, 2), (1, 1)
V, D = VOCABULARY, 64
BUILT_SIZES = {
    "vocab_size": V,
    "hidden_size": 4 * V + 1,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": D,
    "rope_theta": 1e8,
    "tie_word_embeddings": False,
}


def built_weights() -> dict[str, np.ndarray]:
    """Qwen3 weights by which one head retrieves, by construction.

    The residual holds four copies of the vocabulary (the token, the token before, what to say
    next, and a junk yard that nothing reads) and a constant. Head (0, 1) copies the token before.
    Head (1, 2) looks for the place whose token before is the present token, and says what stands
    there. Head (1, 1) looks at the same place and writes what it finds to the junk yard. All
    other heads look everywhere evenly and write nothing. The MLPs write nothing.
    """
    token, before, say, junk = (slice(i * V, (i + 1) * V) for i in range(4))
    constant = 4 * V
    shapes = qwen3.Model(qwen3.ModelArgs.from_dict({**QWEN3, **BUILT_SIZES})).parameters()
    w = {name: np.zeros(x.shape) for name, x in tree_flatten(shapes)}
    for name in w:
        if "norm" in name:
            w[name][:] = 1
    w["model.embed_tokens.weight"][:, token] = np.eye(V)
    w["model.embed_tokens.weight"][:, constant] = 1
    w["lm_head.weight"][:, say] = np.eye(V)

    # RoPE turns the pair (i, i + D/2) by position * theta^(-2i/D): the first pairs tell
    # neighbours apart, the last ones hardly turn and carry what a token is.
    first = "model.layers.0.self_attn."
    turning = range(10)
    for i in turning:
        speed = 1e8 ** (-2 * i / D)
        w[f"{first}q_proj.weight"][1 * D + i, constant] = 1
        # The key is the query turned by one, so that it matches from one position on.
        w[f"{first}k_proj.weight"][0 * D + i, constant] = np.cos(speed)
        w[f"{first}k_proj.weight"][0 * D + i + D // 2, constant] = np.sin(speed)
    w[f"{first}v_proj.weight"][:V, token] = np.eye(V)
    w[f"{first}o_proj.weight"][before, 1 * D : 1 * D + V] = np.eye(V)
    w[f"{first}q_norm.weight"][:] = w[f"{first}k_norm.weight"][:] = 8

    second = "model.layers.1.self_attn."
    still = [i + half for half in (0, D // 2) for i in range(10, D // 2)]
    codes = np.random.default_rng(0).choice([-1.0, 1.0], (V, len(still)))
    for head in (RETRIEVAL[1], BYSTANDER[1]):
        w[f"{second}q_proj.weight"][np.ix_([head * D + i for i in still], range(V))] = codes.T
    for kv in range(2):
        rows = [kv * D + i for i in still]
        w[f"{second}k_proj.weight"][np.ix_(rows, range(V, 2 * V))] = codes.T
        w[f"{second}v_proj.weight"][kv * D : kv * D + V, token] = np.eye(V)
    for head, place in ((RETRIEVAL[1], say), (BYSTANDER[1], junk)):
        w[f"{second}o_proj.weight"][place, head * D : head * D + V] = np.eye(V)
    w[f"{second}q_norm.weight"][:] = w[f"{second}k_norm.weight"][:] = 4
    return w


def built_model() -> qwen3.Model:
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**QWEN3, **BUILT_SIZES}))
    model.load_weights([(n, mx.array(x.astype(np.float32))) for n, x in built_weights().items()])
    return model.eval()


def write_built(folder: Path) -> Path:
    """The hand-built model as a folder, with a tokenizer of made-up words."""
    weights = {n: mx.array(x.astype(np.float32)) for n, x in built_weights().items()}
    write_checkpoint(folder, {**QWEN3, **BUILT_SIZES}, weights)
    write_tokenizer(folder)
    return folder
