"""HydraHead in plain PyTorch: loops over tokens and heads, no cache, clarity before speed.

Written from the mathematics alone (docs/architecture.md), never from mlx_hydra, so that the two
can check each other. Heads are in the teacher's order and tensors have their Hugging Face names.
Everything is computed in the dtype of the weights; the golden logits use float64.
"""

import math

import torch
from torch.nn import functional


def logits(config, weights, tokens):
    """tokens [B, T] -> logits [B, T, vocab]; weights maps Hugging Face names to tensors."""
    return torch.stack([sequence_logits(config, weights, sequence) for sequence in tokens])


def sequence_logits(config, weights, tokens):
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        w = under(weights, f"model.layers.{layer}.")
        h = rms_norm(x, eps) * w["input_layernorm.weight"]
        x = x + attention(config, layer, under(w, "self_attn."), h)
        h = rms_norm(x, eps) * w["post_attention_layernorm.weight"]
        x = x + mlp(under(w, "mlp."), h)
    x = rms_norm(x, eps) * weights["model.norm.weight"]
    tied = config["tie_word_embeddings"]
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def attention(config, layer, w, x):
    """x [T, hidden] -> [T, hidden]: both branches, fusion, output projection."""
    full_heads, linear_heads = split_heads(config, layer)
    norm, eps = config["fusion"]["norm"], config["fusion"]["eps"]
    outputs = {}
    if full_heads:
        o, gate = full_branch(config, full_heads, under(w, "full."), x)
        for i, head in enumerate(full_heads):
            o_head = rms_norm(o[:, i], eps) if norm is True else o[:, i]
            outputs[head] = o_head * gate[:, i]
    if linear_heads:
        o, gate = linear_branch(config, linear_heads, under(w, "linear."), x)
        for i, head in enumerate(linear_heads):
            o_head = o[:, i] if norm is False else rms_norm(o[:, i], eps)
            outputs[head] = o_head * gate[:, i]
    if has_gamma(config, layer):
        outputs = {head: w["fusion.gamma"][head] * o for head, o in outputs.items()}
    return torch.cat([outputs[head] for head in sorted(outputs)], dim=-1) @ w["o_proj.weight"].T


def full_branch(config, heads, w, x):
    """Softmax attention: o and gate, both [T, heads, D]."""
    options, size, eps = config["full_attention"], config["head_dim"], config["rms_norm_eps"]
    kv_heads = used_kv_heads(config, heads)
    q = rms_norm(project(w, "q", x, len(heads)), eps) * w["q_norm.weight"]
    k = rms_norm(project(w, "k", x, len(kv_heads)), eps) * w["k_norm.weight"]
    v = project(w, "v", x, len(kv_heads))
    if options["rope"]:
        q, k = rope(q, config["rope_theta"]), rope(k, config["rope_theta"])
    base = options["log_scale_base"]
    o = torch.zeros_like(q)
    for t in range(len(x)):
        scale = 1.0 if base is None else math.log(t + base) / math.log(base)
        for i, head in enumerate(heads):
            kv = kv_heads.index(teacher_kv_head(config, head))
            scores = k[: t + 1, kv] @ (q[t, i] * scale) * size**-0.5
            o[t, i] = torch.softmax(scores, dim=0) @ v[: t + 1, kv]
    gate = torch.sigmoid(gate_input(w, x, len(heads))) if options["gate"] else torch.ones_like(o)
    return o, gate


def linear_branch(config, heads, w, x):
    """Gated DeltaNet: o and gate, both [T, heads, D]."""
    options, size, eps = config["linear_attention"], config["head_dim"], config["rms_norm_eps"]
    kernel_size = options["conv_kernel_size"]
    q, k, v = (project(w, name, x, len(heads), kernel_size) for name in "qkv")
    q, k = rms_norm(q, eps) * w["q_norm.weight"], rms_norm(k, eps) * w["k_norm.weight"]
    if options["rope"]:
        q, k = rope(q, config["rope_theta"]), rope(k, config["rope_theta"])
    q, k = l2_norm(q) * size**-0.5, l2_norm(k)
    step = functional.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    alpha = torch.exp(-torch.exp(w["A_log"]) * step)
    beta = torch.sigmoid(x @ w["b_proj.weight"].T)
    o = torch.zeros_like(v)
    for i in range(len(heads)):
        state = torch.zeros(size, size, dtype=x.dtype)
        o[:, i], _ = delta_rule(q[:, i], k[:, i], v[:, i], alpha[:, i], beta[:, i], state)
    gate = functional.silu(gate_input(w, x, len(heads))) if options["gate"] else torch.ones_like(o)
    return o, gate


