# SPDX-License-Identifier: Apache-2.0
"""The router's pass of the engine, for NumPy arrays and torch tensors alike.

Like _engine.py: each function allocates its outputs and its workspace and hands all to the library.
Called by routers.py and _torch_routing.py. T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock._arrays import arrays_of, is_torch
from penstock._context import CallContext
from penstock._engine import (
    Plan,
    Problem,
    call_tuple,
    check_rank,
    empty_plan,
    pass_on,
    plan_arguments,
)
from penstock._library import library
from penstock._memory import workspace
from penstock._ranges import ranged
from penstock.errors import invalid

REPORT_SIZE = 5  # kRouterReportSize of include/penstock/routing.h
FIXED_TOP_K = ("softmax_topk", "topk_softmax", "topk_softmax_normalized", "sigmoid_topk")
_NO_PLAN = ((None,) * 7, 0)  # in place of plan_arguments


class RouterSpec(NamedTuple):
    """A router and its options, in the order in which the library takes them."""

    name: str
    selection: str = "chosen"  # or "given": score the ids of a replay
    scaling: str = "normalized"  # or "plain"
    mode: str = "NR-f"
    top_k: int = 0
    num_groups: int = 1
    top_groups: int = 1
    tile: int = 0
    scale: float = 1.0
    threshold: float = 0.5

    def pack(self) -> str:
        """Names and counts in one string, which an operator's schema can carry."""
        return ",".join(map(str, self[:8]))

    # Methods, not properties: dynamo of torch 2.9 loses a named tuple's properties where a field is
    # a symbol.
    def numbers(self) -> list[float]:
        """The rest; apart because torch.compile may hold floats as symbols."""
        return [self.scale, self.threshold]

    @staticmethod
    def unpack(packed: str, numbers: list[float]) -> RouterSpec:
        """The inverse of pack and numbers."""
        fields = packed.split(",")
        return RouterSpec(*fields[:4], *map(int, fields[4:]), *numbers)

    def fixed_top_k(self) -> bool:
        """Whether every token has K slots, so that no offsets are needed."""
        return self.name in FIXED_TOP_K

    def needs_logits(self) -> bool:
        """Whether the gradient reads the logits; scores of softmax_topk say all by themselves."""
        return self.name != "softmax_topk"


class Routed(NamedTuple):
    """What a router writes. scores and ids: (T, K), or (slots) with token_offsets (T+1).

    A router without a fixed K sorts its slots by expert as well: plan, else None. It is of use
    while ids stay as they are, so there is none of NumPy arrays, which do not count writes.
    """

    scores: Any
    ids: Any
    token_offsets: Any = None
    report: Any = None
    plan: Plan | None = None


@ranged
def route(
    logits: Any, spec: RouterSpec, slots: int, steering: tuple[Any, Any], context: CallContext
) -> Routed:
    """Choose and score. `slots` counts where K is not fixed; `steering` is (bias, seed)."""
    check_rank("logits", logits, 2, "(num_tokens, num_experts)")
    num_tokens, num_experts = logits.shape
    arrays = arrays_of(logits)
    dtype = arrays.dtype_name(logits)
    fixed = spec.fixed_top_k()
    if fixed:
        check_top_k(spec.top_k, num_experts)
    shape = (num_tokens, spec.top_k) if fixed else (slots,)
    scores = arrays.empty(shape, dtype, logits)
    ids = arrays.empty(shape, "int32", logits)
    offsets = report = plan = None
    if not fixed:
        offsets = arrays.empty((num_tokens + 1,), "int32", logits)
        report = arrays.empty((REPORT_SIZE,), "int32", logits)
        if is_torch(ids):
            plan = empty_plan(ids, offsets, num_experts)
    scratch = _workspace(logits, spec, slots, context)
    tensors = pass_on(logits, logits, scores, ids, *steering, offsets, report, scratch)
    into = _NO_PLAN if plan is None else plan_arguments(plan)
    library().route(call_tuple(context, logits), spec, tensors, into)
    return Routed(scores, ids, offsets, report, plan)


@ranged
def replay(logits: Any, spec: RouterSpec, given: Routed, context: CallContext) -> Any:
    """Scores of the ids (and token_offsets) that are given, in their shape."""
    check_rank("logits", logits, 2, "(num_tokens, num_experts)")
    arrays = arrays_of(logits)
    spec = spec._replace(selection="given")
    scores = arrays.empty(tuple(given.ids.shape), arrays.dtype_name(logits), logits)
    scratch = _workspace(logits, spec, given.ids.shape[0], context)
    tensors = (logits, scores, given.ids, None, None, given.token_offsets, None, scratch)
    library().route(call_tuple(context, logits), spec, pass_on(logits, *tensors), _NO_PLAN)
    return scores


@ranged
def route_backward(
    dscores: Any,
    saved: tuple[Any, Routed],
    num_experts: int,
    spec: RouterSpec,
    context: CallContext,
) -> Any:
    """The logits' gradient (T, E); `saved` is (logits, what was routed).

    The logits may be None where spec.needs_logits() is False.
    """
    logits, routed = saved
    scores = routed.scores
    arrays = arrays_of(scores)
    num_tokens = scores.shape[0] if logits is None else logits.shape[0]
    dlogits = arrays.empty((num_tokens, num_experts), arrays.dtype_name(scores), scores)
    spec = spec._replace(selection="given")
    scratch = _workspace(dlogits, spec, scores.shape[0], context)
    tensors = (logits, scores, routed.ids, dscores, dlogits, routed.token_offsets, scratch)
    library().route_backward(call_tuple(context, scores), spec, pass_on(scores, *tensors))
    return dlogits


def check_top_k(top_k: int, num_experts: int) -> None:
    """ValueError unless a token can have so many experts."""
    if not 1 <= top_k <= num_experts:
        raise invalid(
            "top_k", top_k, f"1 to num_experts = {num_experts}", "Choose within the experts"
        )


def _workspace(logits: Any, spec: RouterSpec, slots: int, context: CallContext) -> Any:
    num_tokens, num_experts = logits.shape
    arrays = arrays_of(logits)
    problem = Problem(
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_slots=num_tokens * spec.top_k if spec.fixed_top_k() else slots,
        dtype=arrays.dtype_name(logits),
        device_type=arrays.device(logits)[0],
        device_index=arrays.device(logits)[1],
    )
    call = call_tuple(context, logits)
    return workspace(library().route_workspace_bytes(call, spec, problem), logits)
