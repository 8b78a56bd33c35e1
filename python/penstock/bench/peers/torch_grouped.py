# SPDX-License-Identifier: Apache-2.0
"""torch eager with its grouped product: nn.functional.grouped_mm, or torch._grouped_mm before."""

from __future__ import annotations

from typing import Any

from penstock.bench.peers.peer import Peer, combine, route_and_dispatch
from penstock.bench.problem import Problem, Tensors


def why_not(problem: Problem) -> str:
    """Why torch's grouped product cannot run here; empty if it can."""
    import torch

    from penstock._torch_path.products import why_torch_cannot

    sizes = (problem.shape.hidden_size, problem.shape.intermediate_size)
    alignment = 16 // torch.empty((), dtype=getattr(torch, problem.dtype)).element_size()
    if any(size % alignment for size in sizes):
        return f"torch's grouped product needs d and n to be multiples of {alignment}"
    device = torch.device(problem.device)
    return why_torch_cannot(getattr(torch, problem.dtype), device.type, device.index or 0)


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    import torch
    from torch.nn import functional

    from penstock._torch_path.products import grouped_product

    dispatch = route_and_dispatch(problem, tensors)
    offsets = dispatch.counts.cumsum(0).to(torch.int32)
    h = grouped_product(dispatch.rows, tensors.w1.transpose(1, 2), offsets)
    gate, up = h.chunk(2, dim=-1)
    y = grouped_product(functional.silu(gate) * up, tensors.w2.transpose(1, 2), offsets)
    return combine(y, dispatch)


PEER = Peer(
    "torch-grouped", why_not, forward, why_no_graph="torch.bincount waits for the GPU",
    allowance=4.0,
)  # fmt: skip
