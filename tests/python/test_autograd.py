# SPDX-License-Identifier: Apache-2.0
"""How the layer behaves as a citizen of autograd: twice, not at all, partly, second order."""

import plain
import pytest
import torch

import penstock
from penstock import functional

SHAPE = (12, 16, 8, 4, 2)


def layer(x, weights, logits, **keywords):
    routing = functional.route(logits, SHAPE[4])
    return functional.moe_experts(
        x, weights["w1"], weights["w2"], routing, b1=weights["b1"], b2=weights["b2"], **keywords
    )


@pytest.fixture
def inputs():
    return plain.make_x(SHAPE), plain.make_weights(SHAPE), plain.make_logits(SHAPE)


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_backward_twice_gives_the_same_gradients(inputs, save):
    x, weights, logits = inputs
    leaves = [x, logits, *weights.values()]
    loss = layer(*inputs, save=save).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_both_save_policies_give_the_same_bits(inputs):
    x, weights, logits = inputs
    leaves = [x, logits, *weights.values()]
    grads = [
        torch.autograd.grad(layer(*inputs, save=save).square().sum(), leaves)
        for save in ("preactivation", "input")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_second_order_is_a_clear_error(inputs):
    x, *_ = inputs
    (grad,) = torch.autograd.grad(layer(*inputs).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        grad.sum().backward()


def test_second_order_is_the_same_error_where_the_graph_is_let_go_of(inputs):
    loss = layer(*inputs).square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True, retain_graph=False)
    with pytest.raises(NotImplementedError, match="second-order"):
        grad.sum().backward()


def test_gradients_only_where_wanted(inputs):
    x, weights, logits = inputs
    full = torch.autograd.grad(layer(*inputs).sum(), [x, logits, *weights.values()])
    for index, name in enumerate(["x", "logits", *weights]):
        everything = {"x": x.detach(), "logits": logits.detach()}
        everything |= {key: value.detach() for key, value in weights.items()}
        leaf = everything[name].requires_grad_()
        output = layer(everything.pop("x"), everything, everything.pop("logits"))
        assert torch.equal(torch.autograd.grad(output.sum(), leaf)[0], full[index])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(inputs, mode):
    with mode(), penstock.testing.kept_bytes() as kept:
        output = layer(*inputs)
    assert kept.total == 0
    assert not output.requires_grad
    assert torch.equal(output, layer(*inputs))


def test_save_nothing_refuses_backward(inputs):
    output = layer(*inputs, save="nothing")
    with pytest.raises(RuntimeError, match='save: got "nothing"'):
        output.sum().backward()


def test_expanded_and_strided_gradients_of_the_output(inputs):
    x, *_ = inputs
    output = layer(*inputs)
    d_output = torch.randn_like(output)
    (want,) = torch.autograd.grad(output, x, d_output, retain_graph=True)
    strided = torch.empty(SHAPE[1], SHAPE[0], dtype=x.dtype).T.copy_(d_output)
    assert torch.equal(torch.autograd.grad(output, x, strided, retain_graph=True)[0], want)
    ones = torch.ones((), dtype=x.dtype).expand_as(output)
    (from_expanded,) = torch.autograd.grad(output, x, ones, retain_graph=True)
    assert torch.equal(torch.autograd.grad(output, x, ones.contiguous())[0], from_expanded)


def test_x_of_any_layout(inputs):
    x, weights, logits = inputs
    want = layer(x, weights, logits)
    columns = x.detach().T.contiguous().T.requires_grad_()
    padded = torch.full((SHAPE[0], SHAPE[1] + 8), torch.nan, dtype=x.dtype)
    padded[:, 3 : 3 + SHAPE[1]] = x.detach()
    for other in (columns, padded[:, 3 : 3 + SHAPE[1]]):
        assert torch.equal(layer(other, weights, logits), want)
    row = x[:1].detach().expand(SHAPE[0], -1)
    assert torch.equal(layer(row, weights, logits), layer(row.contiguous(), weights, logits))


def test_strided_weights_are_used_in_place(inputs):
    x, weights, logits = inputs
    want = layer(x, weights, logits)
    transposed = weights | {"w1": weights["w1"].transpose(1, 2).contiguous().transpose(1, 2)}
    sliced = weights | {"w1": torch.cat((weights["w1"],) * 2)[: SHAPE[3]]}
    for other in (transposed, sliced):
        with penstock.testing.watch_workspaces() as log:
            torch.testing.assert_close(layer(x, other, logits), want, rtol=1e-14, atol=1e-14)
        assert log.peak_bytes == functional.workspace_bytes(SHAPE, dtype="float64")
    gaps = torch.zeros(SHAPE[3], 16, 2 * SHAPE[1], dtype=x.dtype)[:, :, ::2]
    gaps.copy_(weights["w1"].detach())
    with pytest.raises(ValueError, match="w1"):
        layer(x, weights | {"w1": gaps}, logits)


def test_no_tokens(inputs):
    _, weights, _ = inputs
    x = torch.zeros(0, SHAPE[1], dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(0, SHAPE[3], dtype=torch.float64, requires_grad=True)
    output = layer(x, weights, logits)
    output.sum().backward()
    assert output.shape == (0, SHAPE[1])
    assert x.grad.shape == x.shape
    assert all(torch.count_nonzero(w.grad) == 0 for w in weights.values())


def test_an_idle_expert_has_zero_gradients(inputs):
    x, weights, _ = inputs
    logits = plain.make_logits(SHAPE, idle=(0, 3))
    layer(x, weights, logits).sum().backward()
    for weight in weights.values():
        assert torch.count_nonzero(weight.grad[[0, 3]]) == 0
        assert weight.grad[[1, 2]].isfinite().all()


def test_the_context_of_forward_is_that_of_backward(inputs):
    x, weights, logits = inputs
    with penstock.backend("reference"):
        output = layer(*inputs)
    with penstock.backend("no such backend"):
        output.sum().backward()
    with penstock.backend("no such backend"), pytest.raises(ValueError, match="no such backend"):
        layer(*inputs)
