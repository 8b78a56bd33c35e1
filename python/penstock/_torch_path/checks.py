# SPDX-License-Identifier: Apache-2.0
"""What the experts' call must satisfy before a torch operation runs, and what is refused by name.

The engine's core makes the same checks of its own calls. torch would broadcast a bias of the wrong
shape, and report a wrong matrix in terms of a product that the caller never wrote. Read only.
Called by _torch_path/__init__.py; dtypes and devices of the weights are functional.py's to check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock._context import torch_refusal
from penstock._engine import Config, Plan, Weights, check_rank
from penstock._torch_path.activations import ACTIVATIONS, accumulator
from penstock.errors import invalid

_CHOICES = {
    "activation": ACTIVATIONS,
    "gate_layout": ("concatenated", "interleaved"),
    "weight_order": ("output_major", "input_major"),
    "save": ("preactivation", "input", "nothing"),
}


def check_experts(
    operands: tuple[Tensor, Tensor | None, Weights], plan: Plan, config: Config, trainable: Any
) -> None:
    """ValueError unless names, shapes and dtypes fit together; operands is (x, scores, weights)."""
    x, scores, weights = operands
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise invalid(name, repr(getattr(config, name)), _one_of(choices), "Check the spelling")
    check_dtype("x", x, (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    check_rank("x", x, 2, "(num_tokens, hidden_size)")
    check_rank("w2", weights.w2, 3, "(num_experts, rows, columns)")
    _check_halves(weights, config)
    for name, shape in _expected_shapes(x, weights, config).items():
        tensor = getattr(weights, name)
        if tensor is not None:
            check_shape(name, tensor, shape)
    num_experts = weights.w2.shape[0]
    check_shape("expert_counts", plan.expert_counts, (num_experts,))
    check_shape("expert_offsets", plan.expert_offsets, (num_experts + 1,))
    for name in ("expert_counts", "expert_offsets"):
        check_dtype(name, getattr(plan, name), (torch.int32,))
    if scores is not None:
        slots = x.shape[0] if plan.dispatched else plan.slot_to_row.shape[0]
        check_shape("scores", scores, (slots,))
        check_dtype("scores", scores, (accumulator(x.dtype),))
    if trainable is not None:
        check_shape("trainable", trainable, (num_experts,))
        check_dtype("trainable", trainable, (torch.uint8, torch.bool))


def refuse_seams(config: Config, seams: tuple[Any, bool, Any]) -> None:
    """UnsupportedError for what only the engine does; seams is (trainable, main_grad, delayed)."""
    _, main_grad, delayed = seams
    if main_grad:
        raise torch_refusal("main_grad", "True", "Leave it out: autograd fills .grad")
    if delayed is not None:
        raise torch_refusal(
            "delayed", "a DelayedWeightGrads", "Leave it out: backward computes every gradient"
        )
    if config.order != "fast":
        raise torch_refusal(
            "order", repr(config.order), 'Use "fast", and save="input" to keep less between passes'
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has the shape."""
    if tuple(tensor.shape) != shape:
        raise invalid(name, f"shape {tuple(tensor.shape)}", shape, "Check what made it")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless the tensor has one of the dtypes."""
    if tensor.dtype not in dtypes:
        raise invalid(f"dtype of {name}", tensor.dtype, _one_of(dtypes), "Convert it")


def _check_halves(weights: Weights, config: Config) -> None:
    if weights.w1_up is None:
        if weights.b1_up is not None:
            raise invalid("b1", "a pair beside one w1", "one tensor", "Pass both as pairs, or none")
        return
    if config.halves == 1:
        raise invalid("w1", f"a pair for {config.activation}", "one tensor", "It has no gate")
    if (weights.b1 is None) != (weights.b1_up is None):
        raise invalid("b1", "one tensor beside a pair of w1", "a pair", "Pass both as pairs")


def _expected_shapes(x: Tensor, weights: Weights, config: Config) -> dict[str, tuple[int, ...]]:
    hidden_size, num_experts = x.shape[1], weights.w2.shape[0]
    output_major = config.weight_order == "output_major"
    intermediate_size = weights.w2.shape[2 if output_major else 1]
    rows = intermediate_size * (config.halves if weights.w1_up is None else 1)

    def matrices(outputs: int, inputs: int) -> tuple[int, ...]:
        return (num_experts, *((outputs, inputs) if output_major else (inputs, outputs)))

    return {
        "w1": matrices(rows, hidden_size),
        "w1_up": matrices(intermediate_size, hidden_size),
        "w2": matrices(hidden_size, intermediate_size),
        "b1": (num_experts, rows),
        "b1_up": (num_experts, intermediate_size),
        "b2": (num_experts, hidden_size),
    }


def _one_of(choices: Any) -> str:
    return "one of " + ", ".join(map(str, choices))
