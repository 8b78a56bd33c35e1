# SPDX-License-Identifier: Apache-2.0
"""torch.autograd.gradcheck in float64 over the whole product, with experts that get no token."""

import itertools

import plain
import pytest
import torch
from penstock import functional

SHAPE = (3, 2, 2, 4, 2)  # T, d, n, E, K
IDLE = (0,)
CHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}


def layouts(activation):
    return ("concatenated", "interleaved") if activation in plain.GATED else ("concatenated",)


PRODUCT = [
    (activation, bias, layout, save, router)
    for activation, bias, save, router in itertools.product(
        plain.ACTIVATIONS, (False, True), ("preactivation", "input"), (*plain.ROUTERS, "caller")
    )
    for layout in layouts(activation)
]


@pytest.mark.parametrize(("activation", "bias", "layout", "save", "router"), PRODUCT)
def test_layer(activation, bias, layout, save, router):
    weights = plain.make_weights(SHAPE, activation, bias=bias, seed=3)
    x = plain.make_x(SHAPE, seed=4)
    logits = plain.make_logits(SHAPE, idle=IDLE, seed=5)
    ids = torch.tensor([[1, 3], [3, -1], [4, 1]], dtype=torch.int32)  # 0 and 2 idle
    names = list(weights)

    def layer(x, first, *tensors):
        if router == "caller":
            routing = functional.Routing.from_topk(first, ids)
        else:
            routing = functional.route(first, SHAPE[4], router=router)
        given = dict(zip(names, tensors, strict=True))
        return functional.moe_experts(
            x, given.pop("w1"), given.pop("w2"), routing, activation=activation,
            gate_layout=layout, save=save, **given,
        )  # fmt: skip

    first = logits
    if router == "caller":
        first = torch.tensor([[0.5, 0.0], [-1.0, 2.0], [1.5, 0.3]]).double()
        first.requires_grad_()
    else:
        counts = functional.plan(functional.route(logits, SHAPE[4], router=router), SHAPE[3])[0]
        assert all(counts[expert] == 0 for expert in IDLE)
    assert torch.autograd.gradcheck(layer, (x, first, *weights.values()), **CHECK)


def test_router_logits():
    x, weight = plain.make_x(SHAPE), plain.make_logits((SHAPE[3], 0, 0, SHAPE[1], 0))
    assert torch.autograd.gradcheck(functional.router_logits, (x, weight), **CHECK)


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_rows_already_dispatched(save):
    weights = plain.make_weights(SHAPE, seed=6)
    rows = plain.make_x((7, SHAPE[1], 0, 0, 0), seed=7)
    scores = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64).requires_grad_()
    counts = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 3, 4, 7], dtype=torch.int32)  # rows 2 and 6 are gaps

    def layer(rows, scores, w1, w2, b1, b2):
        return functional.experts_on_rows(
            rows, w1, w2, counts, offsets, scores=scores, b1=b1, b2=b2, save=save
        )

    assert torch.autograd.gradcheck(layer, (rows, scores, *weights.values()), **CHECK)
