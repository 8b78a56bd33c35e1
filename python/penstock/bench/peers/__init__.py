# SPDX-License-Identifier: Apache-2.0
"""The implementations that bench can run, one file each.

A peer is a Peer: a name, a function that says why it cannot run a problem (empty if it can), and a
function that computes the layer's output from its tensors, with autograd. The router (product,
top-k, softmax over the chosen) is part of every peer.
"""

from penstock.bench.peers import penstock_engine, torch_grouped, torch_loop
from penstock.bench.peers.peer import Peer

__all__ = ["ALL", "Peer"]

ALL: tuple[Peer, ...] = (penstock_engine.PEER, torch_loop.PEER, torch_grouped.PEER)
