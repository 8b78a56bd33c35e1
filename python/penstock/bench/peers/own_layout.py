# SPDX-License-Identifier: Apache-2.0
"""Weights in a peer's own layout: its own leaves with the problem's values, gradients taken back.

A peer that stores gate and up interleaved, or everything transposed, must not pay for a conversion
in each step, so the conversion happens once for a problem's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.bench.problem import Tensors

# Of the router's weight (E, d), w1 (E, 2n, d) and w2 (E, d, n), in this order.
Weights = tuple[Any, Any, Any]


class OwnLeaves:
    """Leaves of the last tensors that were asked for; one problem at a time, to hold one copy."""

    def __init__(self, to_own: Callable[[Weights], Weights], to_ours: Callable[[Weights], Weights]):
        self._to_own = to_own
        self._to_ours = to_ours
        self._x: Any = None
        self._weights: Weights = (None, None, None)

    def of(self, tensors: Tensors) -> tuple[Any, ...]:
        """x itself, and the weights in the peer's layout."""
        if self._x is not tensors.x:
            weights = self._to_own(tuple(weight.detach() for weight in tensors.leaves[1:]))
            self._weights = tuple(weight.contiguous().requires_grad_() for weight in weights)
            self._x = tensors.x
        return (self._x, *self._weights)

    def in_our_layout(self, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gradients of those leaves as the problem lays its weights out."""
        return (gradients[0], *self._to_ours(gradients[1:]))


def interleaved(w1: Any) -> Any:
    """Rows gate, up, gate, up of w1 (E, 2n, d), whose gate rows come first."""
    return w1.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def concatenated(w1: Any) -> Any:
    """The inverse of interleaved."""
    return w1.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def halves_swapped(w1: Any) -> Any:
    """Up rows before gate rows; its own inverse."""
    return w1.roll(w1.shape[1] // 2, dims=1)
