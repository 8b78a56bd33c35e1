# SPDX-License-Identifier: Apache-2.0
"""The routers as torch.library operators, with autograd; as _torch_ops.py is for the experts.

`router` and `numbers` are RouterSpec.pack() and .numbers(), `context` is CallContext.pack. Outputs
that a router with a fixed K has none of (token_offsets, report) are tensors of no elements.
Imported by routers.py at the first call with a torch tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock import _engine_route
from penstock._context import CallContext
from penstock._engine_route import REPORT_SIZE, Routed, RouterSpec
from penstock._torch_ops import or_absent, refuse_second_order


@torch.library.custom_op("penstock::route", mutates_args=())
def route(
    logits: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    slots: int,
    router: str,
    numbers: list[float],
    context: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and int32 ids, (T, K) or (slots), then token_offsets (T+1) and the report."""
    spec = RouterSpec.unpack(router, numbers)
    routed = _engine_route.route(logits, spec, slots, (bias, seed), CallContext.unpack(context))
    ids = routed.ids
    return routed.scores, ids, *(or_absent(array, ids) for array in routed[2:])


@route.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    slots: int,
    router: str,
    numbers: list[float],
    context: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = RouterSpec.unpack(router, numbers)
    fixed = spec.fixed_top_k()
    shape = (logits.shape[0], spec.top_k) if fixed else (slots,)
    ids = logits.new_empty(shape, dtype=torch.int32)
    offsets = ids.new_empty((0 if fixed else logits.shape[0] + 1,))
    return logits.new_empty(shape), ids, offsets, ids.new_empty((0 if fixed else REPORT_SIZE,))


@torch.library.custom_op("penstock::replay", mutates_args=())
def replay(
    logits: Tensor,
    ids: Tensor,
    token_offsets: Tensor | None,
    router: str,
    numbers: list[float],
    context: str,
) -> Tensor:
    """Scores of the given ids, in their shape."""
    spec = RouterSpec.unpack(router, numbers)
    given = Routed(None, ids, token_offsets)
    return _engine_route.replay(logits, spec, given, CallContext.unpack(context))


@replay.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    token_offsets: Tensor | None,
    router: str,
    numbers: list[float],
    context: str,
) -> Tensor:
    return logits.new_empty(ids.shape)


@torch.library.custom_op("penstock::route_backward", mutates_args=())
def route_backward(
    dscores: Tensor,
    logits: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    token_offsets: Tensor | None,
    num_experts: int,
    router: str,
    numbers: list[float],
    context: str,
) -> Tensor:
    """The logits' gradient (T, E)."""
    saved = (logits, Routed(scores, ids, token_offsets))
    spec = RouterSpec.unpack(router, numbers)
    return _engine_route.route_backward(
        dscores.contiguous(), saved, num_experts, spec, CallContext.unpack(context)
    )


@route_backward.register_fake
def _(
    dscores: Tensor,
    logits: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    token_offsets: Tensor | None,
    num_experts: int,
    router: str,
    numbers: list[float],
    context: str,
) -> Tensor:
    return scores.new_empty(((scores if logits is None else logits).shape[0], num_experts))


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


route.register_autograd(_route_grad, setup_context=_route_setup)
replay.register_autograd(_replay_grad, setup_context=_replay_setup)
route_backward.register_autograd(refuse_second_order("route_backward"))
