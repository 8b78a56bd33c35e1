# SPDX-License-Identifier: Apache-2.0
"""The layer in plain torch operations, on whatever device the tensors are.

Chosen by name, penstock.backend("torch"), and never otherwise. The functions are those of
_torch_engine.py, with the same arguments and results; _torch_operations.py chooses between the two.
Gradients are autograd's. What this path does not do is refused by name before anything runs.

Shapes: T tokens, d hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from penstock._context import torch_refusal
from penstock._engine import Config, Plan, Weights, check_router_operands
from penstock._torch_path.activations import accumulator
from penstock._torch_path.checks import check_experts, refuse_seams
from penstock._torch_path.forward import GradientWhere, experts_of_rows, experts_of_tokens
from penstock._torch_path.routing import plan, replay, route

__all__ = ["experts", "logits_and_input", "plan", "replay", "route", "router_logits"]


def _in_given_dtypes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without autocast, as penstock's functions never cast."""

    @wraps(function)
    def call(x: Tensor, *rest: Any) -> Any:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return function(x, *rest)
        with torch.autocast(device, enabled=False):
            return function(x, *rest)

    return call


@_in_given_dtypes
def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (T, E) of x (T, d) and the router's weight (E, d), in fp32 (float64 for float64)."""
    check_router_operands(x, weight)
    wide = accumulator(x.dtype)
    return x.to(wide) @ weight.to(wide).T


def logits_and_input(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and x itself: autograd adds the gradients of its uses."""
    return router_logits(x, weight), x


def experts(
    operands: tuple[Tensor, Tensor | None, Weights],
    plan: Plan,
    config: Config,
    seams: tuple[Any, bool, Any],
) -> Tensor:
    """O (T, d) or, for rows already dispatched, (R_cap, d).

    operands: (x, scores, weights); seams: (trainable, main_grad, delayed), of which only the first
    is known here. With save="input" the whole is computed again in backward (torch's checkpoint).
    """
    x, scores, weights = operands
    trainable = seams[0]
    refuse_seams(config, seams)
    check_experts(operands, plan, config, trainable)
    tensors = [tensor for tensor in (x, scores, *weights) if tensor is not None]
    wants = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wants and config.save == "nothing":
        raise torch_refusal(
            "save",
            '"nothing" for tensors that want gradients',
            'Call it under torch.no_grad(), or pass "preactivation" or "input"',
        )
    # An expert without rows: some versions of torch's grouped product leave its weights' gradient
    # undefined on some GPUs (pytorch/pytorch issue 172439).
    chosen = plan.expert_counts > 0
    if trainable is not None:
        chosen = chosen & trainable.bool()
    if wants:
        weights = Weights(*(_with_gradient_where(weight, chosen) for weight in weights))
    compute = _in_given_dtypes(experts_of_rows if plan.dispatched else experts_of_tokens)
    arguments = (x, scores, weights, plan, config)
    if wants and config.save == "input":
        return checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False)
    return compute(*arguments)


def _with_gradient_where(weight: Tensor | None, chosen: Tensor) -> Tensor | None:
    if weight is None or not weight.requires_grad:
        return weight
    return GradientWhere.apply(weight, chosen)
