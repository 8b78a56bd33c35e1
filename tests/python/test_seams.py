# SPDX-License-Identifier: Apache-2.0
"""Seams: rows already dispatched, main_grad, delayed weight gradients, frozen experts."""

import plain
import pytest
import torch

import penstock
from penstock import functional

SHAPE = (33, 24, 20, 6, 2)
FROZEN = (1, 4)


def case(dtype=torch.float32):
    weights = plain.make_weights(SHAPE, dtype=dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return plain.make_x(SHAPE, dtype=dtype), weights, plain.make_logits(SHAPE, dtype=accumulator)


def run(x, weights, logits, **keywords):
    routing = functional.route(logits, SHAPE[4])
    return functional.moe_experts(
        x, weights["w1"], weights["w2"], routing, b1=weights["b1"], b2=weights["b2"], **keywords
    )


def leaves(x, weights, logits):
    return [x, logits, *weights.values()]


def clear(*tensors):
    for tensor in tensors:
        tensor.grad = None


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_dispatched_rows_give_what_the_routed_call_gives(save):
    x, weights, logits = case(torch.float64)
    scores, ids = functional.route(logits.detach(), SHAPE[4]).topk()
    plan = functional.plan(functional.Routing.from_topk(scores, ids), SHAPE[3])
    tokens, slots = plan.row_to_token.long(), plan.row_to_slot.long()
    rows = functional.experts_on_rows(
        x[tokens], weights["w1"], weights["w2"], plan.expert_counts, b1=weights["b1"],
        b2=weights["b2"], scores=scores.reshape(-1)[slots], save=save,
    )  # fmt: skip
    combined = torch.zeros_like(x).index_add(0, tokens, rows)
    routed = functional.moe_experts(
        x, weights["w1"], weights["w2"], scores, ids, b1=weights["b1"], b2=weights["b2"]
    )
    torch.testing.assert_close(combined, routed, rtol=1e-12, atol=1e-13)
    inputs = [x, *weights.values()]
    got = torch.autograd.grad(combined.square().sum(), inputs)
    want = torch.autograd.grad(routed.square().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gaps_in_a_receive_buffer_are_neither_read_nor_left_undefined(cpu_backend):
    weights = plain.make_weights((0, 8, 6, 3, 1), dtype=torch.float32)
    counts = torch.tensor([2, 0, 1], dtype=torch.int32)
    offsets = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    live = [0, 1, 4]
    gaps = [2, 3, 5, 6, 7]
    clean = plain.make_x((8, 8, 0, 0, 0), dtype=torch.float32)
    dirty = clean.detach().clone()
    dirty[gaps] = torch.nan
    dirty.requires_grad_()
    results = []
    with penstock.backend(cpu_backend):
        for rows in (clean, dirty):
            y = functional.experts_on_rows(rows, weights["w1"], weights["w2"], counts, offsets)
            grads = torch.autograd.grad(y.square().sum(), [rows, weights["w1"], weights["w2"]])
            results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    y, d_rows, *_ = results[1]
    assert torch.count_nonzero(y[gaps]) == 0 and torch.count_nonzero(d_rows[gaps]) == 0
    assert torch.count_nonzero(y[live]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_gradients_and_adds(dtype):
    x, weights, logits = case(dtype)
    run(x, weights, logits).float().square().sum().backward()
    through_autograd = {name: weight.grad for name, weight in weights.items()}
    others = (x.grad, logits.grad)
    clear(x, logits, *weights.values())
    for weight in weights.values():
        weight.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    for times in (1, 2):
        clear(x, logits)
        run(x, weights, logits, main_grad=True).float().square().sum().backward()
        assert torch.equal(x.grad, others[0]) and torch.equal(logits.grad, others[1])
        for name, weight in weights.items():
            assert weight.grad is None
            want = 1 + times * through_autograd[name].float()
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(weight.main_grad, want, rtol=tolerance, atol=tolerance)


def test_main_grad_of_some_weights_leaves_the_others_to_autograd():
    x, weights, logits = case()
    run(x, weights, logits).square().sum().backward()
    want = {name: weight.grad for name, weight in weights.items()}
    clear(*weights.values())
    weights["w1"].main_grad = torch.zeros(weights["w1"].shape)
    run(x, weights, logits, main_grad=True).square().sum().backward()
    assert weights["w1"].grad is None
    torch.testing.assert_close(weights["w1"].main_grad, want["w1"])
    for name in ("w2", "b1", "b2"):
        torch.testing.assert_close(weights[name].grad, want[name])


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_delayed_weight_gradients(save):
    x, weights, logits = case()
    run(x, weights, logits, save=save).square().sum().backward()
    want = [leaf.grad for leaf in leaves(x, weights, logits)]
    clear(*leaves(x, weights, logits))
    delayed = functional.DelayedWeightGrads()
    run(x, weights, logits, save=save, delayed=delayed).square().sum().backward()
    assert all(weight.grad is None for weight in weights.values()) and len(delayed) == 1
    delayed.run()
    assert len(delayed) == 0
    for leaf, grad in zip(leaves(x, weights, logits), want, strict=True):
        assert torch.equal(leaf.grad, grad)
    run(x, weights, logits, delayed=delayed).square().sum().backward()
    delayed.run()
    torch.testing.assert_close(weights["w1"].grad, 2 * want[2])


def test_delayed_weight_gradients_need_leaves():
    x, weights, logits = case()
    delayed = functional.DelayedWeightGrads()
    computed = weights | {"w1": weights["w1"] * 2}
    run(x, computed, logits, delayed=delayed).sum().backward()
    with pytest.raises(ValueError, match="leaves"):
        delayed.run()


@pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.bool])
def test_frozen_experts_get_no_gradient(mask_dtype, cpu_backend):
    x, weights, logits = case()
    trainable = torch.ones(SHAPE[3], dtype=mask_dtype)
    trainable[list(FROZEN)] = 0
    with penstock.backend(cpu_backend):
        run(x, weights, logits).square().sum().backward()
        want = {name: weight.grad.clone() for name, weight in weights.items()}
        clear(*weights.values())
        run(x, weights, logits, trainable=trainable).square().sum().backward()
        for name, weight in weights.items():
            expected = want[name].clone()
            expected[list(FROZEN)] = 0
            assert torch.equal(weight.grad, expected)
            weight.main_grad = torch.full(weight.shape, 7.0)
        run(x, weights, logits, trainable=trainable, main_grad=True).square().sum().backward()
    for weight in weights.values():
        assert (weight.main_grad[list(FROZEN)] == 7.0).all()


def test_seams_refuse_second_order():
    x, weights, logits = case()
    output = run(x, weights, logits, delayed=functional.DelayedWeightGrads())
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_module_with_main_grad():
    torch.manual_seed(0)
    layer = penstock.MoE(16, 8, 4, 2, main_grad=True)
    for parameter in layer.experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    layer(torch.randn(5, 16)).sum().backward()
    assert layer.experts.w1.grad is None
    assert torch.count_nonzero(layer.experts.w1.main_grad) > 0
    assert layer.router.weight.grad is not None
