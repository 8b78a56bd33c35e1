# SPDX-License-Identifier: Apache-2.0
"""Penstock itself, through its torch functions: router logits, route, experts."""

from __future__ import annotations

from typing import Any

from penstock.bench.peers.peer import Peer
from penstock.bench.problem import Problem, Tensors


def why_not(problem: Problem) -> str:
    """Why the engine cannot run the problem; empty if it can."""
    from penstock import UnsupportedError, backend, chosen_backend

    try:
        with backend(problem.backend):
            chosen_backend(problem.shape.sizes, dtype=problem.dtype, device=problem.device)
    except UnsupportedError as error:  # with every backend's reason
        return str(error).splitlines()[0]
    return ""


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    from penstock import backend, functional

    with backend(problem.backend, threads=problem.threads):
        logits, x = functional.logits_and_input(tensors.x, tensors.router_weight)
        routing = functional.route(logits, problem.shape.top_k)
        return functional.moe_experts(
            x, tensors.w1, tensors.w2, routing, save=problem.save, order=problem.order
        )


PEER = Peer("penstock", why_not, forward)
