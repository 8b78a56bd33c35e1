# SPDX-License-Identifier: Apache-2.0
"""Experts in plain torch: the engine's contract at its edges, and what must reach no result."""

import plain
import pytest
import torch
from case_layer import make_layer, parameters
from doors import TorchDoor, check_same_bits, check_statement
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
from penstock import functional
from penstock._torch_path import forward as torch_forward

SHAPE = (133, 64, 48, 6, 2)  # T, d, n, E, K
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}


def routing_for(shape, *, idle=(), dtype=torch.float32):
    scores, ids = functional.route(plain.make_logits(shape, idle=idle), shape[4]).topk()
    return scores.detach().to(dtype), ids


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("order", ["output_major", "input_major"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_products_are_as_near_as_the_contract_asks(dtype, order, save, tolerances):
    """Sizes that torch's grouped product takes; the product's odd ones go through the loop."""
    weights = plain.make_weights(SHAPE, dtype=DTYPES[dtype])
    x = plain.make_x(SHAPE, dtype=DTYPES[dtype])
    scores, ids = routing_for(SHAPE, idle=(0, 3))
    ids[::5, 1] = -1
    inputs = [x, scores.requires_grad_(), *weights.values()]
    given = dict(weights)
    if order == "input_major":
        given |= {name: weights[name].transpose(1, 2) for name in ("w1", "w2")}
    ours = functional.moe_experts(
        x, given["w1"], given["w2"], scores, ids, b1=given["b1"], b2=given["b2"],
        weight_order=order, save=save,
    )  # fmt: skip
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = plain.experts(wide[0], dict(zip(weights, wide[2:], strict=True)), wide[1], ids)
    d_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    d_output = d_output.to(DTYPES[dtype])
    got = torch.autograd.grad(ours, inputs, d_output)
    want = torch.autograd.grad(expected, wide, d_output.double())
    for one, other in zip((ours, *got), (expected, *want), strict=True):
        assert plain.relative_l2(one, other) <= tolerances["end_to_end"][dtype]
    for gradient in got[2:]:
        assert not gradient[[0, 3]].any()  # experts without rows


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("pair", ["one tensor", "pair"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped"])
def test_gradcheck(activation, pair, save):
    shape = (3, 2, 2, 4, 2)
    weights = plain.make_weights(shape, activation, seed=3)
    w1, w2, b1, b2 = weights.values()
    scores = torch.tensor([[0.5, 0.0], [-1.0, 2.0], [1.5, 0.3]]).double().requires_grad_()
    ids = torch.tensor([[1, 3], [3, -1], [4, 1]], dtype=torch.int32)  # 0 and 2 idle

    def layer(x, scores, w1, w2, b1, b2):
        if pair == "pair":
            w1, b1 = w1.chunk(2, 1), b1.chunk(2, 1)
        return functional.moe_experts(
            x, w1, w2, scores, ids, b1=b1, b2=b2, activation=activation, save=save,
            clamp_alpha=1.3, clamp_limit=0.7,
        )  # fmt: skip

    x = plain.make_x(shape, seed=4)
    assert torch.autograd.gradcheck(layer, (x, scores, w1, w2, b1, b2), **CHECK)


def test_gradcheck_of_the_router():
    x, weight = plain.make_x(SHAPE[:1] + (4,)), plain.make_logits((6, 0, 0, 4, 0))
    x = x[:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(functional.router_logits, (x, weight), **CHECK)


def test_clamps_are_fp32_numbers_and_edges_as_the_engine_has_them():
    gate = torch.tensor([6.9, 6.95, -8.0]).double()  # the first is an fp32 6.9: an edge
    w1 = torch.cat((gate, torch.tensor([-6.9, 7.5, 1.0]).double())).reshape(1, 6, 1)
    w2 = torch.ones(1, 1, 3, dtype=torch.float64)
    results = []
    for name in ("torch", "reference"):
        x = torch.ones(1, 1, dtype=torch.float64)
        leaf = w1.clone().requires_grad_()
        scores, ids = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int32)
        with penstock.backend(name):
            y = functional.moe_experts(
                x, leaf, w2, scores, ids, activation="swiglu_clamped", clamp_alpha=1.3,
                clamp_limit=6.9,
            )  # fmt: skip
            results.append((y, torch.autograd.grad(y, leaf)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_differing_numbers_of_experts_with_padding():
    shape = (4, 16, 8, 3, 2)
    offsets = torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)  # token 1 has none
    ids = torch.tensor([0, 2, 1, 7, 2, -1, -1], dtype=torch.int32)  # the last two are padding
    results = []
    for name in ("torch", "reference"):
        weights, x = plain.make_weights(shape), plain.make_x(shape)
        scores = torch.linspace(-1, 2, 7, dtype=torch.float64).requires_grad_()
        routing = functional.Routing(scores, ids, 4, token_offsets=offsets)
        with penstock.backend(name):
            y = functional.moe_experts(
                x, weights["w1"], weights["w2"], routing, b1=weights["b1"], b2=weights["b2"]
            )
        grads = torch.autograd.grad(y.square().sum(), [x, scores, *weights.values()])
        results.append((y, *grads))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_scores", ["scores", "no scores"])
def test_rows_in_gaps_are_not_read(dtype, with_scores):
    shape = (9, 16, 8, 4, 1)
    counts = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    offsets = torch.tensor([1, 3, 4, 5, 8], dtype=torch.int32)
    gaps = [0, 3, 7, 8]
    results = []
    for name in ("torch", "reference"):
        weights = plain.make_weights(shape, dtype=dtype)
        rows = plain.make_x(shape, dtype=dtype).detach()
        rows[gaps] = float("nan")
        rows.requires_grad_()
        leaves = [rows, *weights.values()]
        scores = None
        if with_scores == "scores":
            scores = torch.linspace(-1, 2, 9, dtype=dtype).requires_grad_()
            leaves.append(scores)
        with penstock.backend(name):
            y = functional.experts_on_rows(
                rows, weights["w1"], weights["w2"], counts, offsets, scores=scores,
                b1=weights["b1"], b2=weights["b2"],
            )  # fmt: skip
        d_output = torch.ones_like(y)
        d_output[gaps] = float("inf")
        results.append((y, *torch.autograd.grad(y, leaves, d_output)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not results[0][0][gaps].any()
    assert not results[0][1][gaps].any()


class _Poisoned(torch.autograd.Function):
    """A tensor whose rows past `end` are NaN, in its gradient too."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        rows = rows.clone()
        rows[end:] = float("nan")
        return rows

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.end :] = float("nan")
        return gradient, None


def test_what_a_product_leaves_in_rows_of_no_expert_reaches_nothing(monkeypatch):
    layer = make_layer(SHAPE, "float32")
    layer.ids.reshape(-1)[::3] = -1
    clean = TorchDoor.run(layer)
    product = torch_forward.product

    def poisoned(rows, matrices, ends):
        end = int(ends[-1])
        return _Poisoned.apply(product(_Poisoned.apply(rows, end), matrices, ends), end)

    monkeypatch.setattr(torch_forward, "product", poisoned)
    check_same_bits(TorchDoor, TorchDoor.run(layer), clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_one_bad_token_stays_in_its_row(bad):
    layer = make_layer(parameters(8)["shape"], "float32")
    token = parameters(8)["token"]
    layer.ids[token + 1, 0] = -1
    x = layer.x.copy()
    x[token, 3] = bad
    expected, got = TorchDoor.run(layer), TorchDoor.run(layer.with_(x=x))
    others = torch.arange(layer.shape[0]) != token
    for name in ("output", "dx", "dscores"):
        assert torch.equal(got[name][others], expected[name][others]), name
    assert not torch.isfinite(got["output"][token]).all()
    for expert in set(range(layer.shape[3])) - set(layer.ids[token].tolist()):
        for name in ("dw1", "dw2", "db1", "db2"):
            assert torch.equal(got[name][expert], expected[name][expert]), name
    skipped = layer.ids.copy()
    skipped[token] = -1
    skipping = TorchDoor.run(layer.with_(x=x, ids=skipped))
    assert all(torch.isfinite(value).all() for value in skipping.values())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 3, 2), (2, 4, 3), (5, 1, 1), (4, 4, 4)], ids=str)
def test_few_tokens_and_few_experts(sizes, dtype):
    num_tokens, *experts_and_top_k = sizes
    layer = make_layer((num_tokens, 16, 8, *experts_and_top_k), dtype)
    results = check_statement(TorchDoor, layer)
    assert all(value.shape for value in results.values())


def test_padding_alone():
    """No token at all, and slots that name no expert."""
    weights = plain.make_weights((0, 16, 8, 3, 2), dtype=torch.float32)
    scores = torch.ones(4, requires_grad=True)
    ids = torch.full((4,), -1, dtype=torch.int32)
    routing = functional.Routing(scores, ids, 0, token_offsets=torch.zeros(1, dtype=torch.int32))
    y = functional.moe_experts(torch.zeros(0, 16), weights["w1"], weights["w2"], routing)
    grads = torch.autograd.grad(y.sum(), [scores, weights["w1"], weights["w2"]])
    assert y.shape == (0, 16)
    assert not any(gradient.any() for gradient in grads)


def test_a_plan_of_the_engine_serves_as_well():
    weights, x = plain.make_weights(SHAPE, dtype=torch.float32), plain.make_x(SHAPE).float()
    scores, ids = routing_for(SHAPE)
    ids[::4] = -1
    routing = functional.Routing.from_topk(scores, ids)
    with penstock.backend("reference"):
        plan = functional.plan(routing, SHAPE[3])
    plan.row_to_slot[plan.expert_offsets[-1] :] = 2**30  # what the engine leaves undefined
    w1, w2 = weights["w1"], weights["w2"]
    assert torch.equal(
        functional.moe_experts(x, w1, w2, routing, plan=plan),
        functional.moe_experts(x, w1, w2, routing),
    )


@pytest.mark.parametrize("integer", [torch.uint8, torch.bool])
def test_frozen_experts_get_zeros(integer):
    weights, x = plain.make_weights(SHAPE, dtype=torch.float32), plain.make_x(SHAPE).float()
    scores, ids = routing_for(SHAPE)
    trainable = torch.tensor([1, 0, 1, 1, 0, 1]).to(integer)
    call = (x, weights["w1"], weights["w2"], scores, ids)
    biases = {"b1": weights["b1"], "b2": weights["b2"]}
    frozen = functional.moe_experts(*call, **biases, trainable=trainable)
    free = functional.moe_experts(*call, **biases)
    assert torch.equal(frozen, free)
    leaves = list(weights.values())
    got = torch.autograd.grad(frozen.sum(), leaves)
    want = torch.autograd.grad(free.sum(), leaves)
    for one, other in zip(got, want, strict=True):
        assert not one[[1, 4]].any()
        assert torch.equal(one[[0, 2, 3, 5]], other[[0, 2, 3, 5]])


class _NoHostReads(TorchDispatchMode):
    """Fails where the host reads a tensor's elements, or a shape that depends on them."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "bincount", "unique_dim"), name
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("tokens", ["fixed", "ragged"])
def test_the_grouped_path_does_not_wait_for_the_device(tokens):
    weights = plain.make_weights(SHAPE, dtype=torch.bfloat16)
    x = plain.make_x(SHAPE, dtype=torch.bfloat16)
    router_weight = torch.randn(SHAPE[3], SHAPE[1], dtype=torch.bfloat16, requires_grad=True)
    functional.router_logits(x, router_weight)
    biases = {"b1": weights["b1"], "b2": weights["b2"]}

    def step():
        routing = functional.route(functional.router_logits(x, router_weight), SHAPE[4])
        if tokens == "ragged":
            offsets = torch.arange(SHAPE[0] + 1, dtype=torch.int32) * SHAPE[4]
            routing = functional.Routing(
                routing.scores, routing.ids, SHAPE[0], token_offsets=offsets
            )
        y = functional.moe_experts(x, weights["w1"], weights["w2"], routing, **biases)
        return torch.autograd.grad(y.float().sum(), [x, router_weight, *weights.values()])

    step()  # what is asked of torch once a device
    with _NoHostReads():
        assert len(step()) == 6
