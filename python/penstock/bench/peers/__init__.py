# SPDX-License-Identifier: Apache-2.0
"""The implementations that bench can run, one file each.

A peer is a Peer: a name, a function that says why it cannot run a problem (empty if it can), and a
function that computes the layer's output from its tensors, with autograd. The router (product,
top-k, softmax over the chosen) is part of every peer.
"""

from penstock.bench.peers import (
    momoe,
    penstock_engine,
    scattermoe,
    sonicmoe,
    torch_compiled,
    torch_grouped,
    torch_loop,
)
from penstock.bench.peers.peer import Peer

__all__ = ["ALL", "ON_GPU", "Peer", "by_name"]

ALL: tuple[Peer, ...] = (penstock_engine.PEER, torch_loop.PEER, torch_grouped.PEER)
ON_GPU: tuple[Peer, ...] = (
    penstock_engine.PEER,
    torch_grouped.PEER,
    sonicmoe.PEER,
    scattermoe.PEER,
    momoe.PEER,
)


def by_name() -> dict[str, Peer]:
    """Every peer, also those that run only where they are asked for by name."""
    return {peer.name: peer for peer in (*ALL, *ON_GPU, torch_compiled.PEER)}
