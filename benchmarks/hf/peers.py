# SPDX-License-Identifier: Apache-2.0
"""Implementations of a model's experts by name, each switched on for as long as it is measured.

Names are those of transformers' registry, "eager" (the family's own loop) and ours. A compiled one
has the decoder layers compiled, one after another: they share their code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import penstock

OURS = "penstock"


@dataclass
class Implementation:
    """An entry of transformers' registry, run as it is."""

    experts: str

    @property
    def name(self) -> str:
        """How rows and tables call it."""
        return self.experts

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """The model computes its experts this way inside the block."""
        model.set_experts_implementation(self.experts)
        yield

    def alone(self, block: nn.Module) -> Callable[..., Any]:
        """An MoE block as it is called outside its layer."""
        return block


@dataclass
class Compiled(Implementation):
    """The same with torch.compile around every decoder layer, or around the block alone."""

    layers: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)
    block: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """How rows and tables call it."""
        return f"{self.experts}, compiled"

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """The model computes its experts this way, its layers compiled, inside the block."""
        with super().active(model):
            if not self.layers:
                for layer in model.model.layers:
                    layer.compile(dynamic=False)
                    self.layers.append((layer, layer._compiled_call_impl))
            for layer, call in self.layers:
                layer._compiled_call_impl = call
            try:
                yield
            finally:
                for layer, _ in self.layers:
                    layer._compiled_call_impl = None

    def alone(self, block: nn.Module) -> Callable[..., Any]:
        """An MoE block as it is called outside its layer, compiled once."""
        if self.block is None:
            self.block = torch.compile(block, dynamic=False)
        return self.block


def registered() -> list[str]:
    """The names that transformers knows, its loop first; ours is registered besides."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = [name for name in ALL_EXPERTS_FUNCTIONS.valid_keys() if name != OURS]
    penstock.hf.register()
    return ["eager", *names]
