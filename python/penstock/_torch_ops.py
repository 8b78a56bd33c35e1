# SPDX-License-Identifier: Apache-2.0
"""The engine's passes as torch.library operators in the namespace `penstock`, with autograd.

Every operator has a fake kernel, so that torch.compile and FakeTensorMode know the outputs' shapes
without running it. Settings and context travel as packed strings (Config.pack, CallContext.pack),
because an operator's schema carries no structs; _torch_library.py puts them together again. A
gradient operator has no gradient of its own: asking for one is a clear error. Imported by
functional.py at the first call with a torch tensor.

Shapes as in _engine.py. An absent output (H unless it is kept, a gradient that is not wanted) is a
tensor of no elements, because an operator cannot return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penstock import _engine, _engine_backward
from penstock._context import CallContext
from penstock._engine import Config, Weights
from penstock._engine_backward import Into, Saved
from penstock._torch_library import (
    BACKWARD,
    BACKWARD_OVER_H,
    CONTEXT,
    FORWARD,
    WEIGHTS,
    Group,
    Pass,
    Signature,
    differentiate,
    operator,
)

_DIFFERENTIABLE = 2 + len(Weights._fields)  # of the arguments of `experts`, the first
_ROWS = Group("Tensor x, Tensor? scores", lambda *rows: rows)
_TRAINABLE = Group("Tensor? trainable")


def absent(like: Tensor) -> Tensor:
    """What stands for no tensor among an operator's outputs."""
    return like.new_empty((0,))


def or_absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    """`tensor`, or what stands for none."""
    return absent(like) if tensor is None else tensor


def refuse_second_order(op: torch._ops.OpOverload) -> None:
    """Make the gradient of a gradient operator an error."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"second-order gradients: got a backward pass through {op.name()}, expected first "
            "order only. Call backward without create_graph, or use plain torch operations for "
            "this layer"
        )

    differentiate(op, backward)


def _router_logits_fake(x: Tensor, weight: Tensor, context: CallContext) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


@operator(
    "router_logits",
    Signature(Group("Tensor x"), Group("Tensor weight"), CONTEXT),
    1,
    _router_logits_fake,
)
def router_logits(x: Tensor, weight: Tensor, context: CallContext) -> Tensor:
    """Logits (T, E) of x (T, d) and the router's weight (E, d), in fp32 (float64 for float64)."""
    return _engine.router_logits(x, weight, context)


def _router_logits_backward_fake(
    dlogits: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], *rest: Any
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if wanted[0] else absent(x),
        x.new_empty(weight.shape) if wanted[1] else absent(x),
    )


