# SPDX-License-Identifier: Apache-2.0
"""The engine as functions, on torch tensors (with autograd) or NumPy arrays.

Shapes: T tokens, d hidden, n intermediate, h = 2n gated or n, E experts, K experts per token,
R_cap = T K rows. The mathematics is in docs/python.md:
    H_r = x_t W1_e^T + b1_e     A_r = act(H_r)     Y_r = A_r W2_e^T + b2_e     O_t = sum_r S_r Y_r
For NumPy, or without autograd, moe_experts_forward and moe_experts_backward are the explicit pair.

Errors of every function: ValueError for a shape, dtype, device or value that the contract excludes;
UnsupportedError (a RuntimeError) where no backend can run the call, or not the one chosen by name.
"""

from __future__ import annotations

from typing import Any

from penstock import _engine, _engine_backward, _engine_route, routers
from penstock._arrays import TorchArrays, arrays_of, is_torch
from penstock._context import current, refuse_torch
from penstock._engine import Config, Plan, Weights
from penstock._engine_backward import Grads, Into, Saved
from penstock._engine_route import Routed, RouterSpec
from penstock._sizes import saved_bytes, tile_rows, workspace_bytes
from penstock.errors import invalid
from penstock.routing import SOFTMAX_ROUTERS, Routing, router_name

__all__ = [
    "Config",
    "Grads",
    "Plan",
    "Routing",
    "Saved",
    "Weights",
    "experts_on_rows",
    "logits_and_input",
    "moe_experts",
    "moe_experts_backward",
    "moe_experts_forward",
    "plan",
    "route",
    "route_backward",
    "router_logits",
    "router_logits_backward",
    "saved_bytes",
    "tile_rows",
    "workspace_bytes",
]

_BY_AUTOGRAD = "Use router_logits, route and moe_experts on torch tensors, with autograd"


def router_logits(x: Any, router_weight: Any) -> Any:
    """Logits (T, E) = x Wr^T, in fp32 (float64 for float64 x); one token's never depend on others.

    x (T, d), router_weight (E, d), of one dtype. torch: differentiable in both.
    """
    if is_torch(x):
        return _operations().router_logits(x, router_weight)
    return _engine.router_logits(x, router_weight, current())


def logits_and_input(x: Any, router_weight: Any) -> tuple[Any, Any]:
    """router_logits of a torch tensor, and x for its other uses, such as the experts.

    The gradient of those uses is added to that of the logits inside one product. x as in
    router_logits, of the weight's dtype.
    """
    import torch

    if not (torch.is_grad_enabled() and x.requires_grad):
        return router_logits(x, router_weight), x
    return _operations().logits_and_input(x, router_weight)


def router_logits_backward(dlogits: Any, x: Any, router_weight: Any) -> tuple[Any, Any]:
    """Gradients (dx (T, d), drouter_weight (E, d)) of router_logits, for NumPy or by hand."""
    refuse_torch("router_logits_backward", _BY_AUTOGRAD)
    return _engine.router_logits_backward(dlogits, x, router_weight, (True, True), None, current())


def route(logits: Any, top_k: int, *, router: str = "softmax_topk", **options: Any) -> Routing:
    """Choose the experts of each token, by the name of one of penstock.routers.

    logits (T, E) fp32 or float64. router: "softmax_topk" (softmax over the chosen logits, Mixtral),
    "topk_softmax" (softmax over all E, then choose; Switch Transformer, arXiv 2101.03961), the
    latter with renormalize=True divided by the sum of the chosen; "sigmoid_topk", "token_rounding",
    "expert_choice", "threshold". options: those of the function of that name in penstock.routers.
    Experts come by falling logit, ties by the lower id; a NaN logit ranks below every number, so
    ids are distinct and valid. torch: the scores are differentiable in the logits.
    """
    if router in SOFTMAX_ROUTERS:
        router = router_name(router, options.pop("renormalize", None))
    return routers.route_by_name(logits, top_k, router, options)


