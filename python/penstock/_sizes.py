# SPDX-License-Identifier: Apache-2.0
"""Sizes of a layer before it runs: bytes kept for backward, bytes of workspace.

Public through functional.py; the tests compare both with what is measured.
"""

from __future__ import annotations

from penstock._context import current, refuse_torch
from penstock._engine import Config, Problem, accumulator
from penstock._library import library

_SIZES = {"float64": 8, "float32": 4}
_WORKSPACE_PASSES = ("forward", "backward", "backward_data", "backward_weights")


def saved_bytes(
    shape: tuple[int, int, int, int, int],
    *,
    dtype: str = "float32",
    activation: str = "swiglu",
    save: str = "preactivation",
    router: str | None = "softmax_topk",
) -> int:
    """Bytes that a layer keeps between forward and backward, x and the weights aside.

    shape: (num_tokens, hidden_size, intermediate_size, num_experts, top_k). H (preactivation
    only), scores and ids of every slot, three maps, counts and offsets; and the logits where the
    router's gradient needs them, as all but softmax_topk's do. router=None counts the experts
    alone: no ids, no logits, as in moe_experts with the caller's own routing. "nothing" keeps 0.
    """
    if save == "nothing":
        return 0
    num_tokens, _, _, num_experts, top_k = shape
    config = Config(activation=activation, save=save)
    total = library().saved_bytes(config, problem_of_shape(shape, dtype))
    if router is None:
        return total - 4 * num_tokens * top_k
    if router != "softmax_topk":
        total += num_tokens * num_experts * _SIZES[accumulator(dtype)]
    return total


def workspace_bytes(
    shape: tuple[int, int, int, int, int],
    which: str = "forward",
    *,
    dtype: str = "float32",
    activation: str = "swiglu",
    save: str = "preactivation",
    order: str = "fast",
    kept_h: str = "overwritten",
    device: str = "cpu",
) -> int:
    """Bytes of temporary memory of the experts' pass, exactly, on the backend in force.

    shape as for saved_bytes. which: "forward", "backward", or the halves of a backward pass with
    delayed weight gradients, "backward_data" and "backward_weights". order as in moe_experts.
    kept_h: "overwritten", as by autograd's backward pass, or "preserved", as where retain_graph
    keeps the graph, in compiled code and in moe_experts_backward.
    """
    if which not in _WORKSPACE_PASSES:
        raise ValueError(
            f"which: got {which!r}, expected one of {', '.join(_WORKSPACE_PASSES)}. "
            "Check the spelling"
        )
    refuse_torch("workspace_bytes", "torch allocates what its operations need")
    context = current()
    call = (context.backend, context.threads, 0, context.sm_budget, context.id_checks, "")
    config = Config(activation=activation, save=save, order=order, kept_h=kept_h)
    query = getattr(library(), f"{which}_workspace_bytes")
    return query(call, config, problem_of_shape(shape, dtype, device))


def tile_rows(
    shape: tuple[int, int, int, int, int], *, dtype: str = "float32", device: str = "cpu"
) -> int:
    """Rows of a tile of the products, on the backend in force: what token rounding rounds to.

    shape as for saved_bytes. The reference backend has no tiles and answers 1.
    """
    refuse_torch("tile_rows", "Round to tiles of your own, and bring the ids and scores")
    context = current()
    call = (context.backend, context.threads, 0, context.sm_budget, context.id_checks, "")
    return library().tile_rows(call, Config(), problem_of_shape(shape, dtype, device))


def problem_of_shape(
    shape: tuple[int, int, int, int, int], dtype: str = "float32", device: str = "cpu"
) -> Problem:
    """The problem of a layer of this shape, for queries."""
    num_tokens, hidden_size, intermediate_size, num_experts, top_k = shape
    slots = num_tokens * top_k
    name, _, index = device.partition(":")
    return Problem(
        num_tokens,
        hidden_size,
        intermediate_size,
        num_experts,
        slots,
        slots,
        dtype,
        name,
        int(index or 0),
    )
