# SPDX-License-Identifier: Apache-2.0
"""torch eager, one expert after another: what a careful user writes without Penstock.

The weights are unbound once, so that backward stacks the experts' gradients once instead of adding
E zero-filled tensors of the size of all the weights.
"""

from __future__ import annotations

from typing import Any

from penstock.bench.peers.peer import Peer, combine, route_and_dispatch
from penstock.bench.problem import Problem, Tensors


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    import torch
    from torch.nn import functional

    dispatch = route_and_dispatch(problem, tensors)
    outputs = []
    per_expert = zip(
        dispatch.rows.split(dispatch.counts.tolist()),
        tensors.w1.unbind(0),
        tensors.w2.unbind(0),
        strict=True,
    )
    for rows, w1, w2 in per_expert:
        gate, up = functional.linear(rows, w1).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, w2))
    return combine(torch.cat(outputs), dispatch)


PEER = Peer(
    "torch-loop", lambda problem: "", forward, why_no_graph="the host reads the counts",
    allowance=4.0,
)  # fmt: skip
