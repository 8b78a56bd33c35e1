# SPDX-License-Identifier: Apache-2.0
"""The passes of experts with adapters as torch.library operators, like _torch_ops.py.

The weights are frozen: the operator gives gradients of x, of the scores and of the adapters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penstock import _engine_adapters
from penstock._engine import Weights
from penstock._engine_adapters import Adapters
from penstock._engine_backward import Saved
from penstock._torch_library import (
    ADAPTED_BACKWARD,
    ADAPTERS,
    FORWARD,
    WEIGHTS,
    Group,
    Pass,
    Signature,
    operator,
)
from penstock._torch_ops import (
    absent,
    differentiate_experts,
    fake_gradients,
    fake_output_and_h,
    or_absent,
    refuse_second_order,
    rows_of_unit_stride,
)

_DIFFERENTIABLE = 2 + len(Adapters._fields)  # of the arguments of `adapted_experts`, the first
_ROWS = Group("Tensor x, Tensor scores", lambda *rows: rows)


def _adapted_experts_fake(
    rows: tuple[Tensor, Tensor], adapters: Adapters, weights: Weights, the_pass: Pass
) -> tuple[Tensor, ...]:
    x = rows[0]
    num_rows = the_pass.plan.row_capacity(x.shape[0])
    keeps = the_pass.config.save != "nothing"
    kept = (
        x.new_empty((num_rows, rank)) if keeps and rank else absent(x) for rank in adapters.ranks
    )
    return *fake_output_and_h(x, weights.w2, the_pass), *kept


@operator(
    "adapted_experts",
    Signature(_ROWS, ADAPTERS, WEIGHTS, FORWARD),
    4,
    _adapted_experts_fake,
)
def adapted_experts(
    rows: tuple[Tensor, Tensor], adapters: Adapters, weights: Weights, the_pass: Pass
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (T, d), H (R_cap, h), which has no elements unless save is preactivation, and the
    adapters' rows (R_cap, r1) and (R_cap, r2), which have none without an adapter or where save is
    nothing.
    """
    output, h, kept = _engine_adapters.adapted_forward(
        (*rows, weights), adapters, the_pass.plan, the_pass.config, the_pass.context
    )
    return output, *(or_absent(tensor, rows[0]) for tensor in (h, *kept))


def _adapted_experts_backward_fake(
    d_output: Tensor, rows: tuple[Tensor, Tensor], adapters: Adapters, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients((*rows, *adapters), rest[-1].wanted)


@operator(
    "adapted_experts_backward",
    Signature(Group("Tensor d_output"), _ROWS, ADAPTERS, WEIGHTS, ADAPTED_BACKWARD),
    _DIFFERENTIABLE,
    _adapted_experts_backward_fake,
)
def adapted_experts_backward(
    d_output: Tensor,
    rows: tuple[Tensor, Tensor],
    adapters: Adapters,
    weights: Weights,
    the_pass: Pass,
) -> tuple[Tensor, ...]:
    """Gradients of the first six inputs of `adapted_experts`; no elements where not wanted."""
    grads, adapter_grads = _engine_adapters.adapted_backward(
        rows_of_unit_stride(d_output),
        Saved(*rows, weights, the_pass.plan, the_pass.h, the_pass.config),
        (adapters, the_pass.rows),
        tuple(the_pass.wanted),
        the_pass.context,
    )
    return tuple(or_absent(grad, rows[0]) for grad in (grads.x, grads.scores, *adapter_grads))


differentiate_experts(adapted_experts, {"preserved": adapted_experts_backward}, _DIFFERENTIABLE)
refuse_second_order(adapted_experts_backward)