def route_backward(
    dscores: Any,
    logits: Any,
    routing: Routing,
    *,
    router: str | None = None,
    renormalize: bool | None = None,
) -> Any:
    """The logits' gradient (T, E) from that of the scores, for NumPy arrays or by hand.

    dscores: (T, K), or flat over slots. router and renormalize: for a routing that no function of
    penstock made, one of the softmax routers.
    """
    refuse_torch("route_backward", _BY_AUTOGRAD)
    spec = routing.router
    if router is not None or spec is None:
        spec = RouterSpec(router_name(router or "softmax_topk", renormalize), top_k=routing.top_k)
    arrays = (routing.scores, routing.ids)
    if spec.fixed_top_k():
        arrays = routing.topk()
    routed = Routed(*arrays, routing.token_offsets)
    dscores = dscores.reshape(arrays[0].shape)
    return _engine_route.route_backward(dscores, (logits, routed), logits.shape[1], spec, current())


def make_plan(routing: Routing, num_experts: int) -> Plan:
    """The routing's plan: int32 arrays that sort its slots by expert, inside an expert by slot.

    Inside `penstock.backend(id_checks="checked")` a negative id other than -1, or an expert twice
    in one token, is a ValueError; otherwise any id outside [0, E) skips its slot. A routing that
    carries its plan, for as many experts, gives that.
    """
    if routing.plan is not None and routing.plan.serves(routing, num_experts):
        return routing.plan.plan
    if is_torch(routing.ids):
        return _operations().plan(routing, num_experts)
    shape = (routing.num_tokens, num_experts)
    return _engine.build_plan(routing.ids, routing.token_offsets, shape, current())


plan = make_plan  # the public name, which the argument of moe_experts hides there


def moe_experts(
    x: Any,
    w1: Any,
    w2: Any,
    topk_scores: Any,
    topk_ids: Any = None,
    *,
    b1: Any = None,
    b2: Any = None,
    activation: str = "swiglu",
    gate_layout: str = "concatenated",
    weight_order: str = "output_major",
    save: str = "preactivation",
    order: str = "fast",
    clamp_alpha: float = 1.702,
    clamp_limit: float = 7.0,
    plan: Plan | None = None,
    trainable: Any = None,
    main_grad: bool = False,
    delayed: Any = None,
) -> Any:
    """Experts of a Mixture-of-Experts layer: O_t = sum over the chosen experts of S * expert(x_t).

    x (T, d). w1 (E, h, d), or a pair (gate, up) of (E, n, d) each; w2 (E, d, n). With
    weight_order="input_major": (E, d, h) and (E, n, d), as gpt-oss stores them. Any expert stride,
    but the last axis or the one before it packed; weights are never copied. b1 (E, h) or a pair of
    (E, n), b2 (E, d). All of one dtype: bfloat16, float16, float32, float64 (reference backend).
    topk_scores (T, K) fp32 (float64 for float64 x) with topk_ids (T, K) int32 or int64, where -1 or
    any id >= E skips; or a Routing in place of both. Returns O (T, d), dtype of x.

    activation: swiglu, geglu, reglu, swiglu_clamped (gpt-oss, with clamp_alpha and clamp_limit),
    silu, gelu, gelu_tanh, relu, relu_squared. gate_layout: where w1's rows hold gate and up:
    "concatenated" (gate first) or "interleaved" (gate even, up odd); not used with a pair.
    save: what is kept for backward besides x, scores, ids and plan: "preactivation" keeps H,
    "input" computes it again, "nothing" is inference (taken where no gradient is wanted).
    order: "fast", or "low_memory" for a workspace with a quarter of the columns of Y and dX~ at a
    time; the bits are the same.

    torch: differentiable once in x, scores, weights and biases (SonicMoE, arXiv 2512.14080, for
    the gradient of the scores without Y).
    plan: functional.plan of the same routing, where the caller has it already.
    trainable: (E) uint8 or bool; experts with 0 are frozen: no gradient work, zero gradients.
    main_grad: weights with an attribute `main_grad` (their dtype or fp32) have their gradients
    added there, and autograd gets none for them. delayed: a DelayedWeightGrads, which takes the
    weight gradients' work until its run(). NumPy: forward only; see moe_experts_forward.
    """
    weights = weights_of((w1, w2), (b1, b2))
    routing = routing_of(x, topk_scores, topk_ids)
    config = Config(activation, gate_layout, weight_order, save, clamp_alpha, clamp_limit, order)
    if not is_torch(x):
        for name, value in (("trainable", trainable), ("delayed", delayed)):
            _refuse_for_numpy(name, value)
        return moe_experts_forward(x, weights, routing, config._replace(save="nothing"))[0]
    _engine.check_operands(x, weights)
    if plan is None:
        plan = make_plan(routing, w2.shape[0])
    operands = (x, _unit_stride(routing.scores), weights)
    return _operations().experts(operands, plan, config, (trainable, main_grad, delayed))


