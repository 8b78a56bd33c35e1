# SPDX-License-Identifier: Apache-2.0
"""Routing replay through modules: recorded experts, live scores, clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import penstock
from penstock import routers

OPTIONS = {"token_rounding": {"tile": 8}}


class Model(nn.Module):
    """Two MoE layers, one of them called twice."""

    def __init__(self, router):
        super().__init__()
        keywords = {"router": router, "router_options": OPTIONS.get(router)}
        self.first = penstock.MoE(8, 4, 6, 2, **keywords)
        self.second = penstock.MoE(8, 4, 6, 2, **keywords)

    def forward(self, x):
        return self.first(self.second(self.first(x)))


def make(router, seed):
    torch.manual_seed(seed)
    return Model(router)


def input_of(seed=3):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def run(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("router", routers.NAMES)
def test_replay_of_the_same_weights_has_the_same_bits(router):
    model, x = make(router, 0), input_of()
    want = run(model, x)
    tape = penstock.RoutingTape()
    with tape.record(model):
        recorded = run(model, x)
    with tape.replay(model):
        replayed = run(model, x)
    for other in (recorded, replayed, run(model, x)):
        assert all(torch.equal(a, b) for a, b in zip(want, other, strict=True))
    assert [len(calls) for calls in tape.routings] == [2, 1]
    assert not any(r.scores.requires_grad for calls in tape.routings for r in calls)


@pytest.mark.parametrize("router", routers.NAMES)
def test_replay_under_other_weights_keeps_the_experts_and_the_router_gradients(router):
    old, new, x = make(router, 0), make(router, 1), input_of()
    tape = penstock.RoutingTape()
    with tape.record(old):
        old(x)
    with tape.replay(new):
        run(new, x)
        assert torch.equal(new.second.stats.routing.ids, tape.routings[1][0].ids)
    assert new.first.router.weight.grad.any() and new.second.router.weight.grad.any()
    own = new.second.stats.routing.ids
    new(x)
    assert not torch.equal(new.second.stats.routing.ids, own)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_replay_each_calls_own_routing(reentrant):
    old, new, x = make("softmax_topk", 0), make("softmax_topk", 1), input_of()
    tape = penstock.RoutingTape()
    with tape.record(old):
        old(x)
    with tape.replay(new):
        want = run(new, x)

    def checkpointed(x):
        for layer in (new.first, new.second, new.first):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    new.zero_grad()
    with tape.replay(new):
        y = checkpointed(x)
        y.square().sum().backward()
    got = [y.detach(), *(p.grad for p in new.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_not_recorded(reentrant):
    model, x = make("softmax_topk", 0), input_of()
    tape = penstock.RoutingTape()
    with tape.record(model):
        checkpoint(model.second, x, use_reentrant=reentrant).sum().backward()
    assert [len(calls) for calls in tape.routings] == [0, 1]


def test_what_does_not_fit_the_recording_is_refused():
    model, x = make("softmax_topk", 0), input_of()
    tape = penstock.RoutingTape()
    with tape.record(model):
        model(x)
        with pytest.raises(ValueError, match="Leave the other block first"):
            with penstock.RoutingTape().record(model):
                pass
    with tape.replay(model):
        model(x)
        with pytest.raises(ValueError, match="call 3 of MoE layer 0: got a recording of 2 calls"):
            model(x)
    with tape.replay(model), pytest.raises(ValueError, match="got 7 tokens, expected 40"):
        model(x[:7])
    with pytest.raises(ValueError, match="got 1 MoE layers, expected 2"):
        with tape.replay(model.first):
            pass
    assert model.first.tape is None
    brought = penstock.Routing.from_topk(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="a routing that the caller brought"):
        routers.replay(torch.zeros(3, 4), brought)
