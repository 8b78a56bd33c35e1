# SPDX-License-Identifier: Apache-2.0
"""A = act(H), computed in fp32 (float64 for float64); gradients are autograd's.

Names as in functional.moe_experts. Called by forward.py.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock._engine import Config

_ONE_SIDED = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda h: F.relu(h).square(),
}
_OF_THE_GATE = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
ACTIVATIONS = (*_OF_THE_GATE, "swiglu_clamped", *_ONE_SIDED)


def activated(halves: tuple[Tensor, ...], config: Config) -> Tensor:
    """A (rows, n) in fp32 or float64, of H as (gate, up), or (h,) alone, (rows, n) each."""
    name = config.activation
    wide = tuple(half.to(accumulator(half.dtype)) for half in halves)
    if name == "swiglu_clamped":
        return _clamped(*wide, config)
    if name in _OF_THE_GATE:
        gate, up = wide
        return _ONE_SIDED[_OF_THE_GATE[name]](gate) * up
    return _ONE_SIDED[name](*wide)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers that are stored in `dtype` are computed with and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _clamped(gate: Tensor, up: Tensor, config: Config) -> Tensor:
    """gpt-oss's. The two numbers are fp32 ones, also in a float64 layer.

    torch.where passes NaN on and has, like clamp, the whole gradient at the edge.
    """
    alpha, limit = (
        torch.full((), value, dtype=torch.float32, device=gate.device).to(gate.dtype)
        for value in config.clamp
    )
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
