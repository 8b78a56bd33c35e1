# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters on experts (LoRA, arXiv 2106.09685), computed inside the grouped products.

    W1_e + B1_e A1_e in the place of W1_e, W2_e + B2_e A2_e in the place of W2_e

without forming either sum: the factors' products are terms of the sums of the weights' products.
Weights and their biases are frozen. For models adapted by PEFT, see penstock.hf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock import functional
from penstock._context import current, torch_refusal
from penstock._engine import Config, Plan, Weights, check_operands
from penstock._engine_adapters import Adapters
from penstock._torch_operations import torch_is_chosen
from penstock._torch_ops import rows_of_unit_stride
from penstock.errors import invalid
from penstock.routing import Routing

__all__ = ["Adapters", "adapted_experts", "merge_", "on_experts", "unmerge_"]

_RANK_GRANULE = 8  # elements of two bytes in one of the GPU's 16-byte copies


def adapted_experts(
    x: Tensor,
    w1: Any,
    w2: Tensor,
    topk_scores: Tensor | Routing,
    topk_ids: Tensor | None = None,
    *,
    adapters: Adapters,
    b1: Any = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    gate_layout: str = "concatenated",
    weight_order: str = "output_major",
    save: str = "preactivation",
    clamp_alpha: float = 1.702,
    clamp_limit: float = 7.0,
    plan: Plan | None = None,
) -> Tensor:
    """functional.moe_experts with adapters beside frozen weights.

    adapters: Adapters(up_a (E, r1, d), up_b (E, h, r1), down_a (E, r2, n), down_b (E, d, r2)), of
    x's dtype, each pair or None; ranks may differ. The usual scale alpha / r is part of the B's.
    The rows of up_b are in the order of W1's outputs, whatever gate_layout and weight_order are.
    Each factor needs stride 1 in one of its last two axes. Everything else is as for moe_experts.

    Differentiable once in x, scores and the adapters' factors. ValueError where a weight or bias
    wants a gradient, and for what moe_experts refuses. On a GPU weights must be output_major, and
    factors whose rank is not a multiple of 8 are copied, padded with zeros.
    """
    if torch_is_chosen():
        raise torch_refusal("adapted_experts", "a call", "Merge the adapters (merge_)")
    weights = functional.weights_of((w1, w2), (b1, b2))
    routing = functional.routing_of(x, topk_scores, topk_ids)
    _check_frozen(weights)
    _check_factors(x, adapters)
    check_operands(x, weights)
    if plan is None:
        plan = functional.plan(routing, w2.shape[0])
    config = Config(activation, gate_layout, weight_order, save, clamp_alpha, clamp_limit)
    if x.is_cuda:
        adapters = _in_whole_vectors(adapters)
    tensors = [t for t in (x, routing.scores, *adapters) if t is not None]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        config = config._replace(save="nothing")
    from penstock import _torch_adapters

    context = "" if torch.compiler.is_compiling() else current().pack()
    output, *_ = _torch_adapters.adapted_experts(
        rows_of_unit_stride(x), routing.scores.contiguous(), *adapters, *weights, *plan,
        config.pack(), config.clamp, context,
    )  # fmt: skip
    return output


def on_experts(adapters: Adapters, experts: Tensor, num_experts: int) -> Adapters:
    """Adapters of some experts as adapters of all, zero elsewhere.

    adapters: factors with E' experts; experts (E') int64: which of the num_experts they belong to.
    The factors are small; no weight is involved. Differentiable in the factors.
    """

    def spread(factor: Tensor | None) -> Tensor | None:
        if factor is None:
            return None
        everywhere = factor.new_zeros((num_experts, *factor.shape[1:]))
        return everywhere.index_copy(0, experts, factor)

    return Adapters(*(spread(factor) for factor in adapters))


@torch.no_grad()
def merge_(
    w1: Tensor, w2: Tensor, adapters: Adapters, *, weight_order: str = "output_major"
) -> None:
    """Add the adapters to the weights in place: W += B A. Afterwards use moe_experts."""
    _add_product(w1, w2, adapters, weight_order, alpha=1)


@torch.no_grad()
def unmerge_(
    w1: Tensor, w2: Tensor, adapters: Adapters, *, weight_order: str = "output_major"
) -> None:
    """Subtract what merge_ added; the weights come back up to rounding of their dtype."""
    _add_product(w1, w2, adapters, weight_order, alpha=-1)


def _in_whole_vectors(adapters: Adapters) -> Adapters:
    """The adapters as the GPU reads them: last axis contiguous, rank a multiple of 16 bytes.

    The columns of B and rows of A that are added are zero, so no result changes.
    """

    def padded(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if a is None or b is None:
            return a, b
        missing = -a.shape[1] % _RANK_GRANULE
        if missing == 0:  # F.pad would copy
            return a.contiguous(), b.contiguous()
        return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()

    return Adapters(
        *padded(adapters.up_a, adapters.up_b), *padded(adapters.down_a, adapters.down_b)
    )


def _add_product(
    w1: Tensor, w2: Tensor, adapters: Adapters, weight_order: str, *, alpha: float
) -> None:
    pairs = ((w1, adapters.up_b, adapters.up_a), (w2, adapters.down_b, adapters.down_a))
    for weight, b, a in pairs:
        if a is None:
            continue
        output_major = weight if weight_order == "output_major" else weight.transpose(1, 2)
        for expert in range(weight.shape[0]):  # one at a time: no product of all experts at once
            output_major[expert].addmm_(b[expert], a[expert], alpha=alpha)


def _check_frozen(weights: Weights) -> None:
    for name, tensor in weights._asdict().items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise invalid(
                f"gradient of {name}",
                "a weight with requires_grad",
                "frozen weights beside adapters",
                "Call requires_grad_(False) on it, or merge the adapters and train the weights",
            )


def _check_factors(x: Tensor, adapters: Adapters) -> None:
    for name, factor in adapters._asdict().items():
        if factor is not None and (factor.dtype != x.dtype or factor.device != x.device):
            raise invalid(
                f"adapters.{name}",
                f"{factor.dtype} on {factor.device}",
                f"{x.dtype} on {x.device}, as x",
                "Convert it with .to(x)",
            )
    for a, b in (("up_a", "up_b"), ("down_a", "down_b")):
        if (getattr(adapters, a) is None) != (getattr(adapters, b) is None):
            raise invalid(f"adapters.{a} and {b}", "one of them", "both or neither", "Pass both")
