# SPDX-License-Identifier: Apache-2.0
"""The engine's side of _torch_operations.py: torch tensors into the operators of torch.library.

Operands are given the layout that the engine reads, settings are packed for the operators'
schemas, and what a call keeps for backward is decided here. No arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock import _torch_ops, _torch_routing
from penstock._context import context_key
from penstock._engine import Config, Plan, Weights
from penstock._engine_route import Routed, RouterSpec
from penstock._torch_ops import rows_of_unit_stride
from penstock.routing import Routing


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """functional.router_logits."""
    return _torch_ops.router_logits(rows_of_unit_stride(x), weight, context_key())


def logits_and_input(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """functional.logits_and_input, for x that wants a gradient."""
    return _torch_ops.LogitsAndInput.apply(rows_of_unit_stride(x), weight, context_key())


def route(logits: Tensor, spec: RouterSpec, slots: int, steering: tuple[Any, Any]) -> Routed:
    """What the router of `spec` chooses; slots and steering as in _engine_route.route."""
    arguments = (logits.contiguous(), *steering, slots)
    arrays = _torch_routing.route(*arguments, spec.pack(), spec.numbers(), context_key())
    scores, ids, offsets, report, *plan = arrays
    if spec.fixed_top_k():
        return Routed(scores, ids)
    return Routed(scores, ids, offsets, report, Plan(*plan, offsets))


def replay(logits: Tensor, spec: RouterSpec, given: Routed) -> Tensor:
    """Scores of the given ids, in their shape."""
    arguments = (logits.contiguous(), given.ids, given.token_offsets)
    return _torch_routing.replay(*arguments, spec.pack(), spec.numbers(), context_key())


def plan(routing: Routing, num_experts: int) -> Plan:
    """functional.make_plan."""
    offsets = routing.token_offsets
    sizes = (routing.num_tokens, num_experts)
    arrays = _torch_ops.plan(routing.ids, offsets, *sizes, context_key())
    return Plan(*arrays, offsets, 0 if offsets is not None else max(routing.top_k, 1))


def experts(
    operands: tuple[Tensor, Tensor | None, Weights],
    plan: Plan,
    config: Config,
    seams: tuple[Any, bool, Any],
) -> Tensor:
    """O (T, d), or (R_cap, d) for rows already dispatched.

    operands: (x, scores, weights); seams: (trainable, main_grad, delayed).
    """
    x, scores, weights = operands
    trainable, main_grad, delayed = seams
    x = rows_of_unit_stride(x)
    if trainable is not None and trainable.dtype == torch.bool:
        trainable = trainable.view(torch.uint8)
    tensors = [tensor for tensor in (x, scores, *weights) if tensor is not None]
    if not torch.compiler.is_compiling():
        config = config._replace(kept_h="overwritten")  # by a pass that lets go of the graph
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        config = config._replace(save="nothing")
    elif main_grad or delayed is not None:
        from penstock._seams import Seams, experts_with_seams

        operands = (x, scores, weights)
        return experts_with_seams(operands, plan, config, Seams(main_grad, delayed, trainable))
    output, _ = _torch_ops.experts(
        x, scores, *weights, trainable, *plan, config.pack(), config.clamp, context_key()
    )
    return output
