# SPDX-License-Identifier: Apache-2.0
"""What penstock.MoE reports of its last call: loads, and the router's losses.

Losses are computed when they are read, from the logits, which stats keeps (4 T E bytes) until the
layer's next call; a caller who never reads them pays nothing else.
"""

from __future__ import annotations

from torch import Tensor

from penstock import losses
from penstock.routing import Routing, RoutingReport


class MoEStats:
    """Loads and losses of one call of penstock.MoE; T tokens, E experts."""

    def __init__(
        self, logits: Tensor, loads: Tensor, coefficients: tuple[float, float], routing: Routing
    ) -> None:
        self.logits = logits  # (T, E) fp32, with the router's graph
        self.loads = loads  # (E) int32: rows of each expert
        self.coefficients = coefficients  # of the auxiliary loss and of the z-loss
        self.routing = routing.detach()  # who went where

    def detached(self) -> MoEStats:
        """The same numbers without the graph of the call."""
        return MoEStats(self.logits.detach(), self.loads, self.coefficients, self.routing)

    @property
    def report(self) -> RoutingReport | None:
        """What was dropped, added and left without an expert; None where K is fixed."""
        return None if self.routing.report is None else self.routing.read_report()

    @property
    def aux_loss(self) -> Tensor:
        """losses.load_balancing_loss, a scalar, without a coefficient; differentiable."""
        return losses.load_balancing_loss(self.logits, self.loads)

    @property
    def z_loss(self) -> Tensor:
        """losses.router_z_loss, a scalar, without a coefficient; differentiable."""
        return losses.router_z_loss(self.logits)

    @property
    def total_loss(self) -> Tensor:
        """aux_loss_coef * aux_loss + z_loss_coef * z_loss: add it to the training loss."""
        aux, z = self.coefficients
        total = self.logits.new_zeros(())
        if aux != 0.0:
            total = total + aux * self.aux_loss
        if z != 0.0:
            total = total + z * self.z_loss
        return total

    @property
    def entropy(self) -> Tensor:
        """losses.routing_entropy, a scalar in nats."""
        return losses.routing_entropy(self.logits)

    @property
    def max_load_violation(self) -> Tensor:
        """losses.max_load_violation, a scalar: 0 when balanced."""
        return losses.max_load_violation(self.loads)

    @property
    def drop_rate(self) -> float:
        """Pairs that lost their place over pairs chosen; 0 where K is fixed."""
        report = self.report
        if report is None:
            return 0.0
        chosen = report.pairs - report.added + report.dropped
        return report.dropped / max(chosen, 1)

    @property
    def idle_experts(self) -> Tensor:
        """How many experts got no row: a scalar int64."""
        return losses.idle_experts(self.loads)

    @property
    def load_imbalance(self) -> Tensor:
        """The largest load over the mean load: a scalar."""
        return losses.load_imbalance(self.loads)
