# SPDX-License-Identifier: Apache-2.0
"""The experts in ordinary torch operations: dispatch, two products, combine; autograd's gradients.

    H_r = x_t W1_e^T + b1_e     A_r = act(H_r)     Y_r = A_r W2_e^T + b2_e     O_t = sum_r S_r Y_r

Products, A and O are rounded to the storage dtype once each; biases, activations, the weighted sum
and the sums of gradients over a token's experts are computed in fp32 (float64 for float64), as
docs/design/contracts.md has it. Nothing here waits for a device.

A row is live when it belongs to a slot that names an expert. What the products leave in other rows
is undefined, in both directions: rows are masked before each product and after it, so that neither
garbage nor a NaN of a skipped token reaches anything. Called by _torch_path/__init__.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock._engine import Config, Plan, Weights
from penstock._torch_path.activations import accumulator, activated
from penstock._torch_path.products import product
from penstock._torch_path.routing import token_of_slot


class Groups(NamedTuple):
    """Which expert a row belongs to."""

    ends: Tensor  # (E) int32: where each expert's rows end
    expert: Tensor  # (R_cap) int64, in [0, E)
    live: Tensor  # (R_cap, 1) bool

    def mask(self, rows: Tensor) -> Tensor:
        """The rows (R_cap, any), zeros where they are not live; their gradients alike."""
        return torch.where(self.live, rows, 0)


def experts_of_tokens(
    x: Tensor, scores: Tensor, weights: Weights, plan: Plan, config: Config
) -> Tensor:
    """O (T, d) of x (T, d) and scores (slots)."""
    num_tokens, hidden_size = x.shape
    num_slots = scores.shape[0] if num_tokens else 0  # without tokens there is only padding
    slot = torch.arange(num_slots, dtype=torch.int32, device=x.device)
    groups = groups_of(plan, num_slots)
    if plan.token_offsets is None:
        by_token = (num_tokens, plan.top_k if num_slots else 0, hidden_size)
        per_slot = x.unsqueeze(1).expand(by_token).reshape(num_slots, hidden_size)
    else:  # through the accumulator, in which a token's gradients are then summed
        token = token_of_slot(slot, plan.token_offsets, (num_tokens, 0))
        per_slot = x.to(accumulator(x.dtype)).index_select(0, token).to(x.dtype)
    # Where a map says nothing, any place will do that no other row or slot needs often.
    to_slot = torch.where(groups.live[:, 0], plan.row_to_slot[:num_slots], slot)
    y = _outputs(per_slot.index_select(0, to_slot), weights, groups, config)

    slot_to_row = plan.slot_to_row[:num_slots]
    chosen = slot_to_row >= 0
    y = y.index_select(0, torch.where(chosen, slot_to_row, slot))
    y = torch.where(chosen[:, None], y, 0)
    terms = y * torch.where(chosen, scores[:num_slots], 0)[:, None]  # in the scores' dtype
    if plan.token_offsets is None:
        sums = terms.reshape(by_token).sum(1)
    else:
        sums = terms.new_zeros(x.shape).index_add(0, token, terms)
    return sums.to(x.dtype)


def experts_of_rows(
    rows: Tensor, scores: Tensor | None, weights: Weights, plan: Plan, config: Config
) -> Tensor:
    """S_r Y_r (R_cap, d) of rows (R_cap, d) that are sorted by expert; zeros in gaps."""
    groups = groups_of(plan, rows.shape[0])
    y = _outputs(rows, weights, groups, config)
    if scores is not None:
        y = y * groups.mask(scores[:, None])
    return y.to(rows.dtype)


def groups_of(plan: Plan, num_rows: int) -> Groups:
    """The plan's counts and offsets, read as groups of rows without gaps; gaps are not live."""
    num_experts = plan.expert_counts.shape[0]
    ends = plan.expert_offsets[1:].clamp(max=num_rows)
    row = torch.arange(num_rows, dtype=ends.dtype, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)  # E past the last end
    inside = expert.clamp(max=num_experts - 1)
    since = row - plan.expert_offsets[inside]
    live = (expert < num_experts) & (since >= 0) & (since < plan.expert_counts[inside])
    return Groups(ends, inside, live[:, None])


def _outputs(rows: Tensor, weights: Weights, groups: Groups, config: Config) -> Tensor:
    """Y (R_cap, d) of rows (R_cap, d), masked; wider than they are where there is a bias."""
    output_major = config.weight_order == "output_major"

    def projected(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrices = weight.transpose(1, 2) if output_major else weight
        result = product(rows, matrices, groups.ends)
        if bias is not None:  # in the accumulator, where the sum is not rounded a second time
            wide = accumulator(rows.dtype)
            result = result.to(wide) + bias.to(wide)[groups.expert]
        return groups.mask(result)

    rows = groups.mask(rows)
    h = projected(rows, weights.w1, weights.b1)
    if weights.w1_up is not None:
        halves = (h, projected(rows, weights.w1_up, weights.b1_up))
    else:
        halves = _split(h, config)
    a = activated(halves, config).to(rows.dtype)
    return projected(a, weights.w2, weights.b2)


def _split(h: Tensor, config: Config) -> tuple[Tensor, ...]:
    """H as (gate, up), or as it is where there is no gate."""
    if config.halves == 1:
        return (h,)
    if config.gate_layout == "interleaved":
        return h[:, 0::2], h[:, 1::2]
    return h.chunk(2, dim=1)


class GradientWhere(torch.autograd.Function):
    """Weights (E, ...) as they are, whose gradient is zero for the experts that are not chosen."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, chosen: Tensor) -> Tensor:
        """The weight; chosen (E) bool."""
        ctx.save_for_backward(chosen)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient, filled with zeros."""
        (chosen,) = ctx.saved_tensors
        aside = ~chosen.reshape(-1, *(1,) * (gradient.ndim - 1))
        return gradient.masked_fill(aside, 0), None
