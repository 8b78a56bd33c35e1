# SPDX-License-Identifier: Apache-2.0
"""The bias of sigmoid_topk: its update, what its counters count, and how casts treat it."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import penstock
from penstock import balance

RATE = 0.25


def make_layer(**keywords):
    torch.manual_seed(0)
    return penstock.MoE(8, 4, 6, 2, router="sigmoid_topk", **keywords)


def tokens(count, seed=1):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


class Checkpointed(nn.Module):
    """A layer that is computed again in backward."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer = layer
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def test_an_update_is_the_sign_of_the_load_error():
    layer = make_layer()
    layer.router.load.copy_(torch.tensor([9, 1, 4, 4, 5, 1]))  # mean 4
    balance.update_bias(layer, RATE)
    assert layer.router.score_bias.tolist() == [-RATE, RATE, 0.0, 0.0, -RATE, RATE]
    assert not layer.router.load.any()
    balance.update_bias(layer, RATE)  # nothing counted since: nothing moves
    assert layer.router.score_bias.tolist() == [-RATE, RATE, 0.0, 0.0, -RATE, RATE]


def test_a_mean_that_is_no_integer():
    layer = make_layer()
    layer.router.load.copy_(torch.tensor([3, 3, 3, 3, 3, 2]))  # mean 17 / 6
    balance.update_bias(layer, RATE)
    assert layer.router.score_bias.tolist() == [-RATE] * 5 + [RATE]


@pytest.mark.parametrize("recompute", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_counters_and_bias_do_not_depend_on_recomputation_or_accumulation(recompute, accumulation):
    layer = make_layer()
    model = layer if recompute == "none" else Checkpointed(layer, recompute == "reentrant")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balance.BiasBalancer(model, RATE).attach(optimizer)
    loads = []
    for step in range(3):
        x = tokens(48, seed=step).requires_grad_()
        for part in x.chunk(accumulation):
            model(part).square().sum().backward()
        loads.append(layer.router.load.tolist())
        optimizer.step()

    expected = make_layer()
    for step, load in enumerate(loads):
        expected(tokens(48, seed=step))
        assert expected.router.load.tolist() == load
        assert sum(load) == 96
        balance.update_bias(expected, RATE)
    assert torch.equal(layer.router.score_bias, expected.router.score_bias)
    assert layer.router.score_bias.any()


def test_evaluation_counts_nothing():
    layer = make_layer().eval()
    layer(tokens(5))
    assert not layer.router.load.any()


def test_the_bias_steers_the_choice_and_no_score():
    layer = make_layer()
    x = tokens(20)
    logits, before = layer.route(x)
    layer.router.score_bias[3] = 10.0
    _, after = layer.route(x)
    scores, ids = after.topk()
    assert (ids == 3).any(dim=1).all() and not torch.equal(before.ids, after.ids)
    chosen = logits.sigmoid().gather(1, ids.long())
    torch.testing.assert_close(scores, chosen / chosen.sum(1, keepdim=True))


def test_updates_balance_a_skewed_router():
    """The load violation falls far below where it started, without any loss."""
    layer = penstock.MoE(8, 4, 6, 2, router="sigmoid_topk")
    skew = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -2.0])

    def violation():
        load = layer.router.load
        return (load.max() / load.double().mean() - 1).item()

    seen = []
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        logits = torch.randn(8000, 6, generator=generator) + skew
        layer.router.count(torch.bincount(layer.choose(logits).ids, minlength=6))
        seen.append(violation())
        balance.update_bias(layer, 0.002)
    assert seen[0] > 0.8 and max(seen[-20:]) < 0.1


def test_the_bias_survives_casts_copies_and_checkpoints():
    layer = make_layer()
    layer.router.score_bias[:] = 0.1234567
    assert "router.score_bias" in layer.state_dict() and "router.load" not in layer.state_dict()
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.router.score_bias.dtype == torch.float32
    assert torch.equal(layer.router.score_bias, torch.full((6,), 0.1234567))
    assert torch.equal(copy.deepcopy(layer).router.score_bias, layer.router.score_bias)
    layer(tokens(4).bfloat16()).sum().backward()
    assert layer.double().router.score_bias.dtype == torch.float64


def test_other_routers_have_no_bias_and_refuse_one():
    assert penstock.MoE(8, 4, 6, 2).router.score_bias is None
    with pytest.raises(ValueError, match="score_bias"):
        make_layer(router_options={"bias": torch.zeros(6)})
    with pytest.raises(ValueError, match="rate: got -1"):
        balance.update_bias(make_layer(), -1)


def _bias_of_rank(rank, folder):
    layer = make_layer()
    layer.router.load.copy_(torch.tensor([[8, 0, 2, 2, 2, 0], [0, 0, 2, 2, 8, 0]][rank]))
    balance.update_bias(layer, RATE, torch.distributed.group.WORLD)
    torch.save(layer.router.score_bias, folder / f"bias_{rank}")


def test_loads_are_summed_over_the_ranks(tmp_path):
    on_ranks(_bias_of_rank, 2, tmp_path)
    for rank in range(2):  # loads 8 0 4 4 10 0 in all, mean 26 / 6
        bias = torch.load(tmp_path / f"bias_{rank}").tolist()
        assert bias == [-RATE, RATE, RATE, RATE, -RATE, RATE]
