# SPDX-License-Identifier: Apache-2.0
"""Times actions in turn on either device, for the programs of this folder.

A round runs every action once and another one begins each time, so that whatever else the machine
does falls on all alike; figures are medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

WARM_UP_ROUNDS = 1


def synchronize(device: str) -> None:
    """Wait until the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(action: Callable[[], Any], device: str) -> float:
    """What one call takes, from a device at rest to a device at rest."""
    synchronize(device)
    began = time.perf_counter()
    result = action()
    synchronize(device)
    spent = (time.perf_counter() - began) * 1e3
    del result
    return spent


class Effort(NamedTuple):
    """How long to measure: whichever ends first, but one round at least."""

    rounds: int
    seconds: float


def medians_in_turn(
    actions: dict[str, Callable[[], Any]], device: str, effort: Effort
) -> dict[str, float]:
    """Median milliseconds of every action, after a round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    began = time.monotonic()
    for number in range(WARM_UP_ROUNDS + effort.rounds):
        if number > WARM_UP_ROUNDS and time.monotonic() - began > effort.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent = milliseconds(actions[name], device)
            if number >= WARM_UP_ROUNDS:
                samples[name].append(spent)
    return {name: statistics.median(values) for name, values in samples.items()}


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
