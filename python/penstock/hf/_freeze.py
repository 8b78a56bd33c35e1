# SPDX-License-Identifier: Apache-2.0
"""Which single experts of a patched module get no gradient work: patch()'s argument `frozen`.

The mask is a buffer of the experts module, so that it moves with the weights, and no part of the
state dict. Read by _experts.py at every call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from penstock.errors import invalid

_TRAINABLE = "_penstock_trainable"


def frozen_ids(
    num_experts: Mapping[str, int], frozen: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """The frozen experts of each module, from patterns of module names.

    num_experts: by module name. ValueError for a pattern or an id that is not there.
    """
    ids: dict[str, set[int]] = {name: set() for name in num_experts}
    for pattern, experts in frozen.items():
        matching = [name for name in num_experts if fnmatchcase(name, pattern)]
        if not matching:
            raise invalid(
                "frozen",
                f"{pattern!r}, which matches no experts module",
                f"names or patterns of names, such as {next(iter(num_experts))!r}",
                "penstock.hf.patch(model) reports the names",
            )
        for name in matching:
            for expert in experts:
                if not 0 <= expert < num_experts[name]:
                    raise invalid(
                        f"frozen[{pattern!r}]",
                        expert,
                        f"ids in [0, {num_experts[name]}), as {name} has",
                        "Leave it out",
                    )
            ids[name].update(experts)
    return {name: sorted(some) for name, some in ids.items()}


def set_frozen(module: nn.Module, num_experts: int, ids: list[int]) -> None:
    """Freeze these experts and no others."""
    forget_frozen(module)
    if ids:
        mask = torch.ones(num_experts, dtype=torch.uint8)
        mask[ids] = 0
        device = next(module.parameters()).device
        module.register_buffer(_TRAINABLE, mask.to(device), persistent=False)


def trainable_of(module: nn.Module) -> Tensor | None:
    """(E) uint8 with 0 for frozen experts, None where none is."""
    return getattr(module, _TRAINABLE, None)


def forget_frozen(module: nn.Module) -> None:
    """Remove what set_frozen() kept."""
    if hasattr(module, _TRAINABLE):
        delattr(module, _TRAINABLE)
