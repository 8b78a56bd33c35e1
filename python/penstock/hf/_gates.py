# SPDX-License-Identifier: Apache-2.0
"""Which of the engine's activations an experts module of transformers uses, found by trying it.

A family says how gate and up meet in a method (`_apply_gate`) or a function (`act_fn`), not in a
name that could be trusted: the same formula has many names, and one name several formulas. So the
module's own method is evaluated in float64 on a fixed grid and compared with plain statements of
the engine's activations, in both gate layouts. What agrees with none is refused. Used by
_structure.py; nothing here runs during a forward pass of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Some families compute the gate in fp32 even for wider inputs; no two candidates are this close.
AGREEMENT = 1e-5
GRID_POINTS = 33
# Wide enough to tell a clamp at 7 from none; a larger limit widens it further.
GRID_RADIUS = 12.0


class Gate(NamedTuple):
    """An activation of the engine and where its operands lie in the up-projection's output."""

    activation: str
    gate_layout: str = "concatenated"
    clamp_alpha: float = 1.702
    clamp_limit: float = 7.0


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
}


def recognise_gated(module: nn.Module) -> Gate | None:
    """The gate that `module._apply_gate` computes, or None where the engine has none like it."""
    numbers = _numbers(module)
    gate, up = _grid(_radius(numbers))
    expected = _gated(gate, up, numbers)
    for layout, operand in (
        ("concatenated", torch.cat((gate, up), dim=-1)),
        ("interleaved", torch.stack((gate, up), dim=-1).flatten(-2)),
    ):
        got = _evaluate(module._apply_gate, operand)
        for candidate, value in expected.items():
            if got is not None and _agree(got, value):
                return candidate._replace(gate_layout=layout)
    return None


def recognise_plain(function: Callable[[Tensor], Tensor]) -> Gate | None:
    """The activation without a gate that `function` computes, or None."""
    x = _grid(GRID_RADIUS)[0]
    got = _evaluate(function, x)
    for name, candidate in _PLAIN.items():
        if got is not None and _agree(got, candidate(x)):
            return Gate(name)
    return None


def recognise_projections(expert: nn.Module, linears: list[nn.Linear]) -> Gate | None:
    """The activation between the Linears that `expert` calls, or None.

    linears: the expert's own, float64, of d = n: gate, up and down, or up and down.
    """
    numbers = _numbers(expert)
    size = (GRID_POINTS, linears[0].in_features)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    x *= _radius(numbers) / 2
    *ups, down = linears
    with torch.no_grad():
        h = [linear(x) for linear in ups]
        if len(h) == 2:
            expected = _gated(h[0], h[1], numbers)
        elif len(h) == 1:
            expected = {Gate(name): function(h[0]) for name, function in _PLAIN.items()}
        else:
            return None
        got = _evaluate(expert, x)
        for candidate, value in expected.items():
            if got is not None and _agree(got, down(value)):
                return candidate
    return None


def _gated(gate: Tensor, up: Tensor, numbers: list[float]) -> dict[Gate, Tensor]:
    """What each of the engine's gated activations makes of gate and up."""
    return {Gate(name): function(gate) * up for name, function in _GATED.items()} | {
        Gate("swiglu_clamped", clamp_alpha=alpha, clamp_limit=limit): _clamped(
            gate, up, alpha, limit
        )
        for alpha, limit in _pairs(numbers)
    }


def _radius(numbers: list[float]) -> float:
    return max([GRID_RADIUS, *(1.5 * number for number in numbers if number < 1e3)])


def _grid(radius: float) -> tuple[Tensor, Tensor]:
    """Every pair (gate, up) of an odd number of points that includes 0, as (points, points)."""
    points = torch.linspace(-radius, radius, GRID_POINTS, dtype=torch.float64, device="cpu")
    gate, up = torch.meshgrid(points, points.flip(0), indexing="ij")
    return gate, up


def _clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1.0)


def _numbers(module: nn.Module) -> list[float]:
    """Positive finite numbers that the module holds: among them are a clamp's alpha and limit."""
    held = (value for value in vars(module).values() if isinstance(value, float))
    return sorted({value for value in held if math.isfinite(value) and value > 0})


def _pairs(numbers: list[float]) -> Iterator[tuple[float, float]]:
    return ((alpha, limit) for alpha in numbers for limit in numbers)


@torch.no_grad()
def _evaluate(function: Callable[[Tensor], Tensor], operand: Tensor) -> Tensor | None:
    """The function's value, or None where it does not take a plain tensor (it is not ours then)."""
    try:
        value = function(operand)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    return value if isinstance(value, Tensor) else None


def _agree(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or got.device != expected.device:
        return False
    return bool((got.double() - expected).norm() <= AGREEMENT * expected.norm())
