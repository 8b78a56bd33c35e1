# SPDX-License-Identifier: Apache-2.0
"""ScatterMoE (arXiv 2403.08245), where the package `scattermoe` is installed: its gated MLP.

It keeps up rows before gate rows. The router is torch's, as for every peer without one of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from penstock.bench.peers.own_layout import OwnLeaves, halves_swapped
from penstock.bench.peers.peer import Peer, route, why_not_installed
from penstock.bench.problem import Problem, Tensors

_leaves = OwnLeaves(
    lambda weights: (weights[0], halves_swapped(weights[1]), weights[2]),
    lambda weights: (weights[0], halves_swapped(weights[1]), weights[2]),
)


def why_not(problem: Problem) -> str:
    """Why it cannot run the problem; empty if it can."""
    return why_not_installed("scattermoe", problem)


@lru_cache
def _module(d: int, n: int, num_experts: int, top_k: int) -> Any:
    """A module whose own parameters are never used, so they take no memory."""
    from scattermoe.mlp import GLUMLP

    return GLUMLP(d, n, num_experts, top_k).to("meta")


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    import torch

    x, router_weight, w1, w2 = _leaves.of(tensors)
    weights = {"experts.weight": w1, "output_experts.weight": w2}
    arguments = (x, *route(problem, tensors._replace(router_weight=router_weight)))
    return torch.func.functional_call(_module(*problem.shape.sizes[1:]), weights, arguments)


PEER = Peer(
    "scattermoe",
    why_not,
    forward,
    leaves=_leaves.of,
    in_our_layout=_leaves.in_our_layout,
    why_no_graph="its sizes are read by the host",
    allowance=4.0,
)
