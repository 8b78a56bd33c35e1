# SPDX-License-Identifier: Apache-2.0
"""Times actions on a GPU in turn, each with cold caches, and sums up the samples.

A round runs every action once, in an order of its own, so that clocks and temperature fall on all
alike: after an action that waits for memory, a chip at its power limit runs faster for a while,
and in a fixed order one action would always profit. Between two actions 256 MiB are written,
several times the second-level cache. The clock is a pair of CUDA events around the action: for an
eager call that includes the launches the GPU had to wait for.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

FLUSH_BYTES = 256 << 20
WARM_UP_ROUNDS = 2

Action = Callable[[], Any]


class Summary(NamedTuple):
    """Milliseconds of one action: the median, and the quartiles that say how sure it is."""

    median: float
    low: float
    high: float


def summary(samples: list[float]) -> Summary:
    """Median and quartiles; with fewer than four samples the quartiles are the extremes."""
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    return Summary(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def order_of(names: list[str], round_index: int) -> list[str]:
    """The order of one round: drawn, the same on every machine."""
    return random.Random(round_index).sample(names, len(names))


def time_in_turn(actions: dict[str, Action], rounds: int) -> dict[str, Summary]:
    """Milliseconds of every action over `rounds` rounds, after two rounds to warm up."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for round_index in range(rounds + WARM_UP_ROUNDS):
        events = {}
        for name in order_of(names, round_index):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = actions[name]()
            end.record()
            del result  # its memory goes back in stream order, before the next action wants some
            events[name] = (begin, end)
        torch.cuda.synchronize()
        if round_index >= WARM_UP_ROUNDS:
            for name, (begin, end) in events.items():
                samples[name].append(begin.elapsed_time(end))
    return {name: summary(values) for name, values in samples.items()}
