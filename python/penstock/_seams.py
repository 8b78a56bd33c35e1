# SPDX-License-Identifier: Apache-2.0
"""Experts whose weight gradients do not go through autograd: main_grad and delayed gradients.

Both change state outside the graph, so this is an eager autograd.Function and not an operator:
torch.compile breaks the graph here. Called by functional.py when either seam is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from penstock import _engine, _engine_backward
from penstock._context import CallContext
from penstock._engine import Config, Plan, Weights
from penstock._engine_backward import NOTHING, Into, Saved
from penstock._torch_ops import for_this_pass, rows_of_unit_stride
from penstock.errors import invalid


class DelayedWeightGrads:
    """Weight gradients that backward has put off, for pipeline schedules.

    Pass one to functional.moe_experts(delayed=...). Backward then computes the gradients of x and
    the scores only; run() computes those of the weights, in the order of the backward passes, and
    adds them to each parameter's main_grad where main_grad=True was given, else to its .grad.
    What is kept until run(): x, dH (R_cap, h), A' (R_cap, n), the output's gradient, the plan.
    """

    def __init__(self) -> None:
        self._pending: list[Callable[[], None]] = []

    def __len__(self) -> int:
        """Backward passes whose weight gradients are still to be computed."""
        return len(self._pending)

    def add(self, work: Callable[[], None]) -> None:
        """Put one backward pass's work off."""
        self._pending.append(work)

    def run(self) -> None:
        """Compute what is pending. A pass that raises stays pending, with those after it."""
        while self._pending:
            self._pending[0]()
            self._pending.pop(0)


class ExpertsWithSeams(torch.autograd.Function):
    """The experts with weight gradients into main_grad, or later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor | None, options: Any, *weights: Any) -> Tensor:
        """Like the operator penstock::experts; options is (plan, config, context, seams)."""
        plan, config, context, seams = options
        output, h = _engine.experts_forward(x, scores, Weights(*weights), plan, config, context)
        ctx.save_for_backward(x, scores, *weights, h, seams.trainable, *plan[:-1])
        ctx.options = (plan.top_k, config, context, seams)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Any, ...]:
        """Gradients of x and scores; the weights' where no seam takes them."""
        x, scores, *tensors = ctx.saved_tensors
        weights, (h, trainable, *arrays) = Weights(*tensors[:6]), tensors[6:]
        top_k, config, context, seams = ctx.options
        saved = Saved(x, scores, weights, Plan(*arrays, top_k), h, for_this_pass(config))
        d_output = rows_of_unit_stride(d_output)
        data_wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        weights_wanted = Weights(*ctx.needs_input_grad[3:])
        if seams.delayed is not None:
            grads, delayed = _engine_backward.experts_backward_data(
                d_output, saved, data_wanted, context
            )
            kept = saved._replace(h=None)

            def later() -> None:
                into = _destinations(kept, weights_wanted, trainable, seams.main_grad)
                _engine_backward.experts_backward_weights(d_output, kept, delayed, into, context)
                _add_to_grads(kept.weights, into.weights, seams.main_grad)

            seams.delayed.add(later)
            return (grads.x, grads.scores, None, *NOTHING)
        into = _destinations(saved, weights_wanted, trainable, seams.main_grad)
        grads = _engine_backward.experts_backward(d_output, saved, data_wanted, into, context)
        through_autograd = (
            None if _main_grad_of(weight, seams.main_grad) is not None else grad
            for weight, grad in zip(weights, into.weights, strict=True)
        )
        return (grads.x, grads.scores, None, *through_autograd)


class Seams:
    """Which seams a call uses; see functional.moe_experts."""

    def __init__(self, main_grad: bool, delayed: DelayedWeightGrads | None, trainable: Any):
        self.main_grad = main_grad
        self.delayed = delayed
        self.trainable = trainable


def experts_with_seams(
    operands: tuple[Tensor, Any, Weights], plan: Plan, config: Config, seams: Seams
) -> Tensor:
    """Output of the experts; operands are (x, scores, weights)."""
    x, scores, weights = operands
    context = CallContext.unpack("")
    return ExpertsWithSeams.apply(x, scores, (plan, config, context, seams), *weights)


def _main_grad_of(weight: Tensor | None, enabled: bool) -> Tensor | None:
    return getattr(weight, "main_grad", None) if enabled and weight is not None else None


def _destinations(saved: Saved, wanted: Weights, trainable: Any, main_grad: bool) -> Into:
    """main_grad where there is one, else fresh tensors; one mode serves all of them.

    Accumulating into fresh tensors needs zeros in them.
    """
    mains = [_main_grad_of(weight, main_grad) for weight in saved.weights]
    accumulate = any(main is not None for main in mains)
    fresh = []
    for weight, want, main in zip(saved.weights, wanted, mains, strict=True):
        if weight is None or not want:
            fresh.append(None)
        elif main is not None:
            fresh.append(main)
        else:
            zeroed = accumulate or trainable is not None
            fresh.append(
                (torch.zeros if zeroed else torch.empty)(
                    weight.shape, dtype=weight.dtype, device=weight.device
                )
            )
    return Into(Weights(*fresh), "accumulate" if accumulate else "overwrite", trainable)


def _add_to_grads(weights: Weights, grads: Weights, main_grad: bool) -> None:
    for weight, grad in zip(weights, grads, strict=True):
        if grad is None or _main_grad_of(weight, main_grad) is not None:
            continue
        if not weight.is_leaf:
            raise invalid(
                "delayed weight gradients",
                "a weight that is computed from others",
                "parameters (leaves), whose .grad can be written after backward",
                "Pass the parameter itself, or leave delayed out",
            )
        weight.grad = grad if weight.grad is None else weight.grad + grad
