# SPDX-License-Identifier: Apache-2.0
"""The context of a call: which backend, how many threads, how ids are checked.

It is a contextvar, so it follows threads and async tasks the way Python users expect, and the core
keeps no state. The context in force when a forward pass starts is also the one of its backward
pass; inside torch.compile it is read when the compiled code runs (see docs/python.md).
Read by functional.py and by the torch operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from penstock._ranges import check_kind
from penstock.errors import invalid

ID_CHECKS = ("trusted", "checked")


@dataclass(frozen=True)
class CallContext:
    """What travels with a call. The empty backend name leaves the choice to the device's order."""

    backend: str = ""
    threads: int = 0  # 0: all cores that this process may use
    id_checks: str = "trusted"
    sm_budget: int = 0  # GPU multiprocessors, 0: all
    ranges: str = ""  # "nvtx": a range around each pass

    def pack(self) -> str:
        """A string that an operator's schema can carry; unpack is its inverse."""
        return f"{self.backend},{self.threads},{self.id_checks},{self.sm_budget},{self.ranges}"

    @staticmethod
    def unpack(packed: str) -> CallContext:
        """The context of a packed string; "" is the context in force now."""
        if not packed:
            return current()
        name, threads, id_checks, sm_budget, ranges = packed.split(",")
        return CallContext(name, int(threads), id_checks, int(sm_budget), ranges)


_DEFAULT = CallContext()
_current: ContextVar[CallContext] = ContextVar("penstock_context", default=_DEFAULT)


def current() -> CallContext:
    """The context in force in this thread or task."""
    return _current.get()


@contextmanager
def backend(
    name: str | None = None,
    threads: int | None = None,
    *,
    id_checks: str | None = None,
    sm_budget: int | None = None,
    ranges: str | None = None,
) -> Iterator[CallContext]:
    """Choose the backend, and how it runs, for the calls inside a `with` block.

    name: "reference", "fast", "cuda"; "" leaves the choice to the device. A backend chosen by name
    is never replaced by another: a call that it cannot run raises UnsupportedError with its reason.
    threads: CPU threads, 0 for all cores this process may use. Results do not depend on it.
    id_checks: "trusted" skips every id outside [0, E); "checked" raises ValueError for a negative
    id other than -1 and for an expert named twice by one token.
    sm_budget: GPU multiprocessors, 0 for all.
    ranges: "nvtx" puts an NVTX range around each pass, for profilers; "" is none.
    What is not given is taken from the enclosing context. Blocks nest; the old context comes back
    at the end, also after an exception.
    """
    changes: dict[str, object] = {}
    if name is not None:
        if "," in name:
            raise invalid("backend", repr(name), "a backend's name", "See penstock.list_backends()")
        changes["backend"] = name
    if threads is not None:
        if threads < 0:
            raise invalid("threads", threads, "0 (all cores) or more", "Pass a count of threads")
        changes["threads"] = threads
    if id_checks is not None:
        if id_checks not in ID_CHECKS:
            raise invalid("id_checks", repr(id_checks), " or ".join(ID_CHECKS), "Check it")
        changes["id_checks"] = id_checks
    if sm_budget is not None:
        if sm_budget < 0:
            raise invalid("sm_budget", sm_budget, "0 (all) or more", "Pass a count")
        changes["sm_budget"] = sm_budget
    if ranges is not None:
        check_kind(ranges)
        changes["ranges"] = ranges
    context = replace(_current.get(), **changes)
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
