# SPDX-License-Identifier: Apache-2.0
"""How long a new process takes until a first step is finished, in parts.

Imports and the creation of the CUDA context are the platform's; what is left is the first step of
an implementation (loading its kernels, compiling or tuning them where it does that), and the first
step at each new shape. torch imports its compiler at the first call of any custom operator, ours
too; that is counted among the imports.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Start(NamedTuple):
    """Seconds before any implementation ran."""

    imports_s: float  # from the process's start until everything is imported
    context_s: float  # the CUDA context and a first kernel of torch


def seconds_of_process() -> float:
    """Seconds since this process was started, to a hundredth (Linux's clock ticks)."""
    with open("/proc/self/stat", encoding="ascii") as file:
        after_name = file.read().rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def measure_start() -> Start:
    """Imports what is left and creates the CUDA context. Called once, when nothing has run."""
    import torch
    import torch._dynamo

    imports = seconds_of_process()
    began = time.perf_counter()
    torch.zeros(1, device="cuda").add_(1)
    torch.cuda.synchronize()
    return Start(imports, time.perf_counter() - began)


def first_step_s(step: Callable[[], Any]) -> float:
    """Seconds of a step until the GPU has finished it."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began
