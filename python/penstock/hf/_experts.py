# SPDX-License-Identifier: Apache-2.0
"""The forward pass that takes the place of an experts module's own.

One function with the signature that transformers' registry asks for. It is bound to a module by
patch(), or called by transformers for `experts_implementation="penstock"`. Weights are used where
they lie; the routing is whatever the family's router chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penstock import functional
from penstock.errors import UnsupportedError
from penstock.hf._freeze import trainable_of
from penstock.hf._structure import Layout, Refusal, read_layout

_LAYOUT = "_penstock_layout"


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sum over a token's experts of top_k_weights times the expert's output.

    hidden_states (..., d), T tokens in all; top_k_index (T, K), where an id at or above the number
    of experts skips its slot; top_k_weights (T, K) of any floating dtype. Returns hidden_states'
    shape and dtype. Under autocast the experts compute in its dtype, as torch's products would.
    Weights with an attribute `main_grad` have their gradients added there (functional.moe_experts).
    """
    layout = layout_of(module)
    dtype = compute_dtype(hidden_states)
    weights = parameters_of(module, layout, dtype)
    routing = (top_k_index, top_k_weights)
    return run_experts(hidden_states, routing, weights, layout, trainable_of(module))


def run_experts(
    hidden_states: Tensor,
    routing: tuple[Tensor, Tensor],
    weights: list[Tensor | None],
    layout: Layout,
    trainable: Tensor | None,
) -> Tensor:
    """experts_forward of weights (w1, w2, b1, b2) in the dtype of the products.

    routing: top_k_index and top_k_weights; trainable: as functional.moe_experts takes it.
    """
    w1, w2, b1, b2 = weights
    dtype = compute_dtype(hidden_states)
    ids, scores = routing
    output = functional.moe_experts(
        hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype),
        w1,
        w2,
        scores_of(scores, dtype),
        ids,
        b1=b1,
        b2=b2,
        trainable=trainable,
        main_grad=any(hasattr(weight, "main_grad") for weight in weights if weight is not None),
        **layout.settings(),
    )
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)


def parameters_of(module: nn.Module, layout: Layout, dtype: torch.dtype) -> list[Tensor | None]:
    """w1, w2, b1, b2 of the module, cast only where autocast asks for another dtype."""
    names = [layout.up, "down_proj"]
    names += [name + "_bias" if layout.bias else None for name in names]
    tensors: list[Any] = [None if name is None else getattr(module, name) for name in names]
    return under_autocast(tensors, dtype)


def under_autocast(weights: list[Any], dtype: torch.dtype) -> list[Tensor | None]:
    """The weights, cast where autocast is on; elsewhere a mix of dtypes stays an error."""
    autocast = torch.is_autocast_enabled(weights[0].device.type)
    return [t.to(dtype) if autocast and t is not None else t for t in weights]


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of the experts' products: autocast's, or that of the hidden states."""
    device = hidden_states.device.type
    if hidden_states.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden_states.dtype
    return torch.get_autocast_dtype(device)


def scores_of(top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The routing weights in the dtype in which the engine takes scores."""
    return top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)


def layout_of(module: nn.Module) -> Layout:
    """The module's layout, read at its first call and kept; UnsupportedError where it has none."""
    layout = module.__dict__.get(_LAYOUT)
    return layout if layout is not None else _read(module)


@torch.compiler.assume_constant_result
def _read(module: nn.Module) -> Layout:
    layout = read_layout(module)
    if isinstance(layout, Refusal):
        raise UnsupportedError(
            f"experts of {type(module).__name__}: got a module that penstock cannot take the place "
            f"of ({layout.reason}), expected fused 3-D experts with an activation of the engine. "
            'Use experts_implementation="eager", or penstock.hf.patch, which leaves such modules '
            "as they are"
        )
    return remember(module, layout)


def remember(module: nn.Module, layout: Layout) -> Layout:
    """Keep the layout on the module."""
    module.__dict__[_LAYOUT] = layout
    return layout


def forget(module: nn.Module) -> None:
    """Remove what remember() kept."""
    module.__dict__.pop(_LAYOUT, None)
