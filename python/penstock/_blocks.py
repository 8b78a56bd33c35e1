# SPDX-License-Identifier: Apache-2.0
"""Large blocks of host memory, which wait for the next call once nothing uses them.

Memory that is new to a process is zeroed by the kernel, page by page, when it is first touched. A
training step on the CPU needs H, workspaces and gradients each time, hundreds of MB; an allocator
that returns large blocks to the system pays for that memory at every step (docs/perf/cpu.md).

Invariants: a block is in use as long as any view of it is alive; what is idle stays within
`limit_bytes`, the longest unused going first; memory is handed out with its old contents, as malloc
does. Blocks come back when a tensor dies: in any thread, and in the middle of any statement, where
the garbage collector found it. So returning one never waits for the lock. Called by _arrays.py.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import numpy as np

from penstock.errors import invalid

ENVIRONMENT_VARIABLE = "PENSTOCK_CACHE_MIB"
DEFAULT_MIB = 1024
ALIGNMENT = 64  # of a workspace
SMALLEST_BYTES = 4 << 20  # kLargePageBytes: what is smaller, allocators keep for reuse themselves


class BlockCache:
    """Idle blocks in the order of their return, and those on their way back."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = Lock()
        self._idle: list[np.ndarray] = []
        self._returned: deque[np.ndarray] = deque()  # its append needs no lock

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait for a use."""
        with self._exclusive():
            return sum(block.nbytes for block in self._idle)

    def take(self, num_bytes: int) -> np.ndarray:
        """Exactly `num_bytes` bytes (uint8), aligned as a workspace is; contents undefined.

        MemoryError if the system has not as much, without the idle blocks.
        """
        size = _rounded(num_bytes) + ALIGNMENT
        block = self._find(size)
        if block is None:
            try:
                block = np.empty(size, np.uint8)
            except MemoryError:
                self.clear()
                block = np.empty(size, np.uint8)
        return np.asarray(_Lease(self, block, num_bytes))

    def clear(self) -> None:
        """Return every idle block to the system."""
        with self._exclusive():
            self._idle = []

    def put_back(self, block: np.ndarray) -> None:
        """The end of a lease."""
        self._returned.append(block)
        self._sort_in()

    def replace_lock(self) -> None:
        """In a forked child: a thread that exists only in the parent may hold the old one."""
        self._lock = Lock()

    def _find(self, size: int) -> np.ndarray | None:
        with self._exclusive():
            for index in reversed(range(len(self._idle))):  # the latest is in the caches
                if self._idle[index].nbytes == size:
                    return self._idle.pop(index)
        return None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The lock; then what came back meanwhile and found it taken."""
        with self._lock:
            yield
        self._sort_in()

    def _sort_in(self) -> None:
        """Makes returned blocks idle, unless another holds the lock: that one does it then."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._idle.append(self._returned.popleft())
                total = sum(block.nbytes for block in self._idle)
                while total > self.limit_bytes:
                    total -= self._idle.pop(0).nbytes
            finally:
                self._lock.release()


class _Lease:
    """The base of all arrays over a block: gone when the last of them is, and the block with it."""

    def __init__(self, cache: BlockCache, block: np.ndarray, num_bytes: int) -> None:
        self._cache = cache
        self._block = block
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
        }

    def __del__(self) -> None:
        self._cache.put_back(self._block)


def _rounded(num_bytes: int) -> int:
    """At most an eighth more, so that near sizes share blocks; untouched pages cost nothing."""
    step = 1 << max(0, num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step


def limit_from(text: str | None) -> int:
    """Bytes for the environment variable's text; ValueError unless that is a count of MiB."""
    if not text:
        return DEFAULT_MIB << 20
    if not text.isdecimal():
        remedy = "Unset it for the default"
        raise invalid(ENVIRONMENT_VARIABLE, repr(text), "MiB, 0 or more", remedy)
    return int(text) << 20


cache = BlockCache(limit_from(os.environ.get(ENVIRONMENT_VARIABLE)))
os.register_at_fork(after_in_child=cache.replace_lock)

_reuse = ContextVar("penstock_reuse", default=True)


def serves(num_bytes: int) -> bool:
    """Whether an allocation on the CPU of that size comes from the cache here."""
    return num_bytes >= SMALLEST_BYTES and _reuse.get()


@contextmanager
def fresh_memory() -> Iterator[None]:
    """In the block, all memory comes from torch's or NumPy's allocator, whose statistics see it."""
    token = _reuse.set(False)
    try:
        yield
    finally:
        _reuse.reset(token)
