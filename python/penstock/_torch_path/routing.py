# SPDX-License-Identifier: Apache-2.0
"""The softmax routers and the plan in plain torch operations; nothing waits for a device.

The same ids as the engine's, and the same plan wherever that defines it. Scores are differentiable
in the logits, by autograd. Called by _torch_path/__init__.py. T tokens, E experts, K per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock._context import torch_refusal
from penstock._engine import Plan, check_rank, slots_per_token
from penstock._engine_route import Routed, RouterSpec, check_top_k
from penstock._torch_path.checks import check_dtype
from penstock.routing import SOFTMAX_ROUTERS, Routing


def route(logits: Tensor, spec: RouterSpec, slots: int, steering: tuple[Any, Any]) -> Routed:
    """Scores and int32 ids (T, K) of logits (T, E); slots and steering are the other routers'."""
    _check(logits, spec)
    check_top_k(spec.top_k, logits.shape[1])
    # Ascending by the negated logit: a stable sort leaves ties in order of their ids and puts NaN
    # last. One NaN for all, because a sort by bits would tell them apart by their signs.
    keys = (-logits.detach()).masked_fill(logits.isnan(), float("nan"))
    ids = keys.sort(dim=1, stable=True).indices[:, : spec.top_k]
    return Routed(_scores(logits, ids, spec), ids.to(torch.int32))


def replay(logits: Tensor, spec: RouterSpec, given: Routed) -> Tensor:
    """Scores (T, K) of ids that were recorded."""
    _check(logits, spec)
    return _scores(logits, given.ids.long(), spec)


def plan(routing: Routing, num_experts: int) -> Plan:
    """The int32 arrays of functional.make_plan. Rows past the last expert's are the skipped slots.

    row_to_token of a padding slot, which no token has, is the last token.
    """
    ids, num_tokens = routing.ids, routing.num_tokens
    check_rank("ids", ids, 1, "(slots,)")
    check_dtype("ids", ids, (torch.int32, torch.int64))
    top_k = slots_per_token(ids, routing.token_offsets, num_tokens)
    valid = (ids >= 0) & (ids < num_experts)
    expert = torch.where(valid, ids, num_experts).to(torch.int32)
    by_expert = expert.sort(stable=True)
    row_to_slot = by_expert.indices.to(torch.int32)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(by_expert.values, bounds, out_int32=True)
    row = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    slot_to_row = torch.empty_like(row).scatter(0, by_expert.indices, row)
    return Plan(
        offsets.diff(),
        offsets,
        token_of_slot(row_to_slot, routing.token_offsets, (num_tokens, top_k)),
        row_to_slot,
        torch.where(valid, slot_to_row, -1),
        routing.token_offsets,
        top_k,
    )


def token_of_slot(slot: Tensor, token_offsets: Tensor | None, sizes: tuple[int, int]) -> Tensor:
    """int32, in the shape of slot; sizes is (T, K). A padding slot counts as the last token's."""
    num_tokens, top_k = sizes
    if token_offsets is None:
        return slot // top_k
    token = torch.searchsorted(token_offsets[1:], slot, right=True, out_int32=True)
    return token.clamp(max=max(num_tokens - 1, 0))


def _scores(logits: Tensor, ids: Tensor, spec: RouterSpec) -> Tensor:
    if spec.name == "softmax_topk":
        return logits.gather(1, ids).softmax(dim=1)
    scores = logits.softmax(dim=1).gather(1, ids)
    if spec.name == "topk_softmax":
        return scores
    return scores / scores.sum(dim=1, keepdim=True)


def _check(logits: Tensor, spec: RouterSpec) -> None:
    if spec.name not in SOFTMAX_ROUTERS:
        raise torch_refusal(
            "router",
            repr(spec.name),
            f"Use one of {', '.join(SOFTMAX_ROUTERS)}, or bring ids and scores of your own",
        )
    check_rank("logits", logits, 2, "(num_tokens, num_experts)")
    check_dtype("logits", logits, (torch.float32, torch.float64))
