# SPDX-License-Identifier: Apache-2.0
"""NVTX ranges around the engine's passes, where `penstock.backend(ranges="nvtx")` asks for them.

A range is a name on the host's timeline, such as penstock::experts_backward, which Nsight Systems
and torch's profiler (emit_nvtx) show above the kernels that were launched inside it. Off, they cost
one comparison a pass. Used by _engine.py and _engine_backward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from penstock.errors import invalid

NVTX = "nvtx"
KINDS = ("", NVTX)

Pass = TypeVar("Pass", bound=Callable[..., Any])


def ranged(function: Pass) -> Pass:
    """A pass, whose last positional argument is the context, inside a range of its name."""
    name = f"penstock::{function.__name__}"

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if arguments[-1].ranges != NVTX:
            return function(*arguments)
        with _nvtx().range(name):
            return function(*arguments)

    return call  # type: ignore[return-value]


def check_kind(kind: str) -> None:
    """ValueError for a kind that is not known, or that torch here has no library for."""
    if kind not in KINDS:
        raise invalid("ranges", repr(kind), '"nvtx" or "" (none)', "Check the spelling")
    if kind != NVTX:
        return
    nvtx = _nvtx()
    try:
        nvtx.range_push("penstock: a first range")
        nvtx.range_pop()
    except RuntimeError as error:
        raise invalid(
            "ranges",
            f"'nvtx' with a torch that cannot mark ranges ({error})",
            "a torch built with CUDA",
            'Leave ranges out, or pass ""',
        ) from error


def _nvtx() -> Any:
    import torch

    return torch.cuda.nvtx
