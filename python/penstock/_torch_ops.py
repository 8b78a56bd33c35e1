# SPDX-License-Identifier: Apache-2.0
"""The engine's passes as torch.library operators in the namespace `penstock`, with autograd.

Every operator has a fake kernel, so that torch.compile and FakeTensorMode know the outputs' shapes
without running it. Settings and context travel as packed strings (Config.pack, CallContext.pack),
because an operator's schema carries no structs. A gradient operator has no gradient of its own:
asking for one is a clear error. Imported by functional.py at the first call with a torch tensor.

Shapes as in _engine.py. An absent output (H unless it is kept, a gradient that is not wanted) is a
tensor of no elements, because an operator cannot return None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock import _engine, _engine_backward
from penstock._context import CallContext
from penstock._engine import Config, Plan, Weights
from penstock._engine_backward import Into, Saved

_WEIGHTS = len(Weights._fields)


def absent(like: Tensor) -> Tensor:
    """What stands for no tensor among an operator's outputs."""
    return like.new_empty((0,))


def or_absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    """`tensor`, or what stands for none."""
    return absent(like) if tensor is None else tensor


def refuse_second_order(name: str) -> Any:
    """The backward formula of a gradient operator: an error."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"second-order gradients: got a backward pass through penstock::{name}, expected first "
            "order only. Call backward without create_graph, or use plain torch operations for "
            "this layer"
        )

    return backward


@torch.library.custom_op("penstock::router_logits", mutates_args=())
def router_logits(x: Tensor, weight: Tensor, context: str) -> Tensor:
    """Logits (T, E) of x (T, d) and the router's weight (E, d), in fp32 (float64 for float64)."""
    return _engine.router_logits(x, weight, CallContext.unpack(context))


