# SPDX-License-Identifier: Apache-2.0
"""One benchmark problem: its settings, and the tensors that every peer is given.

Values have the size that a trained layer sees: x of order 1, weights scaled so that H and Y are of
order 1 too. The router's logits are spread enough to choose by, near-uniform over the experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock.bench.shapes import Shape


class Problem(NamedTuple):
    """What is run."""

    shape: Shape
    dtype: str  # "float32", "bfloat16", "float16", "float64"
    device: str = "cpu"
    save: str = "preactivation"
    backend: str = ""  # of Penstock; "" leaves the choice to the device
    threads: int = 0
    order: str = "fast"  # of Penstock's launches


class Tensors(NamedTuple):
    """A layer's inputs; all but d_output require gradients."""

    x: Any  # (T, d)
    router_weight: Any  # (E, d)
    w1: Any  # (E, 2n, d)
    w2: Any  # (E, d, n)
    d_output: Any  # (T, d)

    @property
    def leaves(self) -> tuple[Any, ...]:
        """What has a gradient, in a fixed order."""
        return self[:4]


GRADIENTS = ("dx", "drouter_weight", "dw1", "dw2")


def make_tensors(problem: Problem, seed: int = 0) -> Tensors:
    """Random tensors, the same for the same seed."""
    import torch

    _, num_tokens, hidden_size, intermediate_size, num_experts, _ = problem.shape
    dtype = getattr(torch, problem.dtype)
    generator = torch.Generator(problem.device).manual_seed(seed)

    def random(*shape: int, scale: float) -> Any:
        values = torch.empty(shape, dtype=torch.float32, device=problem.device)
        return values.normal_(0, scale, generator=generator).to(dtype)

    leaves = (
        random(num_tokens, hidden_size, scale=1.0),
        random(num_experts, hidden_size, scale=hidden_size**-0.5),
        random(num_experts, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5),
        random(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5),
    )
    d_output = random(num_tokens, hidden_size, scale=1.0)
    return Tensors(*(leaf.requires_grad_() for leaf in leaves), d_output)


def cast(tensors: Tensors, dtype: Any) -> Tensors:
    """The same values in another dtype, as leaves of their own."""
    leaves = (leaf.detach().to(dtype).requires_grad_() for leaf in tensors.leaves)
    return Tensors(*leaves, tensors.d_output.to(dtype))
