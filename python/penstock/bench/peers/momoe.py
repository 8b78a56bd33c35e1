# SPDX-License-Identifier: Apache-2.0
"""MoMoE, where the package `momoe` is installed: its layer that recomputes everything (save 0 %).

It holds its weights transposed: w1 (E, d, 2n), w2 (E, n, d) and the router's (d, E).
"""

from __future__ import annotations

from typing import Any

from penstock.bench.peers.own_layout import OwnLeaves, Weights
from penstock.bench.peers.peer import Peer, why_not_installed
from penstock.bench.problem import Problem, Tensors


def _transposed(weights: Weights) -> Weights:
    return tuple(weight.transpose(-1, -2) for weight in weights)


_leaves = OwnLeaves(_transposed, _transposed)


def why_not(problem: Problem) -> str:
    """Why it cannot run the problem; empty if it can."""
    return why_not_installed("momoe", problem)


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output: a module made around the leaves, whose parameters are then replaced."""
    import torch
    from momoe.sample_moe import MoE

    x, *weights = _leaves.of(tensors)
    named = dict(zip(("Wg_DN", "Wl1_ND2H", "Wl2_NHD"), weights, strict=True))
    module = MoE(*problem.shape.sizes[1:], 0, save_percent=0, **named)
    by_address = {weight.data_ptr(): weight for weight in weights}
    ours = {
        name: by_address[parameter.data_ptr()]
        for name, parameter in module.named_parameters()
        if parameter.data_ptr() in by_address
    }
    return torch.func.functional_call(module, ours, (x.unsqueeze(0),)).squeeze(0)


PEER = Peer(
    "momoe",
    why_not,
    forward,
    leaves=_leaves.of,
    in_our_layout=_leaves.in_our_layout,
    why_no_graph="its sizes are read by the host",
    allowance=4.0,
)
