# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a module that calls its experts one by one, with the list brought together.

Where a module loops over a list, nothing says which expert got which token but the loop itself. So
a converter says it: a function in the place of the module's forward, which calls all experts at
once. Used by _patch.py; CONVERTERS holds those of transformers 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from penstock.hf._experts import compute_dtype, run_experts, under_autocast
from penstock.hf._freeze import trainable_of
from penstock.hf._lists import FusedList

# converter(module, experts, *args, **kwargs) returns what module.forward(*args, **kwargs) did;
# experts(hidden_states (..., d), top_k_index (T, K), top_k_weights (T, K)) is the sum over a
# token's experts, weights included, an id at or above the number of experts skipping its slot.
Converter = Callable[..., Any]

_STATE = "_penstock_list"


def switch_experts(
    module: nn.Module,
    experts: Callable[..., Tensor],
    hidden_states: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """Switch Transformers: hidden_states (T, d), a one-hot mask (T, 1, E), weights (T, 1).

    The row of a token past its expert's capacity is zero: it goes to no expert.
    """
    skipped = selected_experts.new_full((), len(module))
    ids = selected_experts.argmax(-1).where(selected_experts.any(-1), skipped)
    return experts(hidden_states, ids, routing_weights)


CONVERTERS: dict[str, Converter] = {"SwitchTransformersExperts": switch_experts}


class Conversion:
    """What a converted module keeps: its experts' weights in one place, and its converter."""

    def __init__(self, weights: FusedList, converter: Converter) -> None:
        self.weights = weights
        self.converter = converter


def converted_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's forward by its converter."""
    conversion = conversion_of(module)
    experts = functools.partial(_all_experts, module, conversion.weights)
    return conversion.converter(module, experts, *args, **kwargs)


def conversion_of(module: nn.Module) -> Conversion | None:
    """The conversion of a converted module, else None."""
    return module.__dict__.get(_STATE)


def remember_conversion(module: nn.Module, conversion: Conversion) -> None:
    """Keep the conversion on the module."""
    module.__dict__[_STATE] = conversion


def forget_conversion(module: nn.Module) -> None:
    """Let go of it. The experts' parameters stay views of the fused tensors."""
    module.__dict__.pop(_STATE, None)


def _all_experts(
    module: nn.Module,
    fused: FusedList,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    weights = under_autocast(fused.weights(), compute_dtype(hidden_states))
    mask, chosen = fused.trainable(), trainable_of(module)
    if mask is None or chosen is None:
        mask = chosen if mask is None else mask
    else:
        mask = mask * chosen
    return run_experts(hidden_states, (top_k_index, top_k_weights), weights, fused.layout, mask)
