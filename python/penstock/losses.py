# SPDX-License-Identifier: Apache-2.0
"""Losses and measures of a router, in plain torch, differentiable in the logits.

They are small and compose: add what you want to your training loss. penstock.MoE computes them for
its last call in layer.stats. T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.errors import invalid


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


def global_batch_loss(logits: Tensor, expert_counts: Tensor, group: Any = None) -> Tensor:
    """load_balancing_loss with the loads of all ranks of `group` (arXiv 2501.11873).

    logits (T, E) of this rank, expert_counts (E) of this rank, or of all the micro-batches of its
    step so far. Balance is then asked of the whole batch, and a rank's text may keep to few
    experts. group: a process group of torch.distributed, None for this rank alone.
    """
    total = expert_counts.to(torch.int64)
    if group is not None:
        total = total.clone()
        torch.distributed.all_reduce(total, group=group)
    return load_balancing_loss(logits, total)


def sequence_balance_loss(affinities: Tensor, ids: Tensor, num_sequences: int = 1) -> Tensor:
    """DeepSeek-V3's balance within each sequence (arXiv 2412.19437, eq. 17-20), without alpha.

    affinities (T, E), not negative: sigmoid or softmax of the logits, differentiable. ids (T, K),
    the chosen experts. T holds num_sequences runs of equal length L, one after the other. For each:
    sum_e f_e P_e, f_e = E / (K L) * (choices of e), P_e the mean of the affinities divided by their
    sum over E; then the mean over the sequences. 1 when even, 0 for no tokens.
    """
    num_tokens, num_experts = affinities.shape
    length = _sequence_length(num_tokens, num_sequences)
    if length == 0:
        return affinities.sum()
    shares = affinities / affinities.sum(dim=-1, keepdim=True)
    means = shares.reshape(num_sequences, length, num_experts).mean(dim=1)
    choices = ids.reshape(num_sequences, -1).to(torch.int64)
    counts = means.new_zeros(means.shape).scatter_add_(
        1, choices, torch.ones_like(choices, dtype=means.dtype)
    )
    frequencies = counts * num_experts / choices.shape[1]
    return (frequencies * means).sum(dim=-1).mean()


def mutual_information(logits: Tensor) -> Tensor:
    """H(mean of p) - mean of H(p) over tokens, p = softmax(logits): nats, 0 to ln E.

    logits (T, E). High where experts are used evenly and each token is sure of its own; its
    negative is ModuleFormer's loss (arXiv 2306.04640, eq. 6). 0 for T = 0.
    """
    if logits.shape[0] == 0:
        return logits.sum()
    p = torch.softmax(logits, dim=-1)
    return _entropy_of(p.mean(dim=0)) - _entropy_of(p).mean()


def routing_entropy(logits: Tensor) -> Tensor:
    """The mean over tokens of the entropy of softmax(logits): nats, 0 when sure, ln E when not."""
    if logits.shape[0] == 0:
        return logits.sum()
    return _entropy_of(torch.softmax(logits, dim=-1)).mean()


def activation_locality_loss(
    logits: Tensor, num_sequences: int = 1, sharpness: float = 1.0
) -> Tensor:
    """How much neighbouring tokens differ in their experts (BlockFFN, arXiv 2507.08771).

    logits (T, E), T holding num_sequences runs of equal length one after the other. With a =
    sigmoid(sharpness * logits), how far each expert is active: the mean over experts and over pairs
    of neighbours of the cross-entropy of a_t against a_(t+1). 0 where there are no neighbours.
    """
    num_tokens, num_experts = logits.shape
    length = _sequence_length(num_tokens, num_sequences)
    if length < 2:
        return 0.0 * logits.sum()
    sharp = (sharpness * logits).reshape(num_sequences, length, num_experts)
    return F.binary_cross_entropy_with_logits(sharp[:, :-1], sharp[:, 1:].sigmoid())


def idle_experts(expert_counts: Tensor) -> Tensor:
    """How many experts got no row: a scalar int64, from expert_counts (E)."""
    return (expert_counts == 0).sum()


def load_imbalance(expert_counts: Tensor) -> Tensor:
    """The largest load over the mean load: a scalar, 1 when balanced, E when one expert has all.

    expert_counts (E), integer. 0 for no slots.
    """
    total = expert_counts.sum().clamp(min=1)
    return expert_counts.max() * expert_counts.shape[0] / total


def max_load_violation(expert_counts: Tensor) -> Tensor:
    """load_imbalance - 1: how far the largest load is above the mean (arXiv 2408.15664).

    expert_counts (E), integer. 0 when balanced; 0 for no slots. A perfect router that draws experts
    at random still has about sqrt(2 E ln E / slots) of it, see sampling_floor.
    """
    return (load_imbalance(expert_counts) - 1).clamp(min=0)


def sampling_floor(num_slots: int, num_experts: int, draws: int = 200, seed: int = 0) -> float:
    """The mean max_load_violation of slots that go to experts drawn evenly at random."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        ids = torch.randint(num_experts, (num_slots,), generator=generator)
        counts = torch.bincount(ids, minlength=num_experts)
        total += max_load_violation(counts).item()
    return total / draws


def padding_waste(expert_counts: Tensor, tile: int) -> Tensor:
    """The share of the products' rows that are padding, with counts filled up to whole tiles.

    expert_counts (E), integer; tile: rows of a tile. A scalar from 0 to 1; 0 for no rows.
    """
    if tile < 1:
        raise invalid("tile", tile, "1 or more rows", "Pass functional.tile_rows")
    filled = (expert_counts + tile - 1).div(tile, rounding_mode="floor") * tile
    padding = filled.sum() - expert_counts.sum()
    return padding / filled.sum().clamp(min=1)


def _entropy_of(p: Tensor) -> Tensor:
    """- sum p ln p over the last axis, with 0 ln 0 = 0, and a finite gradient at 0."""
    return -torch.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny)).sum(dim=-1)


def _sequence_length(num_tokens: int, num_sequences: int) -> int:
    if num_sequences < 1 or num_tokens % num_sequences:
        raise invalid(
            "num_sequences",
            f"{num_sequences} for {num_tokens} tokens",
            "a divisor of the number of tokens",
            "Pass sequences of equal length",
        )
    return num_tokens // num_sequences
