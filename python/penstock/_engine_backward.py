# SPDX-License-Identifier: Apache-2.0
"""The experts' backward passes: all at once, or data now and weight gradients later.

Like _engine.py, for NumPy arrays and torch tensors alike. Called by functional.py, _torch_ops.py
and _seams.py.
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
    pass_on,
    plan_arguments,
    problem_of,
)
from penstock._library import library
from penstock._memory import workspace
from penstock._ranges import ranged


class Saved(NamedTuple):
    """Exactly what backward needs: x, the weights, scores, plan, and H under preactivation."""

    x: Any  # (T, d); dispatched: (R_cap, d)
    scores: Any  # (slots); dispatched: (R_cap) or None
    weights: Weights
    plan: Plan
    h: Any  # (R_cap, h) or None
    config: Config
    ids: Any = None  # (slots), kept for the router alone

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept, x and the weights aside."""
        plan = [array for array in self.plan[:5] if array is not None]
        kept = [array for array in (self.scores, self.ids, self.h) if array is not None]
        return sum(array.nbytes for array in (*plan, *kept))


class Grads(NamedTuple):
    """Gradients of a backward pass; None for what was not wanted."""

    x: Any
    scores: Any
    weights: Weights


class Into(NamedTuple):
    """Where weight gradients go."""

    weights: Weights  # tensors to fill; None: not wanted
    mode: str = "overwrite"  # or "accumulate"
    trainable: Any = None  # (E) uint8, 0: frozen, left as it is


class Delayed(NamedTuple):
    """What the first half of a split backward pass leaves for the second."""

    dh: Any  # (R_cap, h)
    a_scaled: Any  # (R_cap, n)


NOTHING = Weights(None)


def new_weight_grads(saved: Saved, wanted: Weights, trainable: Any) -> Weights:
    """Contiguous tensors for the wanted gradients, of the weights' dtype.

    With a trainable mask they start as zeros, since frozen experts' slices are left as they are.
    """
    arrays = arrays_of(saved.x)
    allocate = arrays.empty if trainable is None else arrays.zeros
    dtype = arrays.dtype_name(saved.x)
    return Weights(
        *(
            allocate(tuple(weight.shape), dtype, saved.x) if want and weight is not None else None
            for weight, want in zip(saved.weights, wanted, strict=True)
        )
    )


@ranged
def experts_backward(
    d_output: Any, saved: Saved, wanted: tuple[bool, bool], into: Into, context: CallContext
) -> Grads:
    """Gradients of x and scores (where `wanted`) and of the weights (into `into`)."""
    problem = problem_of(saved.x, saved.weights, saved.plan, saved.config)
    dx, dscores = data_grads(saved, wanted)
    call = call_tuple(context, saved.x)
    scratch = workspace(library().backward_workspace_bytes(call, saved.config, problem), saved.x)
    tensors = pass_on(
        saved.x, d_output, saved.x, saved.scores, saved.h, dx, dscores, None, None, scratch
    )
    library().experts_backward(*_arguments(call, saved, tensors, into))
    return Grads(dx, dscores, into.weights)


@ranged
def experts_backward_data(
    d_output: Any, saved: Saved, wanted: tuple[bool, bool], context: CallContext
) -> tuple[Grads, Delayed]:
    """The first half: gradients of x and scores, and what the weights' gradients need later."""
    problem = problem_of(saved.x, saved.weights, saved.plan, saved.config)
    dx, dscores = data_grads(saved, wanted)
    delayed = _new_delayed(saved, problem)
    call = call_tuple(context, saved.x)
    scratch = workspace(
        library().backward_data_workspace_bytes(call, saved.config, problem), saved.x
    )
    tensors = pass_on(
        saved.x, d_output, saved.x, saved.scores, saved.h, dx, dscores, *delayed, scratch
    )
    library().experts_backward_data(*_arguments(call, saved, tensors, Into(NOTHING)))
    return Grads(dx, dscores, NOTHING), delayed


@ranged
def experts_backward_weights(
    d_output: Any, saved: Saved, delayed: Delayed, into: Into, context: CallContext
) -> None:
    """The second half: fills `into`."""
    problem = problem_of(saved.x, saved.weights, saved.plan, saved.config)
    call = call_tuple(context, saved.x)
    scratch = workspace(
        library().backward_weights_workspace_bytes(call, saved.config, problem), saved.x
    )
    tensors = pass_on(saved.x, d_output, saved.x, saved.scores, None, None, None, *delayed, scratch)
    library().experts_backward_weights(*_arguments(call, saved, tensors, into))


def _arguments(
    call: tuple[Any, ...], saved: Saved, tensors: tuple[Any, ...], into: Into
) -> tuple[Any, ...]:
    x = saved.x
    grads = (pass_on(x, *into.weights), into.mode, pass_on(x, into.trainable)[0])
    weights = pass_on(x, *saved.weights)
    return (call, saved.config, tensors, weights, plan_arguments(saved.plan), grads)


def data_grads(saved: Saved, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
    """Tensors for dx and dscores where wanted.

    Rows in a gap of a receive buffer are never written: those gradients start as zeros.
    """
    arrays = arrays_of(saved.x)
    allocate = arrays.zeros if saved.plan.dispatched else arrays.empty
    dx = dscores = None
    if wanted[0]:
        dx = allocate(tuple(saved.x.shape), arrays.dtype_name(saved.x), saved.x)
    if wanted[1] and saved.scores is not None:
        scores = saved.scores
        dscores = allocate(tuple(scores.shape), arrays.dtype_name(scores), scores)
    return dx, dscores


def _new_delayed(saved: Saved, problem: Problem) -> Delayed:
    """Room for dH and A'; dH takes the place of an H that is overwritten."""
    arrays = arrays_of(saved.x)
    n, rows = problem.intermediate_size, problem.row_capacity
    dh = saved.h if saved.config.kept_h == "overwritten" else None
    if dh is None:
        dh = arrays.empty((rows, saved.config.halves * n), problem.dtype, saved.x)
    return Delayed(dh, arrays.empty((rows, n), problem.dtype, saved.x))
