# SPDX-License-Identifier: Apache-2.0
"""torch's grouped product under torch.compile, which fuses the activation and the gathers.

Compiling takes tens of seconds for each shape, so it runs only where it is asked for by name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from penstock.bench.peers import torch_grouped
from penstock.bench.problem import Problem, Tensors


@lru_cache
def _compiled() -> Any:
    import torch

    return torch.compile(torch_grouped.forward)


def forward(problem: Problem, tensors: Tensors) -> Any:
    """The layer's output."""
    return _compiled()(problem, tensors)


PEER = torch_grouped.PEER._replace(name="torch-compiled", forward=forward)
