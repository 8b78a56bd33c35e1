# SPDX-License-Identifier: Apache-2.0
"""Balance without a loss: the bias that steers sigmoid_topk, moved once per optimiser step.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) after Wang et al. (arXiv 2408.15664): an expert that
got more than the mean load since the last step loses `rate` of bias, one that got less gains it.

    balancer = penstock.balance.BiasBalancer(model, rate=1e-3)
    balancer.attach(optimizer)          # or call balancer.step() after each optimizer.step()

A layer counts its own load (layer.router.load): in training only, once for each forward pass, so
that any number of accumulation steps count together, and never while an activation checkpoint
computes a layer again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from penstock.errors import invalid


def recomputing() -> bool:
    """Whether this runs inside a backward pass: an activation checkpoint computing forward again.

    A compiled graph recomputes by itself, without calling the module.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_bias(model: nn.Module, rate: float, group: Any = None) -> None:
    """Move the bias of every balanced layer of `model` by rate * sign(mean load - load).

    Then set the loads to 0. Layers that counted nothing stay as they are. group: a process group of
    torch.distributed over which the loads are summed first; torch.distributed.group.WORLD for all.
    """
    if not rate >= 0:
        raise invalid("rate", rate, "0 or more", "DeepSeek-V3 uses 0.001")
    for module in model.modules():
        load = getattr(module, "load", None)
        bias = getattr(module, "score_bias", None)
        if load is None or bias is None:
            continue
        total = load.clone()
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        # In integers: sign(sum / E - load), exact for every count.
        bias += rate * torch.sign(total.sum() - total * total.numel()).to(bias.dtype)
        load.zero_()


class BiasBalancer:
    """update_bias for one model, by hand or after every step of an optimiser."""

    def __init__(self, model: nn.Module, rate: float = 1e-3, group: Any = None) -> None:
        self.model = model
        self.rate = rate
        self.group = group

    def step(self) -> None:
        """One update: call it once per optimiser step, on every rank of the group."""
        with torch.no_grad():
            update_bias(self.model, self.rate, self.group)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Update after every optimizer.step() from now on; .remove() of the result ends that."""
        return optimizer.register_step_post_hook(lambda *_: self.step())
