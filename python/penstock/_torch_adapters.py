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
    ADAPTERS,
    BACKWARD,
    FORWARD,
    WEIGHTS,
    Group,
    Pass,
    Signature,
    operator,
)
from penstock._torch_ops import (
    differentiate_experts,
    fake_gradients,
    fake_output_and_h,
    or_absent,
    refuse_second_order,
    rows_of_unit_stride,
)

_DIFFERENTIABLE = 2 + len(Adapters._fields)  # of the arguments of `adapted_experts`, the first
_ROWS = Group("Tensor x, Tensor scores", lambda *rows: rows)


@operator(
    "adapted_experts",
    Signature(_ROWS, ADAPTERS, WEIGHTS, FORWARD),
    2,
    lambda rows, adapters, weights, the_pass: fake_output_and_h(rows[0], weights.w2, the_pass),
)
def adapted_experts(
    rows: tuple[Tensor, Tensor], adapters: Adapters, weights: Weights, the_pass: Pass
) -> tuple[Tensor, Tensor]:
    """Output (T, d) and H (R_cap, h), which has no elements unless save is preactivation."""
    output, h = _engine_adapters.adapted_forward(
        (*rows, weights), adapters, the_pass.plan, the_pass.config, the_pass.context
    )
    return output, or_absent(h, rows[0])


def _adapted_experts_backward_fake(
    d_output: Tensor, rows: tuple[Tensor, Tensor], adapters: Adapters, *rest: Any
) -> tuple[Tensor, ...]:
    return fake_gradients((*rows, *adapters), rest[-1].wanted)


@operator(
    "adapted_experts_backward",
    Signature(Group("Tensor d_output"), _ROWS, ADAPTERS, WEIGHTS, BACKWARD),
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
        adapters,
        tuple(the_pass.wanted),
        the_pass.context,
    )
    return tuple(or_absent(grad, rows[0]) for grad in (grads.x, grads.scores, *adapter_grads))


differentiate_experts(adapted_experts, {"preserved": adapted_experts_backward}, _DIFFERENTIABLE)
refuse_second_order(adapted_experts_backward)
