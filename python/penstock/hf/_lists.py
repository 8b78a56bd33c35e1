# SPDX-License-Identifier: Apache-2.0
"""Experts that a model keeps as a list of modules, each with Linears of its own, brought together.

The engine reads one tensor for all experts. FusedList makes it, once, and lets the experts'
parameters be views of it: they stay the same objects under the same names, with the same values,
and their bytes lie elsewhere. So the state dict, optimisers and checkpoints see what they saw
before, and no weight is held twice. What the experts compute is found by trying a small expert of
the same class. Used by _patch.py; explicit there, because weights move.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import skip_init

from penstock.errors import invalid
from penstock.hf._gates import Gate, recognise_projections
from penstock.hf._structure import DTYPES, Layout, Refusal

_TRIAL_SIZE = 6  # d and n of the expert that is tried


class ListLayout(NamedTuple):
    """Which of an expert's Linears are its projections, and how they meet."""

    up: tuple[str, ...]  # names of children: gate and up, or up alone
    down: str
    layout: Layout


def experts_in(holder: nn.Module) -> nn.Module:
    """The list that `holder` calls: its child `experts`, or itself."""
    return getattr(holder, "experts", holder)


def read_list(experts: nn.Module) -> ListLayout | Refusal:
    """How the engine reads a list of experts, or why it cannot."""
    children = list(experts.children())
    if not isinstance(experts, (nn.ModuleList, nn.ModuleDict)) or not children:
        return Refusal(f"{type(experts).__name__} is no list of experts")
    first = children[0]
    linears = [name for name, child in first.named_children() if type(child) is nn.Linear]
    parameters = {name for name, _ in first.named_parameters()}
    everywhere = [p for child in children for p in child.parameters()]
    if not parameters <= {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}:
        return Refusal("an expert has parameters besides those of plain Linears")
    if any(_signature(child) != _signature(first) for child in children):
        return Refusal("its experts differ in class, shapes, dtypes or devices")
    if len(set(everywhere)) < len(everywhere):
        return Refusal("its experts share parameters")
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in first.modules()):
        return Refusal("its experts drop out activations (set p of the Dropout to 0 to allow it)")
    if any(p.dtype not in DTYPES for p in first.parameters()):
        return Refusal("its weights are quantised")
    biases = {getattr(first, name).bias is not None for name in linears}
    found = _recognise(first, linears) if len(biases) == 1 else None
    if found is None:
        return Refusal("an expert computes none of the engine's activations between its Linears")
    up, down, gate = found
    name = "gate_up_proj" if len(up) == 2 else "up_proj"
    return ListLayout(up, down, Layout(name, gate, "output_major", biases == {True}))


class FusedList:
    """The experts of a list with their weights in one tensor each: w1, w2, b1, b2.

    Allocates the bytes of all experts, moves the weights and lets go of the tensors they were in.
    """

    def __init__(self, experts: nn.Module, how: ListLayout) -> None:
        self.layout = how.layout
        self._experts = list(experts.children())
        self._frozen: tuple[bool, ...] = ()
        self._trainable: Tensor | None = None
        sources = [(how.up, "weight"), ((how.down,), "weight")]
        sources += [(names, "bias") for names, _ in sources] if how.layout.bias else []
        self._sources = sources
        self._fused = [
            _bring_together(self._parameters(*source), len(self._experts)) for source in sources
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that were moved."""
        return sum(fused.nbytes for fused in self._fused)

    def is_whole(self) -> bool:
        """Whether the experts' parameters still are views of the fused tensors."""
        return all(
            _are_parts(self._parameters(*source), fused)
            for source, fused in zip(self._sources, self._fused, strict=True)
        )

    def weights(self) -> list[Tensor | None]:
        """w1 (E, h, d), w2 (E, d, n), b1 (E, h), b2 (E, d), differentiable in the parameters."""
        if not torch.compiler.is_compiling() and not self.is_whole():
            raise invalid(
                "weights of converted experts",
                "parameters that were moved or replaced since",
                "the parameters that penstock.hf.patch brought together",
                "Call patch with the same `convert` again after moving, casting, copying or "
                "assigning the weights",
            )
        joined: list[Tensor | None] = [
            _Joined.apply(fused, *self._parameters(*source))
            for source, fused in zip(self._sources, self._fused, strict=True)
        ]
        return joined + [None] * (4 - len(joined))

    def trainable(self) -> Tensor | None:
        """(E) uint8, 0 for experts of which nothing wants a gradient; None where there are none."""
        frozen = tuple(
            not any(p.requires_grad for p in expert.parameters()) for expert in self._experts
        )
        if not any(frozen) or all(frozen):
            return None
        if frozen != self._frozen:
            mask = [not value for value in frozen]
            self._trainable = torch.tensor(mask, device=self._fused[0].device).to(torch.uint8)
            self._frozen = frozen
        return self._trainable

    def _parameters(self, names: tuple[str, ...], kind: str) -> list[Tensor]:
        """Those of all experts in the order in which they lie in the fused tensor."""
        return [getattr(getattr(expert, name), kind) for expert in self._experts for name in names]


class _Joined(torch.autograd.Function):
    """The fused tensor as a function of its parts, whose gradients are parts of its gradient."""

    @staticmethod
    def forward(ctx: Any, fused: Tensor, *parts: Tensor) -> Tensor:
        """Nothing is computed: parts are views of `fused`."""
        ctx.save_for_backward(*parts)  # autograd refuses backward where one has changed since
        return fused.view_as(fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Views of `grad`, none copied."""
        parts = ctx.saved_tensors
        return (None, *grad.reshape(len(parts), *parts[0].shape).unbind())


@torch.no_grad()
def _bring_together(parts: list[Tensor], num_experts: int) -> Tensor:
    """One tensor (experts, an expert's rows, ...) of which the parts are views from now on."""
    fused = parts[0].new_empty((len(parts), *parts[0].shape))
    for part, place in zip(parts, fused, strict=True):
        place.copy_(part)
        part.data = place
    return fused.view(num_experts, -1, *parts[0].shape[1:])


def _are_parts(parts: list[Tensor], fused: Tensor) -> bool:
    step = parts[0].nbytes
    return all(
        part.data_ptr() == fused.data_ptr() + index * step and part.dtype == fused.dtype
        for index, part in enumerate(parts)
    )


def _signature(expert: nn.Module) -> Any:
    """What experts of one list have in common."""
    facts = [(n, p.shape, p.dtype, p.device) for n, p in expert.named_parameters()]
    return type(expert), facts, [type(child) for child in expert.children()]


def _recognise(expert: nn.Module, linears: list[str]) -> tuple[tuple[str, ...], str, Gate] | None:
    """The order of the Linears in which the expert is one of the engine's, tried on a small one."""
    twin = copy.copy(expert)
    twin.__dict__["_modules"] = dict(expert._modules)
    generator = torch.Generator("cpu").manual_seed(0)
    small = {}
    for name in linears:
        bias = getattr(expert, name).bias is not None
        sizes = (_TRIAL_SIZE, _TRIAL_SIZE, bias)
        # Without its own initialisation, which would draw from the caller's random numbers.
        small[name] = skip_init(nn.Linear, *sizes, device="cpu", dtype=torch.float64)
        twin._modules[name] = small[name]
        for parameter in small[name].parameters():
            parameter.data.normal_(generator=generator)
    for order in itertools.permutations(linears):
        gate = recognise_projections(twin, [small[name] for name in order])
        if gate is not None:
            return order[:-1], order[-1], gate
    return None
