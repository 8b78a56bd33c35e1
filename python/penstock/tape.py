# SPDX-License-Identifier: Apache-2.0
"""Routing replay: record who went where, and send the same tokens there again.

    tape = penstock.RoutingTape()
    with tape.record(model):
        model(x)
    with tape.replay(model):      # perhaps with other weights
        model(x)                  # the recorded experts; scores and gradients of the new logits

For reinforcement learning, where the policy that trains must use the experts of the policy that
sampled, and for debugging. Layers are told apart by their place in model.modules(), their calls by
their order. Where activation checkpoints compute layers again, the backward pass of a replay
belongs inside the block: a layer's last call that was not yet computed again gets its routing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from penstock import routers
from penstock.balance import recomputing
from penstock.errors import invalid
from penstock.routing import Routing

if TYPE_CHECKING:
    from penstock.modules import MoE


class RoutingTape:
    """The routings of a model's MoE layers, one list for each layer, in order of the calls."""

    def __init__(self) -> None:
        self.routings: list[list[Routing]] = []
        self._places: dict[MoE, int] = {}
        self._next: list[int] = []  # of each layer, the call that a replay comes to
        self._played: list[list[int]] = []  # calls that a checkpoint may compute again
        self._replays = False

    @contextmanager
    def record(self, model: nn.Module) -> Iterator[RoutingTape]:
        """Record every call of the layers of `model` in the block; what was recorded is dropped."""
        self.routings = [[] for _ in _layers_of(model)]
        with self._mounted(model):
            yield self

    @contextmanager
    def replay(self, model: nn.Module) -> Iterator[RoutingTape]:
        """Route the calls of the block as recorded, from the first recorded call on."""
        layers = len(_layers_of(model))
        if layers != len(self.routings):
            raise invalid(
                "model",
                f"{layers} MoE layers",
                f"{len(self.routings)}, as were recorded",
                "Replay the model that was recorded, or another of its shape",
            )
        self._replays = True
        try:
            with self._mounted(model):
                yield self
        finally:
            self._replays = False

    def routing(self, layer: MoE, logits: Tensor) -> Routing:
        """The routing of a call of `layer`; called by penstock.MoE in place of its own choice."""
        place = self._places[layer]
        if self._replays:
            return routers.replay(logits, self._recorded(place))
        chosen = layer.choose(logits)
        if not recomputing():
            self.routings[place].append(chosen.detach())
        return chosen

    def _recorded(self, place: int) -> Routing:
        recorded = self.routings[place]
        if recomputing():
            return recorded[self._played[place].pop()]
        call = self._next[place]
        if call >= len(recorded):
            raise invalid(
                f"call {call + 1} of MoE layer {place}",
                f"a recording of {len(recorded)} calls",
                "as many calls as were recorded",
                "Replay the calls that the recording saw, in their order",
            )
        self._next[place] += 1
        self._played[place].append(call)
        return recorded[call]

    @contextmanager
    def _mounted(self, model: nn.Module) -> Iterator[None]:
        layers = _layers_of(model)
        busy = [layer for layer in layers if layer.tape is not None]
        if busy:
            raise invalid(
                "model",
                "a layer with a tape",
                "one that neither records nor replays",
                "Leave the other block first",
            )
        self._places = {layer: place for place, layer in enumerate(layers)}
        self._next = [0] * len(layers)
        self._played = [[] for _ in layers]
        for layer in layers:
            layer.tape = self
        try:
            yield
        finally:
            for layer in layers:
                layer.tape = None
            self._places = {}


def _layers_of(model: nn.Module) -> list[MoE]:
    from penstock.modules import MoE

    return [module for module in model.modules() if isinstance(module, MoE)]
