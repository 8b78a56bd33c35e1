# SPDX-License-Identifier: Apache-2.0
"""Defines the operators of the namespace `penstock` from groups of arguments.

An operator's schema, and what the dispatcher hands to it, is a flat list: 27 arguments at most
here. A Group names arguments that mean one thing, such as the six tensors of the weights, and says
what an implementation gets in their place; a Signature is groups in a row. So no list of arguments
is written twice, and a schema cannot disagree with how its arguments are put together again.

torch.library.custom_op does not serve: its kernels import torch._dynamo when they first run, which
takes longer than a small model's first step. What it gives beyond the parts used here:
  - It keeps Dynamo out of the kernels: so does _outside_dynamo.
  - It checks at every call that no output aliases an input. Implementations here allocate all they
    return, and opcheck holds them to it in the tests.
  - It counts an argument's versions up where the operator writes to it: the implementation does
    (experts_backward_over_h is the only one).
  - It lets an operator be defined anew, by a reloaded module: an error here.

Used by _torch_ops.py, _torch_adapters.py and _torch_routing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock._context import CallContext
from penstock._engine import Config, Plan, Weights
from penstock._engine_adapters import AdapterRows, Adapters
from penstock._engine_route import RouterSpec

_NAMESPACE = "penstock"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")  # alive as long as its operators


def _alone(argument: Any = None) -> Any:
    """The argument of a group of one; a default that is None does not reach an implementation."""
    return argument


class Group(NamedTuple):
    """Arguments next to each other that mean one thing."""

    schema: str  # as torch.library writes it
    join: Callable[..., Any] = _alone  # that thing, of the arguments

    @property
    def size(self) -> int:
        """How many arguments there are."""
        return self.schema.count(",") + 1


class Signature:
    """An operator's arguments, group by group."""

    def __init__(self, *groups: Group):
        self.schema = ", ".join(group.schema for group in groups)
        ends = accumulate(group.size for group in groups)
        self._cuts = [
            (slice(end - group.size, end), group.join)
            for end, group in zip(ends, groups, strict=True)
        ]

    def join(self, flat: tuple[Any, ...]) -> list[Any]:
        """What each group's arguments mean."""
        return [join(*flat[cut]) for cut, join in self._cuts]


class Pass(NamedTuple):
    """What a pass over the experts is given besides x, scores and weights."""

    plan: Plan
    config: Config
    context: CallContext
    wanted: list[bool] | None = None  # which gradients, in a backward pass, as all that follow
    h: Tensor | None = None  # (R_cap, h), under preactivation
    rows: AdapterRows = AdapterRows()

    @staticmethod
    def join(*flat: Any) -> Pass:
        """The forward pass of its arguments in the order of the schemas below."""
        arrays, (top_k, config, clamp, context) = flat[:6], flat[6:]
        return Pass(Plan(*arrays, top_k), Config.unpack(config, clamp), CallContext.unpack(context))

    @staticmethod
    def join_backward(*flat: Any) -> Pass:
        """The same of a backward pass: between plan and settings what is kept, and `wanted`."""
        arrays, (h, *rows, wanted), settings = flat[:6], flat[6:-4], flat[-4:]
        forward = Pass.join(*arrays, *settings)
        return forward._replace(wanted=wanted, h=h, rows=AdapterRows(*rows))


def _router(spec: str, numbers: list[float], context: str) -> tuple[RouterSpec, CallContext]:
    return RouterSpec.unpack(spec, numbers), CallContext.unpack(context)


_PLAN = (
    "Tensor expert_counts, Tensor expert_offsets, Tensor? row_to_token, Tensor? row_to_slot, "
    "Tensor? slot_to_row, Tensor? token_offsets"
)
_SETTINGS = "SymInt top_k, str config, float[] clamp, str context"  # Config.pack, CallContext.pack

CONTEXT = Group("str context", CallContext.unpack)
ROUTER = Group("str router, float[] numbers, str context", _router)  # RouterSpec.pack
WEIGHTS = Group(
    "Tensor w1, Tensor? w1_up, Tensor w2, Tensor? b1, Tensor? b1_up, Tensor? b2", Weights
)
ADAPTERS = Group("Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b", Adapters)
FORWARD = Group(f"{_PLAN}, {_SETTINGS}", Pass.join)
BACKWARD = Group(f"{_PLAN}, Tensor? h, bool[] wanted, {_SETTINGS}", Pass.join_backward)
BACKWARD_OVER_H = Group(f"{_PLAN}, Tensor(a!)? h, bool[] wanted, {_SETTINGS}", Pass.join_backward)
ADAPTED_BACKWARD = Group(
    f"{_PLAN}, Tensor? h, Tensor? up_rows, Tensor? down_rows, bool[] wanted, {_SETTINGS}",
    Pass.join_backward,
)


def operator(
    name: str, signature: Signature, num_outputs: int, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Make an implementation the operator penstock::name, for tensors of every device.

    The implementation and `fake`, which makes outputs of the right shapes without computing
    anything, get one argument for each group, and return `num_outputs` tensors, several as a tuple.
    """

    def define(implementation: Callable[..., Any]) -> torch._ops.OpOverload:
        outputs = ", ".join(["Tensor"] * num_outputs)
        returned = outputs if num_outputs == 1 else f"({outputs})"
        tags = (torch.Tag.pt2_compliant_tag,)  # opcheck is among the tests
        _library.define(f"{name}({signature.schema}) -> {returned}", tags=tags)

        def kernel(*flat: Any) -> Any:
            return implementation(*signature.join(flat))

        def fake_kernel(*flat: Any) -> Any:
            return fake(*signature.join(flat))

        _library.impl(name, _outside_dynamo(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake_kernel, lib=_library)
        return getattr(getattr(torch.ops, _NAMESPACE), name).default

    return define


def differentiate(
    op: torch._ops.OpOverload,
    backward: Callable[..., Any],
    setup: Callable[..., None] | None = None,
) -> None:
    """Give an operator its gradients, as torch.library.register_autograd describes them."""
    torch.library.register_autograd(op, backward, setup_context=setup, lib=_library)


def _outside_dynamo(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, with its frames and those below marked as none of Dynamo's business.

    Dynamo would look where a compiled function breaks its graph and then runs an operator: in a
    backward pass, say. The mark is the one that Dynamo puts on frames of its own.
    """
    frames = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):  # not in every torch: cost its import
        return torch.compiler.disable(kernel)
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(kernel.__code__, frames._FrameExecStrategy(skip, skip))
    return kernel
