# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters on experts, computed in the grouped products.

PEFT adapts fused experts (LoraConfig.target_parameters) by wrappers around the experts module, one
inside another, each for one parameter; its own forward adds B A to the whole weight, expert by
expert, at every call. Here the outermost wrapper's forward hands the factors to the engine instead.
Everything else stays PEFT's: the parameters and their layout, saving and loading, switching,
merging. lora_A.weight is (E r, inputs), the expert slowest; lora_B.weight (outputs, r E), the
expert fastest. Wrappers are known by their structure, and PEFT is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penstock import lora
from penstock.hf._experts import compute_dtype, layout_of, parameters_of, scores_of
from penstock.hf._structure import Layout
from penstock.lora import Adapters


def is_wrapper(module: nn.Module) -> bool:
    """Whether the module is PEFT's wrapper of one parameter."""
    return all(hasattr(module, name) for name in ("base_layer", "parameter_name", "lora_A"))


def wrappers_of(module: nn.Module) -> list[nn.Module]:
    """The wrappers from this one inwards."""
    chain = []
    while is_wrapper(module):
        chain.append(module)
        module = module.base_layer
    return chain


def adapted_forward(
    wrapper: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """experts_forward of the wrapped module with its active adapters.

    Where PEFT would not add adapters (disabled, merged, none active), or the engine cannot (a
    weight is trained besides), PEFT's own forward runs.
    """
    chain = wrappers_of(wrapper)
    base = chain[-1].base_layer
    layout = layout_of(base)
    dtype = compute_dtype(hidden_states)
    w1, w2, b1, b2 = weights = parameters_of(base, layout, dtype)
    adapters = active_adapters(chain, layout, dtype)
    trained = torch.is_grad_enabled() and any(
        weight is not None and weight.requires_grad for weight in weights
    )
    if adapters is None or trained:
        return type(wrapper).forward(wrapper, hidden_states, top_k_index, top_k_weights)
    output = lora.adapted_experts(
        hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype),
        w1,
        w2,
        scores_of(top_k_weights, dtype),
        top_k_index,
        adapters=adapters,
        b1=b1,
        b2=b2,
        **layout.settings(),
    )
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)


def active_adapters(chain: list[nn.Module], layout: Layout, dtype: torch.dtype) -> Adapters | None:
    """The factors of all active adapters, those of one projection joined along the rank."""
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {layout.up: [], "down_proj": []}
    for wrapper in chain:
        if wrapper.disable_adapters or wrapper.merged or wrapper.parameter_name not in factors:
            return None
        num_experts = wrapper.num_experts
        for name in wrapper.active_adapters:
            if name not in wrapper.lora_A:
                continue
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            a = a.to(dtype).reshape(num_experts, -1, a.shape[-1])
            b = b.to(dtype).reshape(b.shape[0], -1, num_experts) * wrapper.scaling[name]
            if _factors_are_exchanged(wrapper, layout):
                a, b = b.permute(2, 1, 0).contiguous(), a.transpose(1, 2)
            else:
                b = b.permute(2, 0, 1).contiguous()
            factors[wrapper.parameter_name].append((a, b))
    if not any(factors.values()):
        return None
    joined: list[Any] = []
    for pairs in factors.values():
        if not pairs:
            joined += [None, None]
            continue
        joined += [torch.cat([a for a, _ in pairs], 1), torch.cat([b for _, b in pairs], 2)]
    return Adapters(*joined)


def _factors_are_exchanged(wrapper: nn.Module, layout: Layout) -> bool:
    """Whether lora_A spans the outputs and lora_B the inputs, as versions before 0.20 have it.

    Such a version takes the parameter's second axis for the inputs unless it swaps them; which of
    the two it is in truth depends on the order of the weights.
    """
    a_spans_the_last_axis = wrapper._did_swap_in_out_features
    inputs_are_the_last_axis = layout.weight_order == "output_major"
    return a_spans_the_last_axis != inputs_are_the_last_axis
