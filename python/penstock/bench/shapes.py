# SPDX-License-Identifier: Apache-2.0
"""Shapes by name, from tests/cases/shapes.json, or spelt T,d,n,E,K.

The build copies that file beside this one, so an installed package has the same names as the tests;
in a source tree it is read where it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

_KEYS = ("T", "d", "n", "E", "K")


class Shape(NamedTuple):
    """One layer: T tokens, d hidden, n intermediate, E experts, K experts per token."""

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(T, d, n, E, K)."""
        return tuple(self[1:])

    @property
    def num_rows(self) -> int:
        """Routed rows, T K."""
        return self.num_tokens * self.top_k

    @property
    def flops(self) -> tuple[int, int]:
        """Of the experts' products with a gate, forward and backward: 6 and 12 times T K n d."""
        work = self.num_rows * self.intermediate_size * self.hidden_size
        return 6 * work, 12 * work

    def scaled_down(self) -> Shape:
        """A layer that float64 checks in moments: the same E/K ratio where it can, odd sizes.

        Never fewer than 16 tokens, so that some of them choose their experts clearly.
        """
        experts = min(self.num_experts, 13)
        return Shape(
            f"{self.name} scaled down",
            min(max(self.num_tokens, 16), 131),
            min(self.hidden_size, 88),
            min(self.intermediate_size, 72),
            experts,
            min(self.top_k, experts),
        )


def known_shapes() -> dict[str, Shape]:
    """Every shape that has a name."""
    beside = Path(__file__).with_name("shapes.json")
    in_tree = Path(__file__).resolve().parents[3] / "tests" / "cases" / "shapes.json"
    path = beside if beside.is_file() else in_tree
    entries = json.loads(path.read_text(encoding="utf-8"))["shapes"]
    return {name: Shape(name, *(entry[key] for key in _KEYS)) for name, entry in entries.items()}


def parse_shape(text: str) -> Shape:
    """The shape of a name, or of five numbers T,d,n,E,K; ValueError otherwise."""
    known = known_shapes()
    if text in known:
        return known[text]
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 5:
        raise ValueError(
            f"--shape: got {text!r}, expected T,d,n,E,K or one of {', '.join(known)}. "
            "For instance --shape 2048,512,256,32,4"
        )
    shape = Shape(text, *sizes)
    if min(sizes) < 1 or shape.top_k > shape.num_experts:
        raise ValueError(
            f"--shape: got {text!r}, expected sizes of 1 or more and K of at most E. "
            "The order is T,d,n,E,K"
        )
    return shape
