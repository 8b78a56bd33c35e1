# SPDX-License-Identifier: Apache-2.0
"""`penstock info --verify`: three small layers on every usable backend, against float64.

A toolkit or a driver that miscompiles shows here before it shows in a loss curve (hostile case 35).
Output and every gradient, router included, of layers whose sizes fill tiles, leave remainders, and
leave experts without tokens. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from penstock.bench.peers import penstock_engine
from penstock.bench.problem import Problem, make_tensors
from penstock.bench.shapes import Shape
from penstock.bench.verify import END_TO_END, errors_against_float64

SHAPES = (
    Shape("whole tiles", 256, 128, 128, 4, 2),
    Shape("remainders", 131, 88, 72, 5, 3),
    Shape("idle experts", 16, 64, 40, 64, 2),
)
# The bound is that of float64's own rounding where a backend computes in it.
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Checked(NamedTuple):
    """One layer on one backend."""

    backend: str
    dtype: str
    shape: str
    worst: str  # the result that is furthest off
    error: float  # its relative L2
    bound: float

    @property
    def right(self) -> bool:
        """Whether everything is within the bound; a NaN is not."""
        return self.error <= self.bound

    def line(self) -> str:
        """The finding as text."""
        verdict = "ok" if self.right else "WRONG"
        return (
            f"  {self.backend:10} {self.dtype:9} {self.shape:13} {verdict:6} "
            f"{self.worst} is {self.error:.1e} from float64 (at most {self.bound:.1e})"
        )


def self_check() -> Iterator[Checked]:
    """Every backend that is available, in each dtype that it runs."""
    from penstock import list_backends, why_not

    for backend in list_backends():
        if not backend.available:
            continue
        device = _device() if backend.device == "any" else backend.device
        for dtype in DTYPES:
            sizes = SHAPES[0].sizes
            if why_not(backend.name, sizes, dtype=dtype, device=device):
                continue
            for shape in SHAPES:
                yield check_one(Problem(shape, dtype, device, backend=backend.name))


def _device() -> str:
    """Where plain torch operations are checked: on the GPU, where torch has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_one(problem: Problem) -> Checked:
    """One layer, forward and backward."""
    errors = errors_against_float64(penstock_engine.PEER, problem, make_tensors(problem))
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    bound = END_TO_END[problem.dtype]
    shape = problem.shape.name
    return Checked(problem.backend, problem.dtype, shape, worst, errors[worst], bound)
