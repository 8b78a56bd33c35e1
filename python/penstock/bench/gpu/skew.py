# SPDX-License-Identifier: Apache-2.0
"""Layers whose tokens choose experts unevenly: `--load zipf` and `--load hot`.

The router is part of every implementation, so the load is made by its operands: the first E columns
of x hold the logits that are wanted and the router's weight is the identity there, zero elsewhere,
so that every implementation's product gives those logits exactly.
"""

from __future__ import annotations

from typing import Any

from penstock.bench.problem import Problem, Tensors

HOT_LEAD = 16.0  # more than any noise, so that every token chooses the same K experts


def with_load(problem: Problem, tensors: Tensors, load: str) -> Tensors:
    """The tensors with x and the router's weight changed in place; "uniform" leaves them alone."""
    import torch

    if load == "uniform":
        return tensors
    _, num_tokens, d, _, num_experts, top_k = problem.shape
    if num_experts > d:
        raise ValueError(
            f"--load {load}: got {num_experts} experts and a hidden size of {d}, expected no more "
            "experts than that. Use another shape"
        )
    generator = torch.Generator(problem.device).manual_seed(2)
    logits = wanted_logits(load, (num_tokens, num_experts, top_k), generator)
    with torch.no_grad():
        tensors.x[:, :num_experts] = logits.to(tensors.x.dtype)
        tensors.router_weight.zero_()
        tensors.router_weight[:, :num_experts].fill_diagonal_(1.0)
    return tensors


def wanted_logits(load: str, sizes: tuple[int, int, int], generator: Any) -> Any:
    """Logits (T, E) in fp32.

    zipf: -log(rank) plus Gumbel noise, which draws K experts without replacement with chances that
    fall as 1 / rank. hot: the first K experts lead by more than the noise.
    """
    import torch

    num_tokens, num_experts, top_k = sizes
    device = generator.device
    uniform = torch.rand((num_tokens, num_experts), generator=generator, device=device)
    noise = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    if load == "hot":
        noise[:, :top_k] += HOT_LEAD
        return noise
    ranks = torch.arange(1, num_experts + 1, device=device, dtype=torch.float32)
    return noise - ranks.log()
