# SPDX-License-Identifier: Apache-2.0
"""Routers and plans in plain torch: ids and arrays exactly the engine's, scores within rounding."""

import pytest
import torch
from case_layer import parameters

import penstock
from penstock import functional, routers
from penstock.routing import SOFTMAX_ROUTERS


def hostile_logits(dtype):
    num_tokens, num_experts = 64, 40
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype)
    logits[8:] = (logits[8:] * 2).round()  # ties, and zeros of both signs
    logits[0] = float("nan")
    logits[1] = -float("inf")
    logits[2] = 0.25
    logits[3, ::3] = -float("nan")  # NaN of the other sign ranks no higher
    logits[4, 1:] = -float("inf")
    logits[4, :1] = float("nan")
    logits[5, 7] = float("inf")
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("router", SOFTMAX_ROUTERS)
@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_the_engines_ids(router, top_k, dtype):
    logits = hostile_logits(dtype)
    ours = functional.route(logits, top_k, router=router)
    with penstock.backend("reference"):
        engine = functional.route(logits, top_k, router=router)
    assert ours.ids.dtype == torch.int32
    assert torch.equal(ours.ids, engine.ids)
    torch.testing.assert_close(ours.scores, engine.scores, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("router", SOFTMAX_ROUTERS)
def test_the_engines_gradients_and_replay(router):
    results = []
    for name in ("torch", "reference"):
        logits = torch.linspace(-2, 2, 60, dtype=torch.float64).sin().reshape(10, 6)
        logits.requires_grad_()
        with penstock.backend(name):
            routing = functional.route(logits, 3, router=router)
            again = routers.replay(logits * 1.5, routing.detach())
        weights = torch.linspace(-1, 3, 30, dtype=torch.float64)
        for one in (routing, again):
            results.append(one.scores)
            results += torch.autograd.grad((one.scores * weights).sum(), logits, retain_graph=True)
    for one, other in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("top_k", [0, 7])
def test_top_k_is_checked(top_k):
    with pytest.raises(ValueError, match="top_k"):
        functional.route(torch.zeros(2, 6), top_k)


def plans_of(routing, num_experts):
    ours = functional.plan(routing, num_experts)
    with penstock.backend("reference"):
        return ours, functional.plan(routing, num_experts)


def check_plans(ours, engine):
    rows = int(engine.expert_offsets[-1])
    for name in ("expert_counts", "expert_offsets", "slot_to_row"):
        assert getattr(ours, name).dtype == torch.int32
        assert torch.equal(getattr(ours, name), getattr(engine, name)), name
    for name in ("row_to_token", "row_to_slot"):
        assert getattr(ours, name).dtype == torch.int32
        assert torch.equal(getattr(ours, name)[:rows], getattr(engine, name)[:rows]), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_engines_plan(dtype):
    num_tokens, num_experts, top_k = 200, 7, 3
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, num_experts + 2, (num_tokens, top_k), generator=generator).to(dtype)
    ids[0] = torch.tensor([-2, torch.iinfo(dtype).min, torch.iinfo(dtype).max])
    ids[ids == 4] = 5  # an expert without rows
    routing = functional.Routing.from_topk(torch.ones(num_tokens, top_k), ids)
    ours, engine = plans_of(routing, num_experts)
    check_plans(ours, engine)
    assert ours.top_k == engine.top_k


def test_the_engines_plan_of_differing_numbers():
    offsets = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    ids = torch.tensor([2, 0, 1, 7, 2, 0, -1, -1], dtype=torch.int32)
    routing = functional.Routing(torch.ones(8), ids, 4, token_offsets=offsets)
    check_plans(*plans_of(routing, 3))


def test_no_slots():
    routing = functional.Routing.from_topk(torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int32))
    check_plans(*plans_of(routing, 3))


def test_a_bad_token_gets_valid_experts():
    num_experts = parameters(9)["shape"][3]
    logits = torch.full((2, num_experts), float("nan"))
    assert functional.route(logits, 2).topk()[1].tolist() == [[0, 1], [0, 1]]