def experts_on_rows(
    rows: Any,
    w1: Any,
    w2: Any,
    expert_counts: Any,
    expert_offsets: Any = None,
    *,
    scores: Any = None,
    b1: Any = None,
    b2: Any = None,
    activation: str = "swiglu",
    gate_layout: str = "concatenated",
    weight_order: str = "output_major",
    save: str = "preactivation",
    clamp_alpha: float = 1.702,
    clamp_limit: float = 7.0,
    trainable: Any = None,
    main_grad: bool = False,
    delayed: Any = None,
) -> Any:
    """Experts on rows that are already sorted by expert: what expert parallelism plugs into.

    rows (R_cap, d); expert_counts (E) int32, on the device of rows; expert_offsets (E+1) int32,
    where each expert's rows begin, or None for rows without gaps. Rows in a gap or past the last
    expert are not read; in the output and the gradients they are zeros. scores (R_cap) fp32 or None
    for 1. Returns (R_cap, d): row r is S_r * expert(rows_r). Nothing is gathered or combined.
    The rest is as for moe_experts.
    """
    weights = weights_of((w1, w2), (b1, b2))
    config = Config(activation, gate_layout, weight_order, save, clamp_alpha, clamp_limit)
    if expert_offsets is None:
        expert_offsets = _offsets_of(expert_counts)
    the_plan = Plan(expert_counts, expert_offsets)
    if not is_torch(rows):
        for name, value in (("trainable", trainable), ("delayed", delayed)):
            _refuse_for_numpy(name, value)
        config = config._replace(save="nothing")
        return _engine.experts_forward(rows, scores, weights, the_plan, config, current())[0]
    _engine.check_operands(rows, weights)
    operands = (rows, scores, weights)
    return _operations().experts(operands, the_plan, config, (trainable, main_grad, delayed))


def moe_experts_forward(
    x: Any, weights: Weights, routing: Routing, config: Config | None = None
) -> tuple[Any, Saved]:
    """The forward pass without autograd: the output (T, d) and what backward needs.

    weights: functional.Weights(w1=, w1_up=, w2=, b1=, b1_up=, b2=). config: functional.Config.
    """
    refuse_torch("moe_experts_forward", _BY_AUTOGRAD)
    config = Config() if config is None else config
    _engine.check_operands(x, weights)
    the_plan = make_plan(routing, weights.w1.shape[0])
    output, h = _engine.experts_forward(x, routing.scores, weights, the_plan, config, current())
    return output, Saved(x, routing.scores, weights, the_plan, h, config, routing.ids)