@router_logits.register_fake
def _(x: Tensor, weight: Tensor, context: str) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.custom_op("penstock::router_logits_backward", mutates_args=())
def router_logits_backward(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    wanted: list[bool],
    context: str,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, plus `addend`, and of the router's weight; no elements where not wanted."""
    dx, dweight = _engine.router_logits_backward(
        dlogits.contiguous(),
        x,
        weight,
        (wanted[0], wanted[1]),
        None if addend is None else rows_of_unit_stride(addend),
        CallContext.unpack(context),
    )
    return or_absent(dx, x), or_absent(dweight, x)


@router_logits_backward.register_fake
def _(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    wanted: list[bool],
    context: str,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if wanted[0] else absent(x),
        x.new_empty(weight.shape) if wanted[1] else absent(x),
    )


def _router_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.context = inputs
    ctx.save_for_backward(x, weight)


def _router_logits_grad(ctx: Any, dlogits: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    dx, dweight = router_logits_backward(dlogits, x, weight, wanted, ctx.context)
    return dx if wanted[0] else None, dweight if wanted[1] else None, None


router_logits.register_autograd(_router_logits_grad, setup_context=_router_logits_setup)


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
        if dlogits is None:
            return dx, None, None
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        addend = dx if wanted[0] else None
        dx, dweight = router_logits_backward(dlogits, x, weight, wanted, ctx.context, addend)
        return dx if wanted[0] else None, dweight if wanted[1] else None, None


@torch.library.custom_op("penstock::plan", mutates_args=())
def plan(
    ids: Tensor, token_offsets: Tensor | None, num_tokens: int, num_experts: int, context: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """expert_counts, expert_offsets, row_to_token, row_to_slot, slot_to_row of flat ids (slots)."""
    built = _engine.build_plan(
        ids, token_offsets, (num_tokens, num_experts), CallContext.unpack(context)
    )
    return built[:5]


@plan.register_fake
def _(
    ids: Tensor, token_offsets: Tensor | None, num_tokens: int, num_experts: int, context: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots = ids.shape[0]
    sizes = (num_experts, num_experts + 1, slots, slots, slots)
    counts, offsets, *maps = (ids.new_empty((size,), dtype=torch.int32) for size in sizes)
    return counts, offsets, maps[0], maps[1], maps[2]


@torch.library.custom_op("penstock::experts", mutates_args=())
def experts(
    x: Tensor,
    scores: Tensor | None,
    w1: Tensor,
    w1_up: Tensor | None,
    w2: Tensor,
    b1: Tensor | None,
    b1_up: Tensor | None,
    b2: Tensor | None,
    trainable: Tensor | None,
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
    output, h = _engine.experts_forward(
        x,
        scores,
        Weights(w1, w1_up, w2, b1, b1_up, b2),
        Plan(expert_counts, expert_offsets, *routing, top_k),
        Config.unpack(config, clamp),
        CallContext.unpack(context),
    )
    return output, or_absent(h, x)


@experts.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, *weights = args[: 2 + _WEIGHTS]
    row_to_token, config = args[11], Config.unpack(args[16], args[17])
    output = x.new_empty(x.shape)
    if config.save != "preactivation":
        return output, absent(x)
    w2 = weights[2]
    n = w2.shape[2 if config.weight_order == "output_major" else 1]
    rows = x.shape[0] if row_to_token is None else row_to_token.shape[0]
    return output, x.new_empty((rows, config.halves * n))


@torch.library.custom_op("penstock::experts_backward", mutates_args=())
def experts_backward(
    d_output: Tensor,
    x: Tensor,
    scores: Tensor | None,
    w1: Tensor,
    w1_up: Tensor | None,
    w2: Tensor,
    b1: Tensor | None,
    b1_up: Tensor | None,
    b2: Tensor | None,
    trainable: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight inputs of `experts`; no elements where not wanted."""
    routing = (row_to_token, row_to_slot, slot_to_row, token_offsets)
    saved = Saved(
        x,
        scores,
        Weights(w1, w1_up, w2, b1, b1_up, b2),
        Plan(expert_counts, expert_offsets, *routing, top_k),
        h,
        Config.unpack(config, clamp),
    )
    grads = _engine_backward.new_weight_grads(saved, Weights(*wanted[2:]), trainable)
    dx, dscores, dweights = _engine_backward.experts_backward(
        rows_of_unit_stride(d_output),
        saved,
        (wanted[0], wanted[1]),
        Into(grads, "overwrite", trainable),
        CallContext.unpack(context),
    )
    return tuple(or_absent(grad, x) for grad in (dx, dscores, *dweights))


_SCHEMA = str(experts_backward._opoverload._schema).removeprefix("penstock::experts_backward")


@torch.library.custom_op(
    "penstock::experts_backward_over_h",
    mutates_args=("h",),
    schema=_SCHEMA.replace("Tensor? h,", "Tensor(a!)? h,"),
)
def experts_backward_over_h(*arguments: Any) -> tuple[Tensor, ...]:
    """The same where kept_h is "overwritten": for the last pass over a graph.

    Such a pass never creates a graph, so nobody can ask for this operator's gradient.
    """
    return experts_backward(*arguments)


@experts_backward.register_fake
@experts_backward_over_h.register_fake
def _(d_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, wanted = args[0], args[16]
    return tuple(
        source.new_empty(source.shape) if want and source is not None else absent(x)
        for source, want in zip(args[: 2 + _WEIGHTS], wanted, strict=True)
    )


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.top_k, ctx.config, ctx.clamp, ctx.context = inputs
    h = output[1] if Config.unpack(ctx.config, ctx.clamp).save == "preactivation" else None
    ctx.save_for_backward(*tensors, h)
    ctx.set_materialize_grads(False)


def _experts_grad(ctx: Any, d_output: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 11
    if d_output is None:
        return (*((None,) * 8), *rest)
    config = Config.unpack(ctx.config, ctx.clamp)
    if config.save == "nothing":
        raise RuntimeError(
            'save: got "nothing" and a backward pass, expected "preactivation" or "input". '
            "Pass one of these to keep what backward needs"
        )
    wanted = list(ctx.needs_input_grad[: 2 + _WEIGHTS])
    config = for_this_pass(config)
    backward = experts_backward if config.kept_h == "preserved" else experts_backward_over_h
    grads = backward(
        d_output, *ctx.saved_tensors, wanted, ctx.top_k, config.pack(), config.clamp, ctx.context
    )
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *rest)


experts.register_autograd(_experts_grad, setup_context=_experts_setup)


def for_this_pass(config: Config) -> Config:
    """The settings of the backward pass that autograd is running.

    H is overwritten only where that is allowed and the graph is let go of behind the pass.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    last = config.save == "preactivation" and not torch.compiler.is_compiling() and not kept()
    return config if last else config._replace(kept_h="preserved")


def rows_of_unit_stride(rows: Tensor) -> Tensor:
    """`rows` itself, or a packed copy when its last stride is not 1 (an expanded gradient)."""
    unit = rows.stride(-1) == 1 or rows.shape[-1] == 1
    return rows if unit and rows.stride(0) >= rows.shape[-1] else rows.contiguous()


for _op in (router_logits_backward, experts_backward):
    _op.register_autograd(refuse_second_order(_op._opoverload._schema.name.split("::")[1]))
