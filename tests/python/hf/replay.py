# SPDX-License-Identifier: Apache-2.0
"""Records which experts a run chose and makes another run choose the same.

Every router ends in torch.topk, so a TorchFunctionMode sees each choice, and a replay gathers the
recorded ones from the new run's own values: whatever the family does to them stays differentiable.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

TOPK = (torch.topk, torch.Tensor.topk)


class RecordChoices(TorchFunctionMode):
    """Keeps the indices of every topk, in order, in `choices`."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in TOPK:
            self.choices.append(result[1].detach().clone())
        return result


class ReplayChoices(TorchFunctionMode):
    """Answers every topk with the recorded indices and the values that now stand there."""

    def __init__(self, choices: list[torch.Tensor]) -> None:
        super().__init__()
        self.left = list(choices)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in TOPK:
            return function(*args, **(kwargs or {}))
        indices = self.left.pop(0)
        dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
        values = torch.gather(args[0], dim, indices)
        return torch.return_types.topk((values, indices))