def moe_experts_backward(
    d_output: Any,
    saved: Saved,
    *,
    into: Weights | None = None,
    mode: str = "overwrite",
    trainable: Any = None,
) -> Grads:
    """The backward pass without autograd: gradients of x (T, d), scores (slots) and weights.

    d_output (T, d), dtype of x. into: functional.Weights of tensors to fill, of the weights' dtype
    or fp32, None where not wanted; fresh ones by default. mode: "overwrite" or "accumulate".
    trainable: (E) uint8; experts with 0 are frozen, and their slices left as they are.
    """
    refuse_torch("moe_experts_backward", _BY_AUTOGRAD)
    if saved.config.save == "nothing":
        raise invalid(
            "save",
            '"nothing", which keeps nothing for backward',
            '"preactivation" or "input"',
            "Pass one of these to moe_experts_forward",
        )
    if into is None:
        if mode != "overwrite":
            raise invalid("into", f"None with mode {mode!r}", "tensors to add to", "Pass them")
        wanted = Weights(*(weight is not None for weight in saved.weights))
        into = _engine_backward.new_weight_grads(saved, wanted, trainable)
    destination = Into(into, mode, trainable)
    return _engine_backward.experts_backward(d_output, saved, (True, True), destination, current())


def _operations() -> Any:
    from penstock import _torch_operations

    return _torch_operations.operations()


def weights_of(matrices: tuple[Any, Any], biases: tuple[Any, Any]) -> Weights:
    """Weights from (w1, w2) and (b1, b2), whose first may be pairs (gate, up)."""
    (w1, w2), (b1, b2) = matrices, biases
    gate, up = w1 if isinstance(w1, (tuple, list)) else (w1, None)
    gate_bias, up_bias = b1 if isinstance(b1, (tuple, list)) else (b1, None)
    return Weights(gate, up, w2, gate_bias, up_bias, b2)


def routing_of(x: Any, scores: Any, ids: Any) -> Routing:
    """The Routing of scores and ids (or of a Routing in their place), checked against x."""
    if isinstance(scores, Routing):
        if ids is not None:
            raise invalid(
                "topk_ids", "ids besides a Routing", "a Routing alone", "Leave topk_ids out"
            )
        routing = scores
    else:
        if ids is None:
            raise invalid("topk_ids", "None", "ids (T, K)", "Pass them, or a Routing instead")
        routing = Routing.from_topk(scores, ids)
    if routing.num_tokens != x.shape[0]:
        raise invalid(
            "number of tokens of the routing",
            routing.num_tokens,
            f"{x.shape[0]}, as x has",
            "Route the same tokens that the experts get",
        )
    # torch would take the fake kernel for a mix with meta tensors, and never reach the engine.
    device = arrays_of(x).device(x)
    for name, array in (("scores", routing.scores), ("ids", routing.ids)):
        if arrays_of(array).device(array) != device:
            raise invalid(
                f"device of {name}",
                "{}:{}".format(*arrays_of(array).device(array)),
                "{}:{}, the device of x".format(*device),
                "Move one to the other's device",
            )
    return routing


def _unit_stride(scores: Any) -> Any:
    return scores if scores.is_contiguous() else scores.contiguous()


def _offsets_of(counts: Any) -> Any:
    if arrays_of(counts) is TorchArrays:
        import torch

        # torch 2.9's inductor forgets the dtype of cumsum(dtype=) over a constant: convert after.
        return torch.cat((counts.new_zeros(1), counts.cumsum(0).to(counts.dtype)))
    import numpy as np

    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def _refuse_for_numpy(name: str, value: Any) -> None:
    if value is not None:
        raise invalid(
            name, "it with NumPy arrays", "torch tensors", "Use moe_experts_backward, or torch"
        )


def __getattr__(name: str) -> Any:
    """DelayedWeightGrads, which needs torch, at its first use."""
    if name == "DelayedWeightGrads":
        from penstock._seams import DelayedWeightGrads

        return DelayedWeightGrads
    raise AttributeError(f"module 'penstock.functional' has no attribute {name!r}")
