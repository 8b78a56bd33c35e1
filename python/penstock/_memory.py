# SPDX-License-Identifier: Apache-2.0
"""Allocates workspaces, and lets a test or a benchmark watch how large they are.

On torch a workspace is a torch tensor, so torch's allocator statistics see it too. Like these, a
watcher sees the whole process: autograd runs the backward passes of a GPU's tensors in a thread of
its own, which neither the caller's thread-locals nor its contextvars reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
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


_watchers: tuple[WorkspaceLog, ...] = ()  # replaced as a whole, so readers need no lock
_changing = Lock()


@contextmanager
def watch_workspaces() -> Iterator[WorkspaceLog]:
    """Record the bytes of each workspace allocated during the block, by whichever thread."""
    global _watchers
    log = WorkspaceLog()
    with _changing:
        _watchers = (*_watchers, log)
    try:
        yield log
    finally:
        with _changing:
            _watchers = tuple(other for other in _watchers if other is not log)


def workspace(num_bytes: int, like: Any) -> Any:
    """Scratch memory of exactly `num_bytes`, on the device and in the library of `like`."""
    memory = arrays_of(like).workspace(num_bytes, like)
    size = memory.nbytes
    for log in _watchers:
        log.sizes.append(size)
    return memory
