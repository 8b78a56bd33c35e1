# SPDX-License-Identifier: Apache-2.0
"""Routing: who goes where, as scores and ids per slot.

A slot is one (token, choice) pair, in token order: t * K + k, or token_offsets[t] + k where tokens
have differing numbers of experts. Made by functional.route or by the caller; read by
functional.plan and functional.moe_experts. Arrays are torch tensors or NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.errors import invalid

ROUTERS = ("softmax_topk", "topk_softmax", "topk_softmax_normalized")


@dataclass
class Routing:
    """Scores and ids of every slot, flat.

    scores: (slots) fp32, or float64 for a float64 layer.
    ids: (slots) int32 or int64. -1, or any id >= E, skips the slot.
    num_tokens: T. top_k: K, or 0 with token_offsets.
    token_offsets: (T+1) int32 where tokens have differing numbers of experts, else None.
    """

    scores: Any
    ids: Any
    num_tokens: int
    top_k: int = 0
    token_offsets: Any = None

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


def router_name(router: str, renormalize: bool | None) -> str:
    """The engine's name of a router and its options."""
    if router not in ROUTERS:
        raise invalid("router", repr(router), "one of " + ", ".join(ROUTERS), "Check the spelling")
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
