# SPDX-License-Identifier: Apache-2.0
"""How little memory a pass gets by with: dH over H, and columns of Y and dX~ a block at a time."""

import plain
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import penstock
from penstock import functional

SHAPE = (24, 600, 16, 4, 2)  # 600 columns are blocks of 256, 256 and 88


def make_case(dtype=torch.float32):
    """x, the weights and a routing."""
    weights = plain.make_weights(SHAPE, dtype=dtype)
    routing = functional.route(plain.make_logits(SHAPE, dtype=torch.float32), SHAPE[4])
    return plain.make_x(SHAPE, dtype=dtype), weights, routing


def run(case, **keywords):
    """The output, of a routing that is a leaf of its own."""
    x, weights, routing = case
    biases = {name: weights[name] for name in ("b1", "b2")}
    scores, ids = routing.topk()
    return functional.moe_experts(
        x, weights["w1"], weights["w2"], scores.detach(), ids, **biases, **keywords
    )


def gradients(output, case, **keywords):
    """Gradients of x and of the weights, and the workspace that their pass took."""
    x, weights, _ = case
    d_output = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    with penstock.testing.watch_workspaces() as log:
        grads = torch.autograd.grad(output, [x, *weights.values()], d_output, **keywords)
    return grads, log.sizes


def equal(some, others):
    """Whether two lists of tensors have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_last_pass_over_a_graph_overwrites_h(dtype, cpu_backend):
    case = make_case(getattr(torch, dtype))
    with penstock.backend(cpu_backend, threads=1):
        output = run(case)
        first, kept = gradients(output, case, retain_graph=True)
        second, _ = gradients(output, case, retain_graph=True)
        last, overwritten = gradients(output, case)
        query = {"which": "backward", "dtype": dtype}
        assert kept == [functional.workspace_bytes(SHAPE, **query, kept_h="preserved")]
        assert overwritten == [functional.workspace_bytes(SHAPE, **query)]
    h_bytes = SHAPE[0] * SHAPE[4] * 2 * SHAPE[2] * case[0].element_size()
    assert kept[0] - overwritten[0] == h_bytes
    assert equal(first, second) and equal(first, last)


def test_a_pass_that_creates_a_graph_preserves_h():
    case = make_case()
    output = run(case)
    first, _ = gradients(output, case, create_graph=True)
    second, _ = gradients(output, case)
    assert equal(first, second)


def test_h_that_is_computed_again_needs_its_place():
    case = make_case()
    with penstock.backend("fast", threads=1):
        _, sizes = gradients(run(case, save="input"), case)
        for kept_h in ("preserved", "overwritten"):
            query = {"save": "input", "kept_h": kept_h}
            assert sizes == [functional.workspace_bytes(SHAPE, "backward", **query)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_an_h_of_its_own(reentrant):
    case = make_case()
    want, _ = gradients(run(case), case)
    x, weights, _ = case
    output = checkpoint(lambda _: run(case), x, use_reentrant=reentrant)
    d_output = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    output.backward(d_output)
    assert equal([leaf.grad for leaf in weights.values()], want[1:])


def test_delayed_gradients_put_dh_in_the_place_of_h():
    case = make_case()
    x, weights, _ = case
    want, _ = gradients(run(case), case)
    for times in (1, 2):
        delayed = functional.DelayedWeightGrads()
        output = run(case, delayed=delayed)
        d_output = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
        for _ in range(times):  # the first of two keeps the graph, and H with it
            (dx,) = torch.autograd.grad(output, x, d_output, retain_graph=len(delayed) < times - 1)
            assert torch.equal(dx, want[0])
        assert len(delayed) == times
        delayed.run()
        for weight, grad in zip(weights.values(), want[1:], strict=True):
            torch.testing.assert_close(weight.grad, times * grad)
            weight.grad = None


def test_the_explicit_pass_preserves_h():
    x, weights, routing = make_case()
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    scores, ids = (tensor.detach().numpy() for tensor in routing.topk())
    output, saved = functional.moe_experts_forward(
        x.detach().numpy(),
        functional.Weights(**arrays),
        functional.Routing.from_topk(scores, ids),
    )
    once, again = (functional.moe_experts_backward(output, saved) for _ in range(2))
    assert (once.x == again.x).all() and (once.weights.w1 == again.weights.w1).all()


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_the_low_memory_order_has_the_same_bits_and_less_workspace(save, cpu_backend):
    case = make_case()
    with penstock.backend(cpu_backend, threads=1):
        want, _ = gradients(run(case, save=save), case)
        query = {"save": save, "order": "low_memory"}
        with penstock.testing.watch_workspaces() as log:
            output = run(case, **query)
        assert torch.equal(output, run(case, save=save))
        assert log.peak_bytes == functional.workspace_bytes(SHAPE, "forward", **query)
        got, sizes = gradients(output, case)
        assert sizes == [functional.workspace_bytes(SHAPE, "backward", **query)]
        assert equal(got, want)
        if cpu_backend == "reference":  # which has no scratch: dX~ is all but dH and A'
            rows = SHAPE[0] * SHAPE[4] * 4
            assert functional.workspace_bytes(SHAPE, "backward", save=save) - sizes[0] == (
                rows * (SHAPE[1] - 256)
            )


def test_the_module_passes_its_order_on():
    torch.manual_seed(0)
    fast = penstock.MoE(600, 8, 4, 2)
    low = penstock.MoE(600, 8, 4, 2, order="low_memory")
    low.load_state_dict(fast.state_dict())
    x = torch.randn(9, 600)
    sizes = []
    with penstock.backend("reference"), torch.no_grad():
        for layer in (fast, low):
            with penstock.testing.watch_workspaces() as log:
                output = layer(x)
            sizes.append(log.peak_bytes)
        assert torch.equal(output, fast(x)) and sizes[1] < sizes[0]
    with pytest.raises(ValueError, match="order"):
        penstock.MoE(600, 8, 4, 2, order="slow")
