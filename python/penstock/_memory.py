# SPDX-License-Identifier: Apache-2.0
"""Allocates workspaces, and lets a test or a benchmark watch how large they are.

On torch a workspace is a torch tensor, so torch's allocator statistics see it too. Watchers are in
a contextvar: one thread's measurements do not see another's calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from penstock._arrays import arrays_of


class WorkspaceLog:
    """Bytes of every workspace that was allocated while watching, in order."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @property
    def peak_bytes(self) -> int:
        """The largest. Workspaces live for one call, so they never add up."""
        return max(self.sizes, default=0)


_watchers: ContextVar[tuple[WorkspaceLog, ...]] = ContextVar("penstock_watchers", default=())


@contextmanager
def watch_workspaces() -> Iterator[WorkspaceLog]:
    """Record the bytes of each workspace allocated inside the block."""
    log = WorkspaceLog()
    token = _watchers.set((*_watchers.get(), log))
    try:
        yield log
    finally:
        _watchers.reset(token)


def workspace(num_bytes: int, like: Any) -> Any:
    """Scratch memory of exactly `num_bytes`, on the device and in the library of `like`."""
    memory = arrays_of(like).workspace(num_bytes, like)
    size = memory.nbytes
    for log in _watchers.get():
        log.sizes.append(size)
    return memory
