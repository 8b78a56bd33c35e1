# SPDX-License-Identifier: Apache-2.0
"""The one exception of reading, converting and loading checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is refused: what was wrong, got, expected, and what to do.

    Whoever raises it has written nothing: no file, no tensor of a model.
    """

    def __init__(self, what: str, *, got: object, expected: object, remedy: str) -> None:
        super().__init__(f"{what}: got {got}, expected {expected}. {remedy}")


def some_of(names: object, limit: int = 5) -> str:
    """The first few names of a collection, sorted, for a message."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
