# SPDX-License-Identifier: Apache-2.0
"""Questions to the engine: its version, its backends, which of them runs a layer and why not.

Public through penstock.list_backends and its neighbours; `penstock info` prints the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from penstock._context import TORCH, current, torch_chosen, torch_refusal
from penstock._engine import Config
from penstock._library import library
from penstock._sizes import problem_of_shape


@dataclass(frozen=True)
class BackendInfo:
    """One backend of this build, in the order in which they are tried for their device."""

    name: str  # "reference", "fast", "cuda", "torch"
    device: str  # "cpu" or "cuda"; "any" for torch
    available: bool  # usable on this machine
    reason: str  # why not; empty when available
    description: str  # what it runs on: instruction set, GPU and driver
    operations: tuple[str, ...]


def version() -> str:
    """The version of the loaded engine."""
    return str(library().version())


def list_backends() -> list[BackendInfo]:
    """Every backend that this build knows, with the reason where one cannot be used.

    The last is none of the engine's: plain torch operations, for penstock.backend("torch") only.
    """
    engine = [
        BackendInfo(
            str(name),
            str(device),
            bool(available),
            str(reason),
            str(description),
            tuple(str(operation) for operation in operations),
        )
        for name, device, available, reason, description, operations in library().list_backends()
    ]
    return [*engine, _torch_path()]


def why_not(
    backend: str,
    shape: tuple[int, int, int, int, int],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    activation: str = "swiglu",
) -> str:
    """Why the named backend cannot run a layer of this shape; empty if it can.

    shape: (num_tokens, hidden_size, intermediate_size, num_experts, top_k).
    """
    if backend == TORCH:
        return _torch_path().reason
    config = Config(activation=activation)
    return str(library().why_not(backend, config, problem_of_shape(shape, dtype, device)))


def chosen_backend(
    shape: tuple[int, int, int, int, int],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    activation: str = "swiglu",
) -> str:
    """The backend that a layer of this shape runs on in the context in force.

    UnsupportedError with every candidate's reason if there is none.
    """
    context = current()
    if torch_chosen():
        if reason := _torch_path().reason:
            raise torch_refusal("chosen_backend", reason, "Install torch")
        return TORCH
    call = (context.backend, context.threads, 0, context.sm_budget, context.id_checks, "")
    config = Config(activation=activation)
    return str(library().chosen_backend(call, config, problem_of_shape(shape, dtype, device)))


def _torch_path() -> BackendInfo:
    """What stands for plain torch operations in the list; torch itself is not imported."""
    try:
        installed = find_spec("torch") is not None
    except ModuleNotFoundError:  # an import hook withholds it
        installed = False
    return BackendInfo(
        TORCH,
        "any",
        installed,
        "" if installed else "torch is not installed",
        'plain torch operations on any device, only by name: penstock.backend("torch")',
        ("router_logits", "route", "replay", "plan", "experts"),
    )
