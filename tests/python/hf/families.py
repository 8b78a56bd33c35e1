# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the supported families, built by transformers' own classes.

One table, FAMILIES: model type and what its configuration needs beyond COMMON. Each has at least
8 experts a layer. Used by every test of tests/python/hf; docs/hf.md's matrix has a row for each.
"""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.7,
}
FAMILIES: dict[str, dict] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "qwen3_next": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "olmoe": {"num_experts": 8, "num_key_value_heads": 4},
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": {**_MLA, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 16, "sliding_window": 16},
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "head_dim": 16,
        "routed_scaling_factor": 1.5,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "phimoe": {"num_local_experts": 8},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "nemotron_h": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["moe", "attention"],
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
}
# phimoe's router masks logits by thresholds of its own besides topk, so that its choices in fp32
# cannot be imposed on a bf16 run.
_THRESHOLDS = {"phimoe"}
_KNOWN = set(CONFIG_MAPPING.keys())  # older versions of transformers lack the newest families
FAMILIES = {family: changes for family, changes in FAMILIES.items() if family in _KNOWN}
BF16_FAMILIES = [family for family in FAMILIES if family not in _THRESHOLDS]


def tiny_model(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A random model of `family` in fp32, with transformers' eager attention and experts."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):  # families start these at zero, where a mistake would not show
            torch.nn.init.normal_(tensor, std=0.1)
    model.config._experts_implementation = "eager"
    return model.eval()


def tokens(seed: int = 0, shape: tuple[int, int] = (2, 24)) -> torch.Tensor:
    """Random token ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, shape, generator=generator)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative L2 distance, 0 for two zeros."""
    difference = (value.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if difference else 0.0
