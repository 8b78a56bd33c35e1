# SPDX-License-Identifier: Apache-2.0
"""The profile: each kernel of a step in order, what it is, how long it takes, how near the limit.

torch's profiler records kernels by CUPTI while a few steps run one by one. The kernels of one step
come in the same order each time, so they are averaged by position; a name is given by what the
kernel's own name says and by what came before it (the backward pass begins with dH).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from penstock.bench.gpu.ceilings import Ceilings
from penstock.bench.gpu.formulas import Work

STEPS = 5
MAX_NAME = 60


class Launch(NamedTuple):
    """One kernel of a step."""

    name: str  # of formulas.py, or the kernel's own, shortened
    kernel: str
    microseconds: float  # median over the steps


class Rate(NamedTuple):
    """Launches of one name together, measured against the ceilings."""

    name: str
    count: int
    microseconds: float
    tflops: float
    gbs: float
    share_of_ceiling: float  # the launch's floor over its time; NaN where no formula is known


# By parts of our kernels' names, in the order in which they are tried. Where a kernel serves two
# launches, the second name is for what comes after dH.
_NAMES: tuple[tuple[str, str, str], ...] = (
    (r"StoreWideEpilogue", "logits", "router's dX and dWr"),
    (r"UpEpilogue", "up-projection", "up-projection again"),
    (r"DownBackwardEpilogue", "dH", "dH"),
    (r"StoreEpilogue", "down-projection", "dX rows"),
    (r"combine_kernel", "combine", "dX combine"),
    (r"warp_router|block_router", "top-k", "top-k"),
    (r"plan_", "plan", "plan"),
    (r"score_gradient|zero_kernel", "dS", "dS"),
    (r"router_backward|pairs_backward|sigmoid_topk_backward", "router backward", "router backward"),
    (r"mark_by_|select_tokens|emit_pairs|sigmoid_topk", "router", "router"),
    # A weight gradient that comes after those of the experts is the router's.
    (
        r"split_|sum_slices|largest_bits|fp32_product|add_slices|WeightGradientEpilogue",
        "logits",
        "router's dX and dWr",
    ),
)
_WEIGHT_GRADIENT = "WeightGradientEpilogue"


def launch_names(kernels: list[str]) -> list[str]:
    """A name for each kernel of one step, in order."""
    weight_gradients = sum(_WEIGHT_GRADIENT in kernel for kernel in kernels)
    remaining = ["dW1 and dW2"] if weight_gradients == 1 else ["dW2", "dW1"]
    after_dh = False
    names = []
    for kernel in kernels:
        after_dh = after_dh or "DownBackwardEpilogue" in kernel
        if _WEIGHT_GRADIENT in kernel and remaining:
            names.append(remaining.pop(0))
            continue
        found = next((rule for rule in _NAMES if _is_ours(kernel, rule[0])), None)
        names.append(short_name(kernel) if found is None else found[1 + after_dh])
    return names


def count_passes(names: list[str]) -> tuple[int, int]:
    """Kernels of the forward and of the backward pass, which begins with dH."""
    first = names.index("dH") if "dH" in names else len(names)
    return first, len(names) - first


def _is_ours(kernel: str, pattern: str) -> bool:
    return "penstock" in kernel and re.search(pattern, kernel) is not None


def short_name(kernel: str) -> str:
    """A kernel's name without its template arguments, namespaces and return type."""
    bare = re.sub(r"<.*", "", kernel.split("(")[0].replace("(anonymous namespace)::", ""))
    bare = bare.split(" ")[-1] or kernel
    return bare.split("::")[-1][:MAX_NAME] or kernel[:MAX_NAME]


def rates(launches: list[Launch], work: dict[str, Work], ceilings: Ceilings) -> list[Rate]:
    """One rate a name, in the order in which the names first come."""
    together: dict[str, list[float]] = {}
    for launch in launches:
        together.setdefault(launch.name, []).append(launch.microseconds)
    result = []
    for name, times in together.items():
        microseconds = sum(times)
        flop, num_bytes = work.get(name, Work(0.0, 0.0))
        floor = ceilings.floor_ms(flop, num_bytes) * 1e3
        share = floor / microseconds if floor else float("nan")
        tflops, gbs = flop / microseconds * 1e-6, num_bytes / microseconds * 1e-3
        result.append(Rate(name, len(times), microseconds, tflops, gbs, share))
    return result


def profile_step(step: Callable[[], Any], clear: Callable[[], Any]) -> list[Launch]:
    """The kernels of a step, those of `clear` (which runs before each) left out."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    steps: list[list[Any]] = []
    for _ in range(STEPS + 1):
        clear()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
            step()
            torch.cuda.synchronize()
        steps.append(_kernels(recorded))
    steps = steps[1:]  # the profiler sets itself up in its first use, and may miss kernels then
    counts = {len(kernels) for kernels in steps}
    if len(counts) != 1:
        raise RuntimeError(f"profile: got steps of {sorted(counts)} kernels, expected one number")
    names = launch_names([kernel for kernel, _ in steps[0]])
    return [
        Launch(name, steps[0][i][0], statistics.median(kernels[i][1] for kernels in steps))
        for i, name in enumerate(names)
    ]


def _kernels(recorded: Any) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on the GPU, in the order in which it began."""
    import torch

    events = [
        event
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
    ]
    events.sort(key=lambda event: event.start_ns())
    return [(event.name(), event.duration_ns() * 1e-3) for event in events]
