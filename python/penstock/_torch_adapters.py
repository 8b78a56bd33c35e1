# SPDX-License-Identifier: Apache-2.0
"""The passes of experts with adapters as torch.library operators, like _torch_ops.py.

The weights are frozen: the operator gives gradients of x, of the scores and of the adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock import _engine_adapters
from penstock._context import CallContext
from penstock._engine import Config, Plan, Weights
from penstock._engine_adapters import Adapters
from penstock._engine_backward import Saved
from penstock._torch_ops import absent, or_absent, refuse_second_order, rows_of_unit_stride

_DIFFERENTIABLE = 2 + len(Adapters._fields)


@torch.library.custom_op("penstock::adapted_experts", mutates_args=())
def adapted_experts(
    x: Tensor,
    scores: Tensor,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    w1: Tensor,
    w1_up: Tensor | None,
    w2: Tensor,
    b1: Tensor | None,
    b1_up: Tensor | None,
    b2: Tensor | None,
    expert_counts: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor | None,
    row_to_slot: Tensor | None,
    slot_to_row: Tensor | None,
    token_offsets: Tensor | None,
    top_k: int,
    config: str,
    clamp: list[float],
    context: str,
) -> tuple[Tensor, Tensor]:
    """Output (T, d) and H (R_cap, h), which has no elements unless save is preactivation."""
    routing = (row_to_token, row_to_slot, slot_to_row, token_offsets)
    output, h = _engine_adapters.adapted_forward(
        (x, scores, Weights(w1, w1_up, w2, b1, b1_up, b2)),
        Adapters(up_a, up_b, down_a, down_b),
        Plan(expert_counts, expert_offsets, *routing, top_k),
        Config.unpack(config, clamp),
        CallContext.unpack(context),
    )
    return output, or_absent(h, x)


@adapted_experts.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    x, w2, row_to_token, config = args[0], args[8], args[14], Config.unpack(args[19], args[20])
    output = x.new_empty(x.shape)
    if config.save != "preactivation":
        return output, absent(x)
    n = w2.shape[2 if config.weight_order == "output_major" else 1]
    rows = x.shape[0] if row_to_token is None else row_to_token.shape[0]
    return output, x.new_empty((rows, config.halves * n))


@torch.library.custom_op("penstock::adapted_experts_backward", mutates_args=())
def adapted_experts_backward(
    d_output: Tensor,
    x: Tensor,
    scores: Tensor,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    w1: Tensor,
    w1_up: Tensor | None,
    w2: Tensor,
    b1: Tensor | None,
    b1_up: Tensor | None,
    b2: Tensor | None,
    expert_counts: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor | None,
    row_to_slot: Tensor | None,
    slot_to_row: Tensor | None,
    token_offsets: Tensor | None,
    h: Tensor | None,
    wanted: list[bool],
    top_k: int,
    config: str,
    clamp: list[float],
    context: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six inputs of `adapted_experts`; no elements where not wanted."""
    routing = (row_to_token, row_to_slot, slot_to_row, token_offsets)
    saved = Saved(
        x,
        scores,
        Weights(w1, w1_up, w2, b1, b1_up, b2),
        Plan(expert_counts, expert_offsets, *routing, top_k),
        h,
        Config.unpack(config, clamp),
    )
    grads, adapter_grads = _engine_adapters.adapted_backward(
        rows_of_unit_stride(d_output),
        saved,
        Adapters(up_a, up_b, down_a, down_b),
        tuple(wanted),
        CallContext.unpack(context),
    )
    return tuple(or_absent(grad, x) for grad in (grads.x, grads.scores, *adapter_grads))


@adapted_experts_backward.register_fake
def _(d_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted = args[19]
    return tuple(
        source.new_empty(source.shape) if want else absent(args[0])
        for source, want in zip(args[:_DIFFERENTIABLE], wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.top_k, ctx.config, ctx.clamp, ctx.context = inputs
    h = output[1] if Config.unpack(ctx.config, ctx.clamp).save == "preactivation" else None
    ctx.save_for_backward(*tensors, h)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, d_output: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)
    if d_output is None:
        return (*((None,) * _DIFFERENTIABLE), *rest)
    wanted = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    grads = adapted_experts_backward(
        d_output, *ctx.saved_tensors, wanted, ctx.top_k, ctx.config, ctx.clamp, ctx.context
    )
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *rest)


adapted_experts.register_autograd(_grad, setup_context=_setup)
adapted_experts_backward.register_autograd(refuse_second_order("adapted_experts_backward"))
