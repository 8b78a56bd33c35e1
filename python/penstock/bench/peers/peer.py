# SPDX-License-Identifier: Apache-2.0
"""What an adapter gives, and the parts that torch's own implementations share.

The shared parts are the fastest ways found to do them on a CPU: index_select rather than indexing
(its gradient is an index_add instead of a sorted scatter), and a combine that gathers each token's
rows and sums them as a small product rather than an index_add of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

from penstock.bench.problem import Problem, Tensors


class Peer(NamedTuple):
    """One implementation of the layer."""

    name: str
    why_not: Callable[[Problem], str]
    forward: Callable[[Problem, Tensors], Any]  # the output (T, d)
    # What its gradients are taken of, in the order of GRADIENTS, and these gradients as the
    # problem lays its weights out.
    leaves: Callable[[Tensors], tuple[Any, ...]] = lambda tensors: tensors.leaves
    in_our_layout: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda gradients: gradients
    why_no_graph: str = ""  # why a CUDA graph cannot hold it; empty if it can
    # Times the contract's error that it may have. Peers that round scores and sums to a 16-bit
    # dtype are less exact than the contract asks of us, and are timed all the same.
    allowance: float = 1.0


class Dispatch(NamedTuple):
    """Rows sorted by expert, and what brings them back."""

    rows: Any  # (T K, d)
    counts: Any  # (E)
    order: Any  # (T K): row -> slot
    scores: Any  # (T, K)


def why_not_installed(package: str, problem: Problem) -> str:
    """Why a package for GPUs cannot run the problem; empty if it can."""
    if problem.device != "cuda":
        return "it runs on GPUs only"
    return "" if find_spec(package) else "not installed"


def route(problem: Problem, tensors: Tensors) -> tuple[Any, Any]:
    """Scores and ids (T, K): top-k of the logits, softmax over the chosen in fp32."""
    import torch

    logits = torch.nn.functional.linear(tensors.x, tensors.router_weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    values, ids = logits.topk(problem.shape.top_k, dim=-1)
    return values.softmax(dim=-1).to(tensors.x.dtype), ids


def route_and_dispatch(problem: Problem, tensors: Tensors) -> Dispatch:
    """The routing, and the rows gathered in expert order."""
    import torch

    top_k, num_experts = problem.shape.top_k, problem.shape.num_experts
    scores, ids = route(problem, tensors)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    rows = tensors.x.index_select(0, order // top_k)
    return Dispatch(rows, torch.bincount(flat, minlength=num_experts), order, scores)


def combine(rows: Any, dispatch: Dispatch) -> Any:
    """Each token's rows, weighted by its scores."""
    import torch

    order, scores = dispatch.order, dispatch.scores
    slot_to_row = torch.empty_like(order)
    slot_to_row[order] = torch.arange(order.numel(), device=order.device)
    by_token = rows.index_select(0, slot_to_row).view(*scores.shape, rows.shape[-1])
    return torch.bmm(scores.unsqueeze(1), by_token).squeeze(1)
