# SPDX-License-Identifier: Apache-2.0
"""The cuBLAS yardstick: a layer's six products as plain batched products of equal groups.

Nothing is gathered, activated, combined or routed, and every group has the same number of rows, so
it does less than a layer has to. Forward is the first two products, a step all six.
"""

from __future__ import annotations

from typing import Any

from penstock.bench.problem import Problem, Tensors

NAME = "cublas"


class Yardstick:
    """Inputs of the six products, made once; E groups of T K / E rows each, rounded up."""

    def __init__(self, problem: Problem, tensors: Tensors) -> None:
        import torch

        _, num_tokens, d, n, num_experts, top_k = problem.shape
        rows = -(-num_tokens * top_k // num_experts)
        generator = torch.Generator(problem.device).manual_seed(0)

        def random(columns: int) -> Any:
            values = torch.empty(
                (num_experts, rows, columns), device=problem.device, dtype=tensors.x.dtype
            )
            return values.normal_(generator=generator)

        self._x, self._a, self._dh = random(d), random(n), random(2 * n)
        self._w1, self._w2 = tensors.w1.detach(), tensors.w2.detach()

    def forward(self) -> Any:
        """X W1^T and A W2^T."""
        import torch

        return (
            torch.bmm(self._x, self._w1.transpose(1, 2)),
            torch.bmm(self._a, self._w2.transpose(1, 2)),
        )

    def step(self) -> Any:
        """Forward, then dO W2, dO^T A', dH W1 and dH^T X; x stands for dO, which has its size."""
        import torch

        forward = self.forward()
        return (
            *forward,
            torch.bmm(self._x, self._w2),
            torch.bmm(self._x.transpose(1, 2), self._a),
            torch.bmm(self._dh, self._w1),
            torch.bmm(self._dh.transpose(1, 2), self._x),
        )
