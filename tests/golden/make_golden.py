"""Write the golden files beside this script: small models and their outputs, made with PyTorch.

    python tests/golden/make_golden.py

Versions used: torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0.
The files it writes are committed: torch is never a dependency of the package, nor of `make test`.
Seeds are fixed. Another version or machine may differ in the last bits of the outputs.
"""

import json
from pathlib import Path

import hydrahead_torch
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

HERE = Path(__file__).resolve().parent

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN3_VARIANTS = {
    "qwen3_tied": {
        "num_attention_heads": 8,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3_untied": {
        "num_attention_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3_yarn": {  # smaller, to keep the files under 3 MB
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1e4, **YARN},
    },
}

HYDRAHEAD_VARIANTS = {
    "hydrahead_paper": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "full_attention_heads": [[1], [0, 3], [2]],
        "full_attention": {"rope": False, "log_scale_base": 64, "gate": True},
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": 4,
            "rope": True,
            "gate": True,
        },
        "fusion": {"norm": True, "eps": 1e-6},
    },
    "hydrahead_ragged": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
        "full_attention_heads": [[0, 1, 4], [], [0, 1, 2, 3, 4, 5]],
        "full_attention": {"rope": True, "log_scale_base": None, "gate": False},
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": 4,
            "rope": True,
            "gate": False,
        },
        "fusion": {"norm": "linear", "eps": 1e-5},
    },
    "hydrahead_plain": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "full_attention_heads": [[3], [2, 3], [0]],
        "full_attention": {"rope": True, "log_scale_base": 10, "gate": False},
        "linear_attention": {
            "kind": "gated_delta",
            "conv_kernel_size": 3,
            "rope": False,
            "gate": True,
        },
        "fusion": {"norm": False, "eps": 1e-6},
    },
}


def main():
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for seed, (name, variant) in enumerate(QWEN3_VARIANTS.items()):
        write_qwen3(name, variant, seed=seed)
    write_gated_delta(seed=10)
    for seed, (name, variant) in enumerate(HYDRAHEAD_VARIANTS.items(), start=20):
        write_hydrahead(name, variant, seed=seed)


def write_qwen3(name, variant, seed):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    special = {"bos_token_id": None, "eos_token_id": None, "dtype": "float32"}
    config = Qwen3Config(**{**sizes, **special, **variant})
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.12 * noise)

    tokens = torch.randint(config.vocab_size, (2, 45))
    logits = model(tokens).logits
    cache, steps = None, []
    for t in range(tokens.shape[1]):
        step = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    decode_logits = torch.cat(steps, dim=1)
    assert_close(f"{name}: decode and prefill", decode_logits, logits, 1e-4)
    if config.rope_parameters["rope_type"] == "default":
        check_reference(name, model, tokens, logits)

    model.save_pretrained(HERE / name)
    write_hub_config(HERE / name, config)
    save(name, tokens=tokens.int(), logits=logits, decode_logits=decode_logits)


