# SPDX-License-Identifier: Apache-2.0
"""Losses and measures against sums written out by hand, their gradients, their extremes."""

from __future__ import annotations

import math

import pytest
import torch

import penstock
from penstock import losses

T, E, K = 12, 5, 2


def make_logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, E, generator=generator, dtype=torch.float64).requires_grad_()


def plain_entropy(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def test_sequence_balance_by_hand():
    logits = make_logits()
    affinities = logits.sigmoid()
    ids = logits.topk(K).indices
    got = losses.sequence_balance_loss(affinities, ids, 3)
    length, total = T // 3, 0.0
    for first in range(0, T, length):
        for expert in range(E):
            chosen = sum(int(expert in ids[t]) for t in range(first, first + length))
            mean = sum(
                (affinities[t, expert] / affinities[t].sum()).item()
                for t in range(first, first + length)
            )
            total += E / (K * length) * chosen * mean / length
    assert got.item() == pytest.approx(total / 3, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda logits: losses.sequence_balance_loss(logits.sigmoid(), ids, 3), (logits,)
    )


def test_sequence_balance_of_even_choices_is_one():
    ids = torch.arange(T)[:, None] % 4
    even = torch.full((T, 4), 0.3, dtype=torch.float64)
    assert losses.sequence_balance_loss(even, ids, 3).item() == pytest.approx(1.0)
    assert losses.sequence_balance_loss(even[:0], ids[:0]).item() == 0


def test_mutual_information_and_entropy_by_hand():
    logits = make_logits()
    p = logits.softmax(1).tolist()
    mean = [sum(row[e] for row in p) / T for e in range(E)]
    conditional = sum(map(plain_entropy, p)) / T
    assert losses.routing_entropy(logits).item() == pytest.approx(conditional, rel=1e-12)
    want = plain_entropy(mean) - conditional
    assert losses.mutual_information(logits).item() == pytest.approx(want, rel=1e-10)
    assert torch.autograd.gradcheck(losses.mutual_information, (logits,))
    assert torch.autograd.gradcheck(losses.routing_entropy, (logits,))


def test_mutual_information_at_its_extremes():
    sure = torch.eye(4, dtype=torch.float64) * 1e4  # each token sure, all experts used
    sure.requires_grad_()
    assert losses.mutual_information(sure).item() == pytest.approx(math.log(4))
    assert losses.routing_entropy(sure).item() == 0
    (gradient,) = torch.autograd.grad(losses.mutual_information(sure), sure)
    assert torch.isfinite(gradient).all()
    assert losses.mutual_information(torch.zeros(7, 4)).item() == pytest.approx(0, abs=1e-6)


def test_activation_locality_by_hand():
    logits = make_logits()
    a = (2.0 * logits).sigmoid()
    total, pairs = 0.0, 0
    for first in (0, T // 2):
        for t in range(first, first + T // 2 - 1):
            now, after = a[t], a[t + 1]
            cross = -(after * now.log() + (1 - after) * (1 - now).log())
            total, pairs = total + cross.mean().item(), pairs + 1
    got = losses.activation_locality_loss(logits, 2, sharpness=2.0)
    assert got.item() == pytest.approx(total / pairs, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda logits: losses.activation_locality_loss(logits, 2, 2.0), (logits,)
    )
    assert losses.activation_locality_loss(logits[:1]).item() == 0


def test_neighbours_alike_cost_less():
    alternating = torch.tensor([[9.0, -9.0], [-9.0, 9.0]]).repeat(4, 1)
    steady = torch.tensor([[9.0, -9.0]]).repeat(8, 1)
    assert losses.activation_locality_loss(steady) < 0.01
    assert losses.activation_locality_loss(alternating) > 8


def test_a_global_batch_of_one_rank_is_the_switch_loss():
    logits, counts = make_logits(), torch.tensor([3, 9, 0, 4, 8])
    one, other = (
        losses.load_balancing_loss(logits, counts),
        losses.global_batch_loss(logits, counts),
    )
    assert torch.equal(one, other)


def test_load_measures():
    counts = torch.tensor([4, 0, 8, 4])
    assert losses.max_load_violation(counts).item() == 1.0
    assert losses.max_load_violation(torch.zeros(4, dtype=torch.int64)).item() == 0
    assert losses.padding_waste(counts, 8).item() == pytest.approx(8 / 24)
    assert losses.padding_waste(counts, 4).item() == 0
    assert losses.padding_waste(torch.zeros(4, dtype=torch.int32), 8).item() == 0
    floor = losses.sampling_floor(200_000, 16)
    # The largest of 16 nearly normal deviations, 1.77 of them, each sqrt(E / slots) of the mean.
    assert floor == pytest.approx(1.77 * math.sqrt(16 / 200_000), rel=0.1)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="num_sequences: got 5 for 12 tokens"):
        losses.activation_locality_loss(make_logits(), 5)
    with pytest.raises(ValueError, match="tile: got 0"):
        losses.padding_waste(torch.ones(3), 0)


def test_a_layers_stats_tell_what_was_dropped():
    torch.manual_seed(0)
    layer = penstock.MoE(
        8, 4, 6, 2, router="token_rounding", router_options={"tile": 16, "mode": "DOWN"}
    )
    layer(torch.randn(50, 8))
    report = layer.stats.report
    assert layer.stats.drop_rate == report.dropped / 100 > 0
    assert layer.stats.loads.sum() == 100 - report.dropped
    assert layer.stats.max_load_violation == losses.max_load_violation(layer.stats.loads)
    assert 0 < layer.stats.entropy < math.log(6)
    plain = penstock.MoE(8, 4, 6, 2)
    plain(torch.randn(5, 8))
    assert plain.stats.drop_rate == 0.0
