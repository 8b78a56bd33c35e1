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
from penstock.errors import UnsupportedError, invalid

ID_CHECKS = ("trusted", "checked")
TORCH = "torch"  # the name of no backend of the engine: plain torch operations, _torch_path
_IN_PLACE_OF = {
    "threads": "Use torch.set_num_threads",
    "id_checks": "Check the ids where they are made",
    "sm_budget": "Leave it out: torch's products take the whole GPU",
    "ranges": "Use torch.autograd.profiler.emit_nvtx",
}


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
# Whether the context's backend is TORCH, for torch.compile: it guards a plain value by what it is,
# an object by which one it is, and every block has an object of its own.
_torch_chosen: ContextVar[bool] = ContextVar("penstock_torch_chosen", default=False)


def current() -> CallContext:
    """The context in force in this thread or task."""
    return _current.get()


def torch_chosen() -> bool:
    """Whether the context in force names plain torch operations."""
    return _torch_chosen.get()


def context_key() -> str:
    """The context for a torch operator: packed now, or read by it where it is being compiled."""
    import torch

    return "" if torch.compiler.is_compiling() else current().pack()


def refuse_transforms() -> None:
    """NotImplementedError inside a transform of torch.func, where operators lose derivatives."""
    import torch

    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func: got a call of penstock inside vmap, grad, jvp or another transform, "
            "expected plain autograd. Use torch.autograd.grad; in place of vmap, fold the mapped "
            "dimension into the tokens"
        )


def torch_refusal(what: str, got: str, remedy: str) -> UnsupportedError:
    """The error for what plain torch operations do not do here."""
    return UnsupportedError(
        f'{what}: got {got} under penstock.backend("torch"), expected a call that plain torch '
        f"operations stand in for. {remedy}, or choose a backend of the engine"
    )


def refuse_torch(function: str, remedy: str) -> None:
    """UnsupportedError where torch's own operations are chosen: only the engine has `function`."""
    if torch_chosen():
        raise torch_refusal(function, "a call", remedy)


def _check_for_torch(context: CallContext) -> None:
    for setting, remedy in _IN_PLACE_OF.items():
        value = getattr(context, setting)
        if context.backend == TORCH and value != getattr(_DEFAULT, setting):
            raise torch_refusal(setting, repr(value), remedy)


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
    "torch" is none of the engine's: plain torch operations, on any device (docs/python.md).
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
    _check_for_torch(context)
    token, torch_token = _current.set(context), _torch_chosen.set(context.backend == TORCH)
    try:
        yield context
    finally:
        _torch_chosen.reset(torch_token)
        _current.reset(token)