def write_hub_config(folder, config):
    """The same config in the form of the published Qwen3 checkpoints, before transformers 5."""
    fields = json.loads((folder / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    fields["torch_dtype"] = fields.pop("dtype")
    fields["transformers_version"] = "4.51.0"
    fields.pop("layer_types")
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    if Qwen3Config.from_dict(json.loads(text)).rope_parameters != config.rope_parameters:
        raise AssertionError(f"{folder.name}: the two forms of the config disagree")
    (folder / "config_hub.json").write_text(text)


def check_reference(name, model, tokens, logits):
    """With every head full and no extras, hydrahead_torch is Qwen3 itself."""
    config = model.config.to_dict()
    heads = list(range(config["num_attention_heads"]))
    config |= {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "full_attention_heads": [heads] * config["num_hidden_layers"],
        "full_attention": {"rope": True, "log_scale_base": None, "gate": False},
        "fusion": {"norm": "linear", "eps": 1e-6},
    }
    weights = {}
    for key, weight in model.state_dict().items():
        for part in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            key = key.replace(f"self_attn.{part}", f"self_attn.full.{part}")
        weights[key] = weight.double()
    reference = hydrahead_torch.logits(config, weights, tokens)
    assert_close(f"{name}: hydrahead_torch and transformers", reference, logits, 1e-4)


def write_gated_delta(seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for length in (1, 5, 64, 100):
        case = gated_delta_case(length, generator)
        arrays |= {f"{length}.{key}": array for key, array in case.items()}
    save("gated_delta", **arrays)


def gated_delta_case(length, generator, *, batch=2, heads=3, k_size=16, v_size=24):
    """transformers scales q itself, takes log decays and keeps the state as [B, H, Dk, Dv]."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = functional.normalize(normal(batch, length, heads, k_size), dim=-1)
    k = functional.normalize(normal(batch, length, heads, k_size), dim=-1)
    v = normal(batch, length, heads, v_size)
    log_decay = -torch.exp(1.5 * normal(batch, length, heads) - 2)
    beta = torch.sigmoid(normal(batch, length, heads))
    state = normal(batch, heads, v_size, k_size)

    outputs = []
    for rule in (torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule):
        y, state_out = rule(
            q,
            k,
            v,
            g=log_decay,
            beta=beta,
            initial_state=state.transpose(-1, -2).contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=False,
        )
        outputs.append((y, state_out.transpose(-1, -2)))
    (y, state_out), (y_chunk, state_chunk) = outputs
    assert_close(f"gated_delta {length}: y, chunk and recurrent", y_chunk, y, 2e-5)
    assert_close(f"gated_delta {length}: state, chunk and recurrent", state_chunk, state_out, 2e-5)

    inputs = {"q": q * k_size**-0.5, "k": k, "v": v, "g": log_decay.exp(), "beta": beta}
    y_ours, state_ours = torch.zeros_like(y), torch.zeros_like(state)
    for b in range(batch):
        for h in range(heads):
            y_ours[b, :, h], state_ours[b, h] = hydrahead_torch.delta_rule(
                *(array[b, :, h].double() for array in inputs.values()), state[b, h].double()
            )
    assert_close(f"gated_delta {length}: y, hydrahead_torch", y_ours, y, 2e-5)
    assert_close(f"gated_delta {length}: state, hydrahead_torch", state_ours, state_out, 2e-5)
    return inputs | {"state": state, "y": y, "state_out": state_out}


def write_hydrahead(name, variant, seed):
    generator = torch.Generator().manual_seed(seed)
    config = {
        "model_type": "hydrahead",
        "architectures": ["HydraHeadForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        "head_order": "teacher",
        **variant,
    }
    weights = {
        key: random_weight(key, shape, generator)
        for key, shape in hydrahead_torch.tensor_shapes(config).items()
    }
    tokens = torch.randint(config["vocab_size"], (2, 37), generator=generator)
    exact = {key: weight.double() for key, weight in weights.items()}
    logits = hydrahead_torch.logits(config, exact, tokens).float()

    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save(name, tokens=tokens.int(), logits=logits)


def random_weight(name, shape, generator):
    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    normal = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * normal
    if name.endswith("gamma"):
        return uniform(0.5, 2.0)
    if name.endswith("A_log"):
        return uniform(-1.0, 1.5)
    if name.endswith("dt_bias"):
        return uniform(-2.0, 1.0)
    if name.endswith("g_proj.bias"):
        return 0.5 * normal + 0.5
    if name.endswith("conv1d.weight"):
        return 0.4 * normal
    return 0.2 * normal


def assert_close(what, actual, expected, tolerance):
    error = (actual - expected).abs().max().item()
    if not error < tolerance:
        raise AssertionError(f"{what} differ by {error:.2e}, allowed {tolerance:.0e}")
    print(f"{what}: {error:.1e}")


def save(name, **arrays):
    arrays = {key: array.contiguous() for key, array in arrays.items()}
    save_file(arrays, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    main()
