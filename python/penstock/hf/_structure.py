# SPDX-License-Identifier: Apache-2.0
"""Finds the experts of a transformers model by their structure, and says how the engine reads them.

transformers 5 keeps the experts of a layer in one module: fused 3-D parameters `gate_up_proj` (or
`up_proj` without a gate) and `down_proj`, optional biases, flags that tell the layout, and a
forward(hidden_states, top_k_index, top_k_weights). Routers, shared experts and losses live outside
and are none of our business: they stay the family's own. Used by _patch.py and _experts.py.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from penstock.hf._gates import Gate, recognise_gated, recognise_plain

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """How the engine reads one experts module, without copying its weights."""

    up: str  # the name of the up-projection's parameter
    gate: Gate
    weight_order: str
    bias: bool

    def settings(self) -> dict[str, Any]:
        """The layout as functional.moe_experts and lora.adapted_experts take it."""
        return {
            "activation": self.gate.activation,
            "gate_layout": self.gate.gate_layout,
            "weight_order": self.weight_order,
            "clamp_alpha": self.gate.clamp_alpha,
            "clamp_limit": self.gate.clamp_limit,
        }

    def describe(self) -> str:
        """The layout in words, for the report."""
        words = [self.gate.activation]
        if self.up == "gate_up_proj":
            words.append(self.gate.gate_layout)
        words.append(self.weight_order)
        if self.bias:
            words.append("bias")
        return ", ".join(words)


class Refusal(NamedTuple):
    """Why a module is left as it is."""

    reason: str


def find_experts(
    model: nn.Module, converted: Container[str] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that hold the experts of a layer, readable by the engine or not.

    converted: names of classes that hold a list of experts, whatever they look like.
    """
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if type(module).__name__ in converted or _holds_experts(name, module):
            inside.update(module.modules())
            yield name, module


def read_layout(module: nn.Module) -> Layout | Refusal:
    """The layout of one experts module, or why the engine cannot take its place."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return Refusal("its experts are a list of modules, and `convert` names no class for it")
    missing = [name for name in ("has_bias", "is_transposed") if not hasattr(module, name)]
    if missing:
        return Refusal(
            "its forward does not follow the experts interface of transformers 5: it has no "
            + " and no ".join(missing)
        )
    if getattr(module, "has_post_expert_norm", False):
        return Refusal("it normalises each expert's output before the routing weights")
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    names = [up, "down_proj"]
    if module.has_bias:
        names += [name + "_bias" for name in names]
    for name in names:
        tensor = getattr(module, name, None)
        if not isinstance(tensor, torch.Tensor):
            return Refusal(f"it has no parameter {name}")
        if tensor.dtype not in DTYPES:
            return Refusal(f"{name} is quantised ({str(tensor.dtype).removeprefix('torch.')})")
    gate = recognise_gated(module) if up == "gate_up_proj" else recognise_plain(module.act_fn)
    if gate is None:
        return Refusal("its activation is none of the engine's")
    order = "input_major" if module.is_transposed else "output_major"
    return Layout(up, gate, order, bool(module.has_bias))


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Fused experts have several parameters with the experts as first axis; a list has children."""
    if name.rpartition(".")[2] == "experts" and any(True for _ in module.parameters()):
        return True
    fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return len(fused) >= 2 and len({p.shape[0] for p in fused}) == 1
