# SPDX-License-Identifier: Apache-2.0
"""Measures of memory, for tests and benchmarks: what is kept for backward, what a call borrows.

Both watch from outside: kept_bytes sees what autograd saves, whichever code saved it;
watch_workspaces sees every workspace that the front-end allocates, in any thread. fresh_memory lets
torch's own statistics see the front-end's large allocations too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from penstock._blocks import fresh_memory
from penstock._memory import WorkspaceLog, watch_workspaces

__all__ = ["KeptBytes", "WorkspaceLog", "fresh_memory", "kept_bytes", "watch_workspaces"]


class KeptBytes:
    """Tensors that autograd saved while watching: each storage counted once."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._excluded = {_address(tensor) for tensor in excluded}
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address may not be used again while we count

    def add(self, tensor: Tensor) -> None:
        """Count a saved tensor, unless its storage is excluded or counted."""
        address = _address(tensor)
        if tensor.numel() == 0 or address in self._excluded or address in self._sizes:
            return
        self._sizes[address] = tensor.untyped_storage().nbytes()
        self._alive.append(tensor)

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())


@contextmanager
def kept_bytes(*excluded: Tensor) -> Iterator[KeptBytes]:
    """Measure the bytes that autograd keeps for backward inside the block.

    excluded: tensors that are alive anyway (x, the weights), not counted. Read .total.
    """
    kept = KeptBytes(excluded)

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