def delta_rule(q, k, v, alpha, beta, state):
    """One head: q, k [T, Dk], v [T, Dv], alpha, beta [T], state [Dv, Dk] -> y [T, Dv], state."""
    y = torch.zeros_like(v)
    for t in range(len(q)):
        state = alpha[t] * state
        state = state + beta[t] * torch.outer(v[t] - state @ k[t], k[t])
        y[t] = state @ q[t]
    return y, state


def convolve(taps, x):
    """silu of the causal depthwise convolution of x [T, channels]; the last tap is now."""
    kernel_size = taps.shape[1]
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for tap in range(kernel_size):
            source = t - (kernel_size - 1) + tap
            if source >= 0:
                out[t] += taps[:, tap] * x[source]
    return functional.silu(out)


def rope(x, theta):
    """Rotate-half RoPE of x [T, heads, D], positions from 0."""
    half = x.shape[-1] // 2
    out = torch.zeros_like(x)
    for t in range(len(x)):
        angle = t * theta ** (-torch.arange(half, dtype=x.dtype) / half)
        cos, sin = angle.cos(), angle.sin()
        first, second = x[t, :, :half], x[t, :, half:]
        out[t] = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return out


def mlp(w, x):
    gate = functional.silu(x @ w["gate_proj.weight"].T)
    return (gate * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T


def project(w, name, x, num_heads, kernel_size=None):
    x = x @ w[f"{name}_proj.weight"].T
    if kernel_size is not None:
        x = convolve(w[f"{name}_conv1d.weight"][:, 0], x)
    return x.reshape(len(x), num_heads, -1)


def gate_input(w, x, num_heads):
    return (x @ w["g_proj.weight"].T + w["g_proj.bias"]).reshape(len(x), num_heads, -1)


def rms_norm(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def l2_norm(x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def under(weights, prefix):
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}


def split_heads(config, layer):
    full = config["full_attention_heads"][layer]
    return full, [head for head in range(config["num_attention_heads"]) if head not in full]


def teacher_kv_head(config, head):
    return head // (config["num_attention_heads"] // config["num_key_value_heads"])


def used_kv_heads(config, heads):
    return sorted({teacher_kv_head(config, head) for head in heads})


def has_gamma(config, layer):
    """A layer of full attention alone is the teacher's, without fusion, unless it is normed."""
    _, linear_heads = split_heads(config, layer)
    return bool(linear_heads) or config["fusion"]["norm"] is True


def tensor_shapes(config):
    """Every tensor of the checkpoint: Hugging Face name -> shape."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    num_heads, vocab = config["num_attention_heads"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        tensors = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "self_attn.o_proj.weight": (hidden, num_heads * size),
        }
        full_heads, linear_heads = split_heads(config, layer)
        if full_heads:
            kv_size = len(used_kv_heads(config, full_heads)) * size
            for name, shape in full_shapes(config, len(full_heads) * size, kv_size).items():
                tensors[f"self_attn.full.{name}"] = shape
        if linear_heads:
            for name, shape in linear_shapes(config, len(linear_heads)).items():
                tensors[f"self_attn.linear.{name}"] = shape
        if has_gamma(config, layer):
            tensors["self_attn.fusion.gamma"] = (num_heads,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    return shapes


def full_shapes(config, q_size, kv_size):
    hidden, size = config["hidden_size"], config["head_dim"]
    shapes = {
        "q_proj.weight": (q_size, hidden),
        "k_proj.weight": (kv_size, hidden),
        "v_proj.weight": (kv_size, hidden),
        "q_norm.weight": (size,),
        "k_norm.weight": (size,),
    }
    if config["full_attention"]["gate"]:
        shapes |= {"g_proj.weight": (q_size, hidden), "g_proj.bias": (q_size,)}
    return shapes


def linear_shapes(config, num_heads):
    hidden, size = config["hidden_size"], config["head_dim"]
    options = config["linear_attention"]
    width = num_heads * size
    shapes = {f"{name}_proj.weight": (width, hidden) for name in "qkv"}
    shapes |= {f"{name}_proj.weight": (num_heads, hidden) for name in "ab"}
    shapes |= {"q_norm.weight": (size,), "k_norm.weight": (size,)}
    shapes |= {"A_log": (num_heads,), "dt_bias": (num_heads,)}
    if options["conv_kernel_size"] is not None:
        for name in "qkv":
            shapes[f"{name}_conv1d.weight"] = (width, 1, options["conv_kernel_size"])
    if options["gate"]:
        shapes |= {"g_proj.weight": (width, hidden), "g_proj.bias": (width,)}
    return shapes
