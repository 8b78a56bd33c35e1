# SPDX-License-Identifier: Apache-2.0
"""What token rounding promises beyond its statement: whole tiles, bounds, reports, evaluation."""

from __future__ import annotations

import pytest
import router_statements as statements
import torch

import penstock
from penstock import functional, routers

TILE = 16
SHAPE = (400, 24, 3)  # T, E, K


def counts_of(routing, num_experts):
    return functional.plan(routing, num_experts).expert_counts.long()


def plain_counts(logits, top_k):
    return counts_of(routers.topk_softmax(logits, top_k), logits.shape[1])


@pytest.mark.parametrize("mode", routers.MODES)
@pytest.mark.parametrize("seed", range(5))
def test_every_count_is_whole_tiles_within_the_modes_bound(mode, seed):
    num_tokens, num_experts, top_k = SHAPE
    logits = statements.make_logits("random", num_tokens, num_experts, seed=seed)
    before = plain_counts(logits, top_k)
    routing = routers.token_rounding(logits, top_k, tile=TILE, mode=mode, seed=seed)
    after = counts_of(routing, num_experts)
    assert not (after % TILE).any()
    change = after - before
    assert change.abs().max() < TILE
    if mode == "NR-f":
        assert 2 * change.abs().max() <= TILE
    if mode == "Balance-f":
        assert 2 * change.cumsum(0).abs().max() <= TILE
    assert (change >= 0).all() or mode != "UP"
    assert (change <= 0).all() or mode != "DOWN"
    report = routing.read_report()
    assert report.pairs == after.sum()
    assert report.added == change.clamp(min=0).sum()
    assert report.dropped == -change.clamp(max=0).sum()
    assert report.rounded == 1
    assert routing.ids.numel() == num_tokens * top_k + num_experts * (TILE - 1)
    per_token = routing.token_offsets.diff()
    assert report.tokens_without_expert == (per_token == 0).sum()


def test_tokens_that_lose_every_expert_give_zero_and_are_counted():
    logits = torch.zeros(20, 4, dtype=torch.float64)
    logits[:, 0] = torch.arange(20) * 0.01 + 1
    routing = routers.token_rounding(logits, 1, tile=16, mode="DOWN")
    assert routing.read_report() == (16, 4, 4, 0, 1)
    x = torch.ones(20, 3, dtype=torch.float64)
    w1, w2 = torch.ones(4, 4, 3).double(), torch.ones(4, 3, 2).double()
    output = functional.moe_experts(x, w1, w2, routing)
    assert not output[:4].any() and (output[4:] != 0).all()


def test_a_count_never_passes_the_whole_tiles_that_there_are():
    """All 31 tokens want expert 0: 32 would be nearest, but only one whole tile fits."""
    logits = torch.zeros(31, 3, dtype=torch.float64)
    logits[:, 0] = 5.0
    for mode in routers.MODES:
        routing = routers.token_rounding(logits, 1, tile=16, mode=mode, seed=0)
        assert counts_of(routing, 3)[0] == 16, mode


@pytest.mark.parametrize("num_tokens", [0, 1, TILE - 1])
def test_fewer_tokens_than_a_tile_keep_their_top_k_and_say_so(num_tokens):
    logits = statements.make_logits("random", num_tokens, 8)
    routing = routers.token_rounding(logits, 2, tile=TILE)
    plain = routers.topk_softmax(logits, 2, renormalize=True)
    assert routing.read_report() == (2 * num_tokens, 0, 0, 0, 0)
    assert torch.equal(routing.ids, plain.ids)
    assert torch.equal(routing.scores, plain.scores)


def test_stochastic_rounding_is_seeded_and_unbiased():
    num_tokens, num_experts, top_k = SHAPE
    logits = statements.make_logits("random", num_tokens, num_experts)
    before = plain_counts(logits, top_k).double()

    def rounded(seed):
        routing = routers.token_rounding(logits, top_k, tile=TILE, mode="SR-f", seed=seed)
        return counts_of(routing, num_experts).double()

    assert torch.equal(rounded(3), rounded(3))
    assert torch.equal(rounded(3), rounded(torch.tensor([3])))
    runs = torch.stack([rounded(seed) for seed in range(400)])
    # The standard error of a mean of 400 is at most TILE / 2 / 20 = 0.4: five of them.
    assert (runs.mean(0) - before).abs().max() < 2.0
    torch.manual_seed(1)
    first = routers.token_rounding(logits, top_k, tile=TILE, mode="SR-f").ids
    second = routers.token_rounding(logits, top_k, tile=TILE, mode="SR-f").ids
    torch.manual_seed(1)
    assert torch.equal(routers.token_rounding(logits, top_k, tile=TILE, mode="SR-f").ids, first)
    assert not torch.equal(first, second)


def test_the_default_tile_is_the_backends():
    logits = statements.make_logits("random", 200, 8).float()
    for backend in ("reference", "fast"):
        with penstock.backend(backend):
            tile = functional.tile_rows((200, 64, 64, 8, 2))
            assert routers.token_rounding(logits, 2).router.tile == tile
    with penstock.backend("reference"):
        assert functional.tile_rows((200, 64, 64, 8, 2)) == 1


def test_evaluation_is_a_plain_top_k():
    torch.manual_seed(0)
    layer = penstock.MoE(8, 4, 6, 2, router="token_rounding", router_options={"tile": 8})
    x = torch.randn(50, 8)
    layer.train()
    layer(x)
    assert not (layer.stats.loads % 8).any() and layer.stats.report.rounded == 1
    layer.eval()
    y = layer(x)
    assert layer.stats.report is None and layer.stats.loads.sum() == 100
    plain = penstock.MoE(8, 4, 6, 2, router="topk_softmax_normalized")
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(x), y)
