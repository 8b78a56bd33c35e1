# SPDX-License-Identifier: Apache-2.0
"""A peer as actions to time: forward and a whole step, called by the host or replayed as a graph.

A graph replays the kernels without the host, so its time is the GPU's alone. An implementation that
cannot be captured (it waits for the GPU, or chooses launches by its data) is timed eagerly only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from penstock.bench.gpu.clock import Action
from penstock.bench.peers.peer import Peer
from penstock.bench.problem import Problem, Tensors

WARM_UP_STEPS = 2


class Eager(NamedTuple):
    """The peer's passes on the problem's tensors."""

    forward: Callable[[], Any]  # with the graph that backward needs
    backward: Callable[[Any], Any]  # the gradients of an output
    infer: Callable[[], Any]  # forward with nothing kept

    def step(self) -> tuple[Any, ...]:
        """Output and gradients."""
        output = self.forward()
        return (output.detach(), *self.backward(output))


def eager(peer: Peer, problem: Problem, tensors: Tensors) -> Eager:
    """The passes of a peer; gradients are returned, so nothing has to be cleared between steps."""
    import torch

    def backward(output: Any) -> Any:
        return torch.autograd.grad(output, peer.leaves(tensors), tensors.d_output)

    def infer() -> Any:
        with torch.no_grad():
            return peer.forward(problem, tensors)

    return Eager(lambda: peer.forward(problem, tensors), backward, infer)


class Replay:
    """A captured action: calling it replays; the results lie where the capture put them."""

    def __init__(self, action: Action) -> None:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                action()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = action()

    def __call__(self) -> None:
        """One replay on the current stream."""
        self._graph.replay()


def actions_of(name: str, forward: Action, step: Action, why_no_graph: str) -> dict[str, Action]:
    """What to time of one implementation, by "name/how/pass"."""
    actions = {f"{name}/eager/forward": forward, f"{name}/eager/step": step}
    if not why_no_graph:
        actions[f"{name}/graph/forward"] = Replay(forward)
        actions[f"{name}/graph/step"] = Replay(step)
    return actions
