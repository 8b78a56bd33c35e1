# SPDX-License-Identifier: Apache-2.0
"""Bytes of one step as torch's allocator counts them, the same way for every implementation.

Kept: what is allocated after forward beyond what was before, the output aside. Peak: the most at
any moment of forward and backward beyond what was allocated before, output and gradients included.
The allocator counts in blocks of 512 bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Bytes of one step."""

    kept_bytes: int
    peak_bytes: int
    gradient_bytes: int

    @property
    def peak_beyond_results(self) -> int:
        """The peak without the gradients, which every implementation returns."""
        return self.peak_bytes - self.gradient_bytes


def measure_memory(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Memory:
    """Runs a step: `backward` takes the output and returns the gradients."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = forward()
    kept = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
    gradients = backward(output)
    peak = torch.cuda.max_memory_allocated() - before
    return Memory(kept, peak, sum(gradient.nbytes for gradient in gradients))
