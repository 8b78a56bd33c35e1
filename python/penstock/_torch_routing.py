# SPDX-License-Identifier: Apache-2.0
"""The routers as torch.library operators, with autograd; as _torch_ops.py is for the experts.

`router` and `numbers` are RouterSpec.pack() and .numbers(), `context` is CallContext.pack. Outputs
that a router with a fixed K has none of (token_offsets, report, plan) are tensors of no elements.
Imported by routers.py at the first call with a torch tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock import _engine_route
from penstock._context import CallContext
from penstock._engine_route import REPORT_SIZE, Routed, RouterSpec
from penstock._torch_library import ROUTER, Group, Signature, differentiate, operator
from penstock._torch_ops import or_absent, refuse_second_order

PLAN_ARRAYS = 5  # of Plan: those that are the plan's own

_Router = tuple[RouterSpec, CallContext]  # what ROUTER's arguments mean
_STATE = Group("Tensor? bias, Tensor? seed", lambda *state: state)


def _route_fake(logits: Tensor, state: Any, slots: int, router: _Router) -> tuple[Tensor, ...]:
    spec, _ = router
    fixed = spec.fixed_top_k()
    shape = (logits.shape[0], spec.top_k) if fixed else (slots,)
    ids = logits.new_empty(shape, dtype=torch.int32)
    num_tokens, num_experts = logits.shape
    sizes = (num_tokens + 1, REPORT_SIZE, num_experts, num_experts + 1, slots, slots, slots)
    others = (ids.new_empty((0 if fixed else size,)) for size in sizes)
    return logits.new_empty(shape), ids, *others


@operator(
    "route",
    Signature(Group("Tensor logits"), _STATE, Group("SymInt slots"), ROUTER),
    2 + 2 + PLAN_ARRAYS,
    _route_fake,
)
def route(
    logits: Tensor, state: tuple[Tensor | None, Tensor | None], slots: int, router: _Router
) -> tuple[Tensor, ...]:
    """Scores and ids, (T, K) or (slots), then token_offsets (T+1), report, the plan's arrays."""
    spec, context = router
    routed = _engine_route.route(logits, spec, slots, state, context)
    ids = routed.ids
    arrays = (None,) * PLAN_ARRAYS if routed.plan is None else routed.plan[:PLAN_ARRAYS]
    others = (routed.token_offsets, routed.report, *arrays)
    return routed.scores, ids, *(or_absent(array, ids) for array in others)


@operator(
    "replay",
    Signature(Group("Tensor logits"), Group("Tensor ids"), Group("Tensor? token_offsets"), ROUTER),
    1,
    lambda logits, ids, token_offsets, router: logits.new_empty(ids.shape),
)
def replay(logits: Tensor, ids: Tensor, token_offsets: Tensor | None, router: _Router) -> Tensor:
    """Scores of the given ids, in their shape."""
    spec, context = router
    return _engine_route.replay(logits, spec, Routed(None, ids, token_offsets), context)


def _route_backward_fake(
    dscores: Tensor, logits: Tensor | None, routed: Routed, num_experts: int, router: _Router
) -> Tensor:
    scores = routed.scores
    return scores.new_empty(((scores if logits is None else logits).shape[0], num_experts))


@operator(
    "route_backward",
    Signature(
        Group("Tensor dscores"),
        Group("Tensor? logits"),
        Group("Tensor scores, Tensor ids, Tensor? token_offsets", Routed),
        Group("SymInt num_experts"),
        ROUTER,
    ),
    1,
    _route_backward_fake,
)
def route_backward(
    dscores: Tensor, logits: Tensor | None, routed: Routed, num_experts: int, router: _Router
) -> Tensor:
    """The logits' gradient (T, E)."""
    spec, context = router
    saved = (logits, routed)
    return _engine_route.route_backward(dscores.contiguous(), saved, num_experts, spec, context)


def _save(ctx: Any, logits: Tensor, routed: tuple[Tensor, Tensor, Tensor | None]) -> None:
    spec = RouterSpec.unpack(ctx.router, ctx.numbers)
    ctx.num_experts = logits.shape[1]
    offsets = None if spec.fixed_top_k() else routed[2]
    ctx.save_for_backward(logits if spec.needs_logits() else None, *routed[:2], offsets)


def _logits_grad(ctx: Any, dscores: Tensor) -> Tensor:
    return route_backward(
        dscores, *ctx.saved_tensors, ctx.num_experts, ctx.router, ctx.numbers, ctx.context
    )


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, _, ctx.router, ctx.numbers, ctx.context = inputs
    _save(ctx, logits, output[:3])


def _route_grad(ctx: Any, dscores: Tensor, *others: Any) -> tuple[Any, ...]:
    return (_logits_grad(ctx, dscores), *((None,) * 6))


def _replay_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ids, offsets, ctx.router, ctx.numbers, ctx.context = inputs
    _save(ctx, logits, (output, ids, offsets))


def _replay_grad(ctx: Any, dscores: Tensor) -> tuple[Any, ...]:
    return (_logits_grad(ctx, dscores), *((None,) * 5))


differentiate(route, _route_grad, _route_setup)
differentiate(replay, _replay_grad, _replay_setup)
refuse_second_order(route_backward)
