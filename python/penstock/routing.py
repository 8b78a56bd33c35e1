# SPDX-License-Identifier: Apache-2.0
"""Routing: who goes where, as scores and ids per slot.

A slot is one (token, choice) pair, in token order: t * K + k, or token_offsets[t] + k where tokens
have differing numbers of experts. Made by functional.route or by the caller; read by
functional.plan and functional.moe_experts. Arrays are torch tensors or NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from penstock._engine import Plan
from penstock._engine_route import RouterSpec
from penstock.errors import invalid

SOFTMAX_ROUTERS = ("softmax_topk", "topk_softmax", "topk_softmax_normalized")


class RoutingReport(NamedTuple):
    """What a router without a fixed K counted: five integers, read from the device."""

    pairs: int  # live slots
    tokens_without_expert: int  # their output is 0
    dropped: int  # pairs that lost their place, to rounding or for want of slots
    added: int  # pairs that rounding added
    rounded: int  # 1, or 0 where there are fewer tokens than a tile and nothing was rounded


class HandedPlan(NamedTuple):
    """A plan that a router made with its choice, and the torch tensors that it is the plan of."""

    plan: Plan
    ids: Any
    token_offsets: Any
    writes: tuple[int, int]  # that torch had counted into the two when the plan was made

    @classmethod
    def of(cls, plan: Plan, ids: Any, token_offsets: Any) -> HandedPlan | None:
        """The plan of these tensors as they are now; None where torch does not say how often they
        are written: of inference tensors, and to code that it compiles.
        """
        if _compiling() or ids.is_inference():
            return None
        return cls(plan, ids, token_offsets, (ids._version, token_offsets._version))

    def serves(self, routing: Routing, num_experts: int) -> bool:
        """Whether it is for num_experts, and the routing's tensors are those, not written since."""
        ids, offsets = routing.ids, routing.token_offsets
        return (
            not _compiling()
            and self.plan.expert_counts.shape[0] == num_experts
            and ids is self.ids
            and offsets is self.token_offsets
            and (ids._version, offsets._version) == self.writes
        )


def _compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


@dataclass
class Routing:
    """Scores and ids of every slot, flat; also what a router tells of them.

    scores: (slots) fp32, or float64 for a float64 layer.
    ids: (slots) int32 or int64. -1, or any id >= E, skips the slot.
    num_tokens: T. top_k: K, or 0 with token_offsets.
    token_offsets: (T+1) int32 where tokens have differing numbers of experts, else None. Slots at
    or past the last offset are padding and hold ids of -1.
    report: (5) int32 of a router without a fixed K, else None; see read_report.
    plan: what functional.plan makes of these ids and offsets, where the router has it already, else
    None. It is not used once either is another tensor or has been written into.
    router: how the scores follow from the logits, where a router of penstock made them.
    """

    scores: Any
    ids: Any
    num_tokens: int
    top_k: int = 0
    token_offsets: Any = None
    report: Any = None
    router: RouterSpec | None = None
    plan: HandedPlan | None = None

    @classmethod
    def from_topk(cls, scores: Any, ids: Any) -> Routing:
        """The routing of scores and ids (T, K); NaN, zero and negative scores are used as given."""
        if scores.ndim != 2 or tuple(scores.shape) != tuple(ids.shape):
            raise invalid(
                "topk_scores and topk_ids",
                f"shapes {tuple(scores.shape)} and {tuple(ids.shape)}",
                "the same shape (num_tokens, top_k)",
                "Pass a Routing with token_offsets where tokens have differing numbers of experts",
            )
        num_tokens, top_k = scores.shape
        return cls(scores.reshape(-1), ids.reshape(-1), num_tokens, top_k)

    def topk(self) -> tuple[Any, Any]:
        """Scores and ids as (T, K), where every token has the same number of slots."""
        if self.token_offsets is not None:
            raise invalid(
                "Routing.topk()",
                "a routing with token_offsets",
                "the same number of slots for every token",
                "Read scores, ids and token_offsets",
            )
        shape = (self.num_tokens, self.top_k)
        return self.scores.reshape(shape), self.ids.reshape(shape)

    def read_report(self) -> RoutingReport:
        """The report as numbers; waits for the device. ValueError where K is fixed."""
        if self.report is None:
            raise invalid(
                "Routing.read_report()",
                "a routing whose tokens have K experts each, or that the caller brought",
                "one of token_rounding, expert_choice or threshold",
                "There is nothing to count",
            )
        return RoutingReport(*map(int, self.report.tolist()))

    def with_scores(self, scores: Any) -> Routing:
        """The same routing with other scores (slots)."""
        return replace(self, scores=scores)

    def detach(self) -> Routing:
        """The same routing without the graph of its scores (torch)."""
        return self.with_scores(self.scores.detach())


def router_name(router: str, renormalize: bool | None) -> str:
    """The engine's name of a softmax router and its option."""
    if router not in SOFTMAX_ROUTERS:
        raise invalid(
            "router", repr(router), "one of " + ", ".join(SOFTMAX_ROUTERS), "Check the spelling"
        )
    if renormalize is None:
        return router
    if router == "softmax_topk":
        raise invalid(
            "renormalize",
            f"{renormalize} with softmax_topk",
            "renormalize with topk_softmax only",
            "The scores of softmax_topk always sum to 1: leave it out",
        )
    return "topk_softmax_normalized" if renormalize else "topk_softmax"
