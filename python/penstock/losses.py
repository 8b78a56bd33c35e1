# SPDX-License-Identifier: Apache-2.0
"""Losses and measures of a router, in plain torch, differentiable in the logits.

They are small and compose: add what you want to your training loss. penstock.MoE computes them for
its last call in layer.stats. T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(logits: Tensor, expert_counts: Tensor) -> Tensor:
    """E * sum_e f_e P_e, the auxiliary loss of the Switch Transformer (arXiv 2101.03961, eq. 4-6).

    logits (T, E), floating. expert_counts (E), integer: routed slots of each expert. f_e is the
    share of slots that went to expert e (no gradient), P_e the mean over tokens of the softmax over
    all E logits. Returns a scalar, 1 when both are uniform; 0 for no slots. With K > 1 the shares
    sum to 1 over slots, so that a uniform load gives 1 for every K.
    """
    num_tokens, num_experts = logits.shape
    slots = expert_counts.sum().clamp(min=1)
    shares = expert_counts.to(logits.dtype) / slots
    mean_probabilities = torch.softmax(logits, dim=-1).sum(dim=0) / max(num_tokens, 1)
    return num_experts * torch.dot(shares, mean_probabilities)


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean over tokens of logsumexp(logits)^2: ST-MoE's z-loss (arXiv 2202.08906, eq. 5).

    logits (T, E), floating. Returns a scalar in the same dtype; it keeps logits small. 0 for T = 0.
    """
    return torch.logsumexp(logits, dim=-1).square().sum() / max(logits.shape[0], 1)


def idle_experts(expert_counts: Tensor) -> Tensor:
    """How many experts got no row: a scalar int64, from expert_counts (E)."""
    return (expert_counts == 0).sum()


def load_imbalance(expert_counts: Tensor) -> Tensor:
    """The largest load over the mean load: a scalar, 1 when balanced, E when one expert has all.

    expert_counts (E), integer. 0 for no slots.
    """
    total = expert_counts.sum().clamp(min=1)
    return expert_counts.max() * expert_counts.shape[0] / total
