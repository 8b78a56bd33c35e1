# SPDX-License-Identifier: Apache-2.0
"""The passes of experts with low-rank adapters, like _engine.py for the plain ones.

Called by _torch_adapters.py and lora.py. Shapes: E experts, d hidden, n intermediate, h = 2n gated
or n, ranks r1 of the up and r2 of the down projection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock._arrays import arrays_of
from penstock._context import CallContext
from penstock._engine import (
    Config,
    Plan,
    Problem,
    Weights,
    call_tuple,
    check_operands,
    new_output_and_h,
    pass_on,
    plan_arguments,
    problem_of,
)
from penstock._engine_backward import Grads, Saved, data_grads
from penstock._library import library
from penstock._memory import workspace


class Adapters(NamedTuple):
    """The factors of the adapters, or their gradients; None is absent, pair by pair."""

    up_a: Any = None  # (E, r1, d)
    up_b: Any = None  # (E, h, r1)
    down_a: Any = None  # (E, r2, n)
    down_b: Any = None  # (E, d, r2)

    @property
    def ranks(self) -> tuple[int, int]:
        """r1 and r2, 0 for a projection without an adapter."""
        return tuple(0 if a is None else a.shape[1] for a in (self.up_a, self.down_a))


class AdapterRows(NamedTuple):
    """The rows between an adapter's factors, kept for backward; None without one."""

    up: Any = None  # (R_cap, r1), X_t A1^T
    down: Any = None  # (R_cap, r2), A_r A2^T


NONE = Adapters()


def adapted_forward(
    operands: tuple[Any, Any, Weights],
    adapters: Adapters,
    plan: Plan,
    config: Config,
    context: CallContext,
) -> tuple[Any, Any, AdapterRows]:
    """Output (T, d), H (R_cap, h), None unless save is preactivation, and the adapters' rows, None
    where save is nothing; operands: (x, scores, weights).
    """
    x, scores, weights = operands
    check_operands(x, weights)
    problem = problem_of(x, weights, plan, config)
    output, h = new_output_and_h(x, problem, config)
    rows = _new_rows(x, adapters.ranks, problem, config)
    call = call_tuple(context, x)
    size = library().adapted_forward_workspace_bytes(call, config, problem, *adapters.ranks)
    tensors = pass_on(x, x, scores, h, output, workspace(size, x))
    groups = (pass_on(x, *weights), plan_arguments(plan), pass_on(x, *adapters, *NONE, *rows))
    library().adapted_experts_forward(call, config, tensors, *groups)
    return output, h, rows


def adapted_backward(
    d_output: Any,
    saved: Saved,
    adapters: tuple[Adapters, AdapterRows],
    wanted: tuple[bool, ...],
    context: CallContext,
) -> tuple[Grads, Adapters]:
    """Gradients of x, scores and the adapters; `wanted` says which, in the order x, scores, up_a,
    up_b, down_a, down_b. adapters: the factors, and the rows that adapted_forward left.
    """
    factors, rows = adapters
    x = saved.x
    arrays = arrays_of(x)
    problem = problem_of(x, saved.weights, saved.plan, saved.config)
    dx, dscores = data_grads(saved, wanted[:2])
    grads = Adapters(
        *(
            arrays.empty(tuple(factor.shape), problem.dtype, x) if want else None
            for factor, want in zip(factors, wanted[2:], strict=True)
        )
    )
    call = call_tuple(context, x)
    ranks = factors.ranks
    size = library().adapted_backward_workspace_bytes(call, saved.config, problem, *ranks)
    scratch = workspace(size, x)
    tensors = pass_on(x, d_output, x, saved.scores, saved.h, dx, dscores, None, None, scratch)
    groups = (
        pass_on(x, *saved.weights),
        plan_arguments(saved.plan),
        pass_on(x, *factors, *grads, *rows),
    )
    library().adapted_experts_backward(call, saved.config, tensors, *groups)
    return Grads(dx, dscores, Weights(None)), grads


def _new_rows(x: Any, ranks: tuple[int, int], problem: Problem, config: Config) -> AdapterRows:
    if config.save == "nothing":
        return AdapterRows()
    arrays = arrays_of(x)
    return AdapterRows(
        *(
            arrays.empty((problem.row_capacity, rank), problem.dtype, x) if rank else None
            for rank in ranks
        )
    )
