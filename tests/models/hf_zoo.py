"""Tiny random models of transformers, several of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 16,
}
LOCAL_GLOBAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

MIXTURE: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
}

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZE),
    "llama-tied-mha": ("Llama", {**SIZE, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {**SIZE, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {**SIZE, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama-llama3-rope": ("Llama", {**SIZE, "rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {**SIZE, "rope_parameters": LINEAR}),
    "llama-yarn-rope": ("Llama", {**SIZE, "rope_parameters": YARN}),
    "llama-dynamic-rope": (
        "Llama",
        {**SIZE, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    ),
    "llama-longrope": ("Llama", {**SIZE, "rope_parameters": LONGROPE}),
    "mistral": ("Mistral", {**SIZE, "sliding_window": None}),
    "mistral-window": ("Mistral", {**SIZE, "sliding_window": 5}),
    "qwen2": ("Qwen2", SIZE),
    "qwen2-tied-mqa": ("Qwen2", {**SIZE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**SIZE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**SIZE, "head_dim": 8}),
    "qwen3-tied-biases": (
        "Qwen3",
        {**SIZE, "head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "gemma": ("Gemma", {**SIZE, "head_dim": 8}),
    "gemma-mqa": ("Gemma", {**SIZE, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {**SIZE, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    "gemma2-scale": (
        "Gemma2",
        {
            **SIZE,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 17,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **SIZE,
            "num_hidden_layers": 7,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3-linear-rope": (
        "Gemma3",
        {
            **SIZE,
            "num_hidden_layers": 7,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "rope_parameters": LOCAL_GLOBAL,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2
            + ["sliding_attention"],
        },
    ),
    "mixtral": ("Mixtral", {**SIZE, "num_local_experts": 5}),
    "mixtral-switch": (
        "Mixtral",
        {**SIZE, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {**SIZE, **MIXTURE, "num_experts": 6, "shared_expert_intermediate_size": 28},
    ),
    "qwen3-moe": ("Qwen3Moe", {**SIZE, **MIXTURE, "head_dim": 8, "num_experts": 6}),
    "qwen3-moe-summed": (
        "Qwen3Moe",
        {**SIZE, **MIXTURE, "head_dim": 8, "num_experts": 4, "norm_topk_prob": True},
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            **SIZE,
            **MIXTURE,
            "head_dim": 8,
            "num_experts": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": (
        "Olmoe",
        {**SIZE, "num_key_value_heads": 6, "num_experts": 6, "num_experts_per_tok": 3},
    ),
    "olmoe-grouped": ("Olmoe", {**SIZE, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe-summed": (
        "Olmoe",
        {
            **SIZE,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": ("GPT2", GPT),
    "gpt2-untied": ("GPT2", {**GPT, "tie_word_embeddings": False, "n_inner": 52}),
    "openai-gpt": ("OpenAIGPT", GPT),
}


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model with weights wild enough that every part of it shows in the logits."""
    return build_of(*ZOO[name], seed)


def build_of(family: str, fields: dict[str, Any], seed: int = 0) -> transformers.PreTrainedModel:
    """One of a family, of any size."""
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    ending = "LMHeadModel" if "GPT" in family else "ForCausalLM"
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**fields)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, family + ending)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            wild = torch.randn_like(parameter) * 0.25
            parameter.copy_(wild if parameter.ndim > 1 else parameter + wild)
    return model.eval()


def save(name: str, folder: Path, seed: int = 0, **options: Any) -> transformers.PreTrainedModel:
    """Build a model and save it as transformers does."""
    model = build(name, seed)
    model.save_pretrained(folder, **options)
    return model


def checkpoint_gradients(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients under the names of a checkpoint, which has a tensor for each expert."""
    spelled = {}
    mixtral = model.config.model_type == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        front, _, leaf = name.rpartition(".")
        if not front.endswith(".experts"):
            spelled[name] = parameter.grad
            continue
        fused = leaf == "gate_up_proj"
        for expert, gradient in enumerate(parameter.grad):
            parts = gradient.chunk(2) if fused else (gradient,)
            for own, part in zip(names[:2] if fused else names[2:], parts, strict=True):
                spelled[f"{front}.{expert}.{own}.weight"] = part
    return spelled
