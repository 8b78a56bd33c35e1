# SPDX-License-Identifier: Apache-2.0
"""SonicMoE (arXiv 2512.14080), where the package `sonicmoe` is installed: its softmax-top-k layer.

It takes weights as (2n, d, E) and (d, n, E) views, gate and up rows in turn.
"""

from __future__ import annotations

from typing import Any

from penstock.bench.peers.own_layout import OwnLeaves, concatenated, interleaved
from penstock.bench.peers.peer import Peer, why_not_installed
from penstock.bench.problem import Problem, Tensors

_leaves = OwnLeaves(
    lambda weights: (weights[0], interleaved(weights[1]), weights[2]),
    lambda weights: (weights[0], concatenated(weights[1]), weights[2]),
)


def why_not(problem: Problem) -> str:
    """Why it cannot run the problem; empty if it can."""
    return why_not_installed("sonicmoe", problem)


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    import torch
    from sonicmoe import moe_TC_softmax_topk_layer
    from sonicmoe.enums import ActivationType

    x, router_weight, w1, w2 = _leaves.of(tensors)
    outputs = moe_TC_softmax_topk_layer(
        x, router_weight, w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None,
        problem.shape.top_k, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, False,
    )  # fmt: skip
    return outputs[0]


PEER = Peer(
    "sonicmoe",
    why_not,
    forward,
    leaves=_leaves.of,
    in_our_layout=_leaves.in_our_layout,
    allowance=4.0,
)
