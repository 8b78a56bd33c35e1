# SPDX-License-Identifier: Apache-2.0
"""torch eager with its grouped product: nn.functional.grouped_mm, or torch._grouped_mm before."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from penstock.bench.peers.peer import Peer, combine, route_and_dispatch
from penstock.bench.problem import Problem, Tensors


def _grouped_mm() -> Callable[..., Any] | None:
    import torch

    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public or getattr(torch, "_grouped_mm", None)


@lru_cache
def _why_not(dtype: str, device: str) -> str:
    """Tries a product and its gradient once; torch's own words where it cannot."""
    import torch

    grouped_mm = _grouped_mm()
    if grouped_mm is None:
        return f"torch {torch.__version__} has no grouped matrix product"
    options = {"dtype": getattr(torch, dtype), "device": device, "requires_grad": True}
    left, right = torch.ones(16, 16, **options), torch.ones(2, 16, 16, **options)
    offsets = torch.tensor([8, 16], dtype=torch.int32, device=device)
    try:
        product = grouped_mm(left, right.transpose(1, 2), offs=offsets)
        product.backward(torch.ones_like(product))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    return ""


def why_not(problem: Problem) -> str:
    """Why torch's grouped product cannot run here; empty if it can."""
    import torch

    sizes = (problem.shape.hidden_size, problem.shape.intermediate_size)
    alignment = 16 // torch.empty((), dtype=getattr(torch, problem.dtype)).element_size()
    if any(size % alignment for size in sizes):
        return f"torch's grouped product needs d and n to be multiples of {alignment}"
    return _why_not(problem.dtype, problem.device)


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    import torch
    from torch.nn import functional

    grouped_mm = _grouped_mm()
    dispatch = route_and_dispatch(problem, tensors)
    offsets = dispatch.counts.cumsum(0).to(torch.int32)
    h = grouped_mm(dispatch.rows, tensors.w1.transpose(1, 2), offs=offsets)
    gate, up = h.chunk(2, dim=-1)
    y = grouped_mm(functional.silu(gate) * up, tensors.w2.transpose(1, 2), offs=offsets)
    return combine(y, dispatch)


PEER = Peer(
    "torch-grouped", why_not, forward, why_no_graph="torch.bincount waits for the GPU",
    allowance=4.0,
)  # fmt: skip
