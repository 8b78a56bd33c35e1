# SPDX-License-Identifier: Apache-2.0
"""Times peers in turn, and measures what they keep and what they need on top.

One process, alternating: a round runs every peer once, so that whatever else the machine does falls
on all alike; the figures are medians over rounds. A Stopwatch is what differs between devices.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from penstock.bench.peers.peer import Peer
from penstock.bench.problem import Problem, Tensors


class Stopwatch(Protocol):
    """How a device is timed."""

    def time(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds that `action` takes, and its result."""

    def flush(self) -> None:
        """Empties the caches that a repeat would otherwise find warm."""


class CpuStopwatch:
    """A CPU call has finished when it returns. A layer's weights are far larger than the caches."""

    def time(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds that `action` takes, and its result."""
        start = time.perf_counter()
        result = action()
        return (time.perf_counter() - start) * 1e3, result

    def flush(self) -> None:
        """Nothing to empty."""


STOPWATCHES: dict[str, Callable[[], Stopwatch]] = {"cpu": CpuStopwatch}


class Times(NamedTuple):
    """Milliseconds of one peer: medians, and the quartiles of the total."""

    forward_ms: float
    backward_ms: float
    total_ms: float
    low_ms: float
    high_ms: float


class Memory(NamedTuple):
    """Bytes of one peer, x, weights and results aside."""

    kept_bytes: int  # between forward and backward
    peak_bytes: int  # on top of that, at the worst moment


def run_step(
    peer: Peer, problem: Problem, tensors: Tensors, stopwatch: Stopwatch
) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass."""
    for leaf in tensors.leaves:
        leaf.grad = None
    stopwatch.flush()
    forward_ms, output = stopwatch.time(lambda: peer.forward(problem, tensors))
    backward_ms, _ = stopwatch.time(lambda: output.backward(tensors.d_output))
    return forward_ms, backward_ms


def time_peers(
    peers: list[Peer],
    problem: Problem,
    tensors: Tensors,
    repeats: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Times of every peer by name, after one warm-up round."""
    stopwatch = STOPWATCHES[problem.device]()
    samples: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    for peer in peers:
        run_step(peer, problem, tensors, stopwatch)
    for round_index in range(repeats):
        # Everyone starts a round equally often: the first finds other things in the caches.
        first = round_index % len(peers)
        for peer in peers[first:] + peers[:first]:
            samples[peer.name].append(run_step(peer, problem, tensors, stopwatch))
        on_round()
    return {name: _times(values) for name, values in samples.items()}


def _times(samples: list[tuple[float, float]]) -> Times:
    totals = sorted(forward + backward for forward, backward in samples)
    quarter = len(totals) // 4
    return Times(
        statistics.median(forward for forward, _ in samples),
        statistics.median(backward for _, backward in samples),
        statistics.median(totals),
        totals[quarter],
        totals[-1 - quarter],
    )


def measure_memory(peer: Peer, problem: Problem, tensors: Tensors) -> Memory:
    """Bytes kept for backward, and peak bytes beyond what is kept and what is returned.

    Kept: the distinct storages that autograd saves, the layer's own inputs aside. Peak: from
    torch's allocator, whose events the profiler lists; Penstock's workspaces are among them.
    """
    from penstock.testing import fresh_memory, kept_bytes

    for leaf in tensors.leaves:
        leaf.grad = None
    gc.collect()
    peak = _PeakOfAllocations()
    with fresh_memory(), kept_bytes(*tensors) as kept, peak:
        output = peer.forward(problem, tensors)
    forward_peak = peak.bytes - kept.total - output.nbytes
    total = kept.total
    del kept  # it keeps the saved tensors alive, which backward would otherwise free as it goes
    with fresh_memory(), peak:
        output.backward(tensors.d_output)
    gradients = sum(leaf.grad.nbytes for leaf in tensors.leaves)
    return Memory(total, max(forward_peak, peak.bytes - gradients, 0))


class _PeakOfAllocations:
    """The most bytes that live at once among those allocated inside the block, less those freed."""

    def __enter__(self) -> _PeakOfAllocations:
        from torch.profiler import ProfilerActivity, profile

        self.bytes = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._profile.__exit__(*exception)
        live = 0
        for event in self._profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                self.bytes = max(self.bytes, live)