@operator(
    "router_logits_backward",
    Signature(
        Group("Tensor dlogits"),
        Group("Tensor x"),
        Group("Tensor weight"),
        Group("bool[] wanted"),
        CONTEXT,
        Group("Tensor? addend=None"),
    ),
    2,
    _router_logits_backward_fake,
)
def router_logits_backward(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    wanted: list[bool],
    context: CallContext,
    addend: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, plus `addend`, and of the router's weight; no elements where not wanted."""
    dx, dweight = _engine.router_logits_backward(
        dlogits.contiguous(),
        x,
        weight,
        (wanted[0], wanted[1]),
        None if addend is None else rows_of_unit_stride(addend),
        context,
    )
    return or_absent(dx, x), or_absent(dweight, x)


def _router_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.context = inputs
    ctx.save_for_backward(x, weight)


def _router_logits_grad(ctx: Any, dlogits: Tensor, addend: Tensor | None = None) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    addend = addend if wanted[0] else None
    dx, dweight = router_logits_backward(dlogits, x, weight, wanted, ctx.context, addend)
    return dx if wanted[0] else None, dweight if wanted[1] else None, None


differentiate(router_logits, _router_logits_grad, _router_logits_setup)
refuse_second_order(router_logits_backward)


class LogitsAndInput(torch.autograd.Function):
    """Logits of x, and x for its other uses.

    What comes back from those uses is added inside the product that makes the logits' share of the
    gradient of x, instead of by an addition of its own over all of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, context: str) -> tuple[Tensor, Tensor]:
        """Like router_logits, and a view of x."""
        ctx.save_for_backward(x, weight)
        ctx.context = context
        ctx.set_materialize_grads(False)
        return router_logits(x, weight, context), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None, dx: Tensor | None) -> tuple[Any, ...]:
        """Gradients of x and of the weight."""
        return (dx, None, None) if dlogits is None else _router_logits_grad(ctx, dlogits, dx)


def _plan_fake(
    ids: Tensor, token_offsets: Tensor | None, shape: tuple[int, int], context: CallContext
) -> tuple[Tensor, ...]:
    slots, num_experts = ids.shape[0], shape[1]
    sizes = (num_experts, num_experts + 1, slots, slots, slots)
    return tuple(ids.new_empty((size,), dtype=torch.int32) for size in sizes)


@operator(
    "plan",
    Signature(
        Group("Tensor ids"),
        Group("Tensor? token_offsets"),
        Group("SymInt num_tokens, SymInt num_experts", lambda *shape: shape),
        CONTEXT,
    ),
    5,
    _plan_fake,
)
def plan(
    ids: Tensor, token_offsets: Tensor | None, shape: tuple[int, int], context: CallContext
) -> tuple[Tensor, ...]:
    """expert_counts, expert_offsets, row_to_token, row_to_slot, slot_to_row of flat ids (slots)."""
    return _engine.build_plan(ids, token_offsets, shape, context)[:5]


def fake_output_and_h(x: Tensor, w2: Tensor, the_pass: Pass) -> tuple[Tensor, Tensor]:
    """What a forward pass over the experts returns, without its values."""
    routing, config = the_pass.plan, the_pass.config
    output = x.new_empty(x.shape)
    if config.save != "preactivation":
        return output, absent(x)
    n = w2.shape[2 if config.weight_order == "output_major" else 1]
    return output, x.new_empty((routing.row_capacity(x.shape[0]), config.halves * n))


def fake_gradients(inputs: Sequence[Tensor | None], wanted: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of x and the other inputs, without their values; no elements where not wanted."""
    return tuple(
        given.new_empty(given.shape) if want and given is not None else absent(inputs[0])
        for given, want in zip(inputs, wanted, strict=True)
    )


@operator(
    "experts",
    Signature(_ROWS, WEIGHTS, _TRAINABLE, FORWARD),
    2,
    lambda rows, weights, trainable, the_pass: fake_output_and_h(rows[0], weights.w2, the_pass),
)
def experts(
    rows: tuple[Tensor, Tensor | None], weights: Weights, trainable: Tensor | None, the_pass: Pass
) -> tuple[Tensor, Tensor]:
    """Output (T, d) and H (R_cap, h), which has no elements unless save is preactivation."""
    x, scores = rows
    output, h = _engine.experts_forward(
        x, scores, weights, the_pass.plan, the_pass.config, the_pass.context
    )
    return output, or_absent(h, x)


def _experts_backward(
    d_output: Tensor,
    rows: tuple[Tensor, Tensor | None],
    weights: Weights,
    trainable: Tensor | None,
    the_pass: Pass,
) -> tuple[Tensor, ...]:
    """Gradients of the first eight inputs of `experts`; no elements where not wanted."""
    saved = Saved(*rows, weights, the_pass.plan, the_pass.h, the_pass.config)
    x_wanted, scores_wanted, *weights_wanted = the_pass.wanted
    into = _engine_backward.new_weight_grads(saved, Weights(*weights_wanted), trainable)
    dx, dscores, dweights = _engine_backward.experts_backward(
        rows_of_unit_stride(d_output),
        saved,
        (x_wanted, scores_wanted),
        Into(into, "overwrite", trainable),
        the_pass.context,
    )
    return tuple(or_absent(grad, saved.x) for grad in (dx, dscores, *dweights))


def _experts_backward_fake(
    d_output: Tensor, rows: tuple[Tensor, Tensor | None], weights: Weights, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients((*rows, *weights), rest[-1].wanted)


def _experts_backward_over_h(d_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same where kept_h is "overwritten": for the last pass over a graph.

    Such a pass creates no graph (for_this_pass), so nobody can ask for this operator's gradient.
    """
    torch.autograd.graph.increment_version(rest[-1].h)
    return _experts_backward(d_output, *rest)


_BACKWARD_INPUTS = (Group("Tensor d_output"), _ROWS, WEIGHTS, _TRAINABLE)
experts_backward = operator(
    "experts_backward",
    Signature(*_BACKWARD_INPUTS, BACKWARD),
    _DIFFERENTIABLE,
    _experts_backward_fake,
)(_experts_backward)
experts_backward_over_h = operator(
    "experts_backward_over_h",
    Signature(*_BACKWARD_INPUTS, BACKWARD_OVER_H),
    _DIFFERENTIABLE,
    _experts_backward_fake,
)(_experts_backward_over_h)


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.top_k, ctx.config, ctx.clamp, ctx.context = inputs
    kept = (tensor if tensor.ndim == 2 else None for tensor in output[1:])  # absent ones have 1
    ctx.save_for_backward(*tensors, *kept)
    ctx.set_materialize_grads(False)


def differentiate_experts(
    op: torch._ops.OpOverload, by_kept_h: dict[str, torch._ops.OpOverload], num_inputs: int
) -> None:
    """Gradients of the first inputs of a forward pass over the experts.

    by_kept_h: the backward pass's operator for each Config.kept_h that `op` is called with.
    """

    def backward(ctx: Any, d_output: Tensor | None, *of_kept: Tensor | None) -> tuple[Any, ...]:
        if d_output is None:
            return (None,) * len(ctx.needs_input_grad)
        config = Config.unpack(ctx.config, ctx.clamp)
        if config.save == "nothing":
            raise RuntimeError(
                'save: got "nothing" and a backward pass, expected "preactivation" or "input". '
                "Pass one of these to keep what backward needs"
            )
        config = for_this_pass(config)
        wanted = list(ctx.needs_input_grad[:num_inputs])
        settings = (ctx.top_k, config.pack(), config.clamp, ctx.context)
        grads = by_kept_h[config.kept_h](d_output, *ctx.saved_tensors, wanted, *settings)
        without = (None,) * (len(ctx.needs_input_grad) - num_inputs)
        return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *without)

    differentiate(op, backward, _experts_setup)


differentiate_experts(
    experts,
    {"preserved": experts_backward, "overwritten": experts_backward_over_h},
    _DIFFERENTIABLE,
)
refuse_second_order(experts_backward)


def for_this_pass(config: Config) -> Config:
    """The settings of the backward pass that autograd is running.

    H is overwritten only where that is allowed, the graph is let go of behind the pass, and no
    graph of the pass itself is made, which may need H again.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    last = config.save == "preactivation" and eager and not kept()
    return config if last else config._replace(kept_h="preserved")


def rows_of_unit_stride(rows: Tensor) -> Tensor:
    """`rows` itself, or a packed copy when its last stride is not 1 (an expanded gradient)."""
    unit = rows.stride(-1) == 1 or rows.shape[-1] == 1
    return rows if unit and rows.stride(0) >= rows.shape[-1] else rows.contiguous()
