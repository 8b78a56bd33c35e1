# SPDX-License-Identifier: Apache-2.0
"""Penstock: a Mixture-of-Experts engine, forward and backward, with a thin Python front-end.

    layer = penstock.MoE(hidden_size, intermediate_size, num_experts, top_k)     # a torch module
    y = penstock.functional.moe_experts(x, w1, w2, scores, ids)                  # torch or NumPy
    with penstock.backend("reference"): ...

Importing this package imports neither torch nor the engine's library: MoE, Experts and losses load
torch at their first use, and everything else works on NumPy arrays without torch installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from penstock import functional, routers
from penstock._backends import BackendInfo, chosen_backend, list_backends, version, why_not
from penstock._context import backend
from penstock.errors import DeviceError, OutOfMemoryError, UnsupportedError
from penstock.info import collect as info  # the function; the module stays in sys.modules
from penstock.routing import Routing

if TYPE_CHECKING:
    from penstock import balance, checkpoint, hf, lora, losses, testing
    from penstock.checkpoint.into_model import load
    from penstock.modules import Experts, MoE
    from penstock.tape import RoutingTape

__all__ = [
    "BackendInfo",
    "DeviceError",
    "Experts",
    "MoE",
    "OutOfMemoryError",
    "Routing",
    "RoutingTape",
    "UnsupportedError",
    "backend",
    "balance",
    "checkpoint",
    "chosen_backend",
    "functional",
    "hf",
    "info",
    "list_backends",
    "load",
    "lora",
    "losses",
    "routers",
    "testing",
    "version",
    "why_not",
]

_WITH_TORCH = {
    "MoE": ("penstock.modules", "MoE"),
    "Experts": ("penstock.modules", "Experts"),
    "RoutingTape": ("penstock.tape", "RoutingTape"),
    "balance": ("penstock.balance", None),
    "losses": ("penstock.losses", None),
    "hf": ("penstock.hf", None),
    "checkpoint": ("penstock.checkpoint", None),
    "load": ("penstock.checkpoint.into_model", "load"),
    "lora": ("penstock.lora", None),
    "testing": ("penstock.testing", None),
}


def __getattr__(name: str) -> Any:
    """What needs torch, imported at its first use."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    module_name, attribute = _WITH_TORCH[name]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"penstock.{name}: got no torch, expected it installed. Run pip install "
            "'penstock[torch]', or use penstock.functional on NumPy arrays"
        ) from error
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value
