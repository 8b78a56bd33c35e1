# SPDX-License-Identifier: Apache-2.0
"""How a backward pass is arranged on the GPU: what rides beside what, what lies over what, and in
how many blocks of columns; none of it changes a bit.
"""

from __future__ import annotations

import plain
import pytest
import torch
from gpu_layer import forward, gradients, leaves_of, make_inputs, other_bits, step

import penstock
from penstock import functional

# Large enough that dX's combine rides beside a weight gradient; d is six blocks of 256 columns.
BESIDE = [8192, 1536, 256, 16, 8]
# An odd last block, few slots a token, hardly any rows an expert: the combine has its own launch.
ALONE = [700, 1544, 72, 40, 2]
SHAPES = pytest.mark.parametrize("shape", [BESIDE, ALONE], ids=["beside", "alone"])


@SHAPES
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_neither_order_nor_budget_changes_a_bit(shape, save, dtype) -> None:
    inputs = make_inputs(shape, dtype, bias=True)
    want = step(inputs, shape[4], save=save)
    assert not other_bits(step(inputs, shape[4], save=save, order="low_memory"), want)
    for sm_budget in (9, 40, 100):
        with penstock.backend(sm_budget=sm_budget):
            assert not other_bits(step(inputs, shape[4], save=save), want), sm_budget


@SHAPES
def test_a_pass_over_a_graph_that_is_kept_preserves_h(shape, dtype) -> None:
    inputs = make_inputs(shape, dtype)
    output = forward(inputs, shape[4])
    leaves = leaves_of(inputs)
    passes = [
        torch.autograd.grad(
            output, list(leaves.values()), inputs["d_output"], retain_graph=retain_graph
        )
        for retain_graph in (True, True, False)
    ]
    for grads in passes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, passes[0], strict=True))


@pytest.mark.parametrize("order", ["fast", "low_memory"])
def test_the_peak_of_a_pass_is_what_the_formula_says(order) -> None:
    inputs = make_inputs(BESIDE, "bfloat16")
    step(inputs, BESIDE[4], order=order)  # cuBLAS and others of torch settle
    output = forward(inputs, BESIDE[4], order=order)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(output, inputs)
    query = {"dtype": "bfloat16", "order": order, "device": "cuda"}
    temporary = functional.workspace_bytes(BESIDE, "backward", **query)
    results = sum(leaf.nbytes for leaf in leaves_of(inputs).values())
    scores = 3 * 4 * BESIDE[0] * BESIDE[4]
    assert torch.cuda.max_memory_allocated() - before < temporary + results + scores + (4 << 20)


def test_gradients_of_x_by_router_and_experts_meet_in_one_product(dtype) -> None:
    num_tokens, d, n, num_experts, top_k = ALONE
    torch.manual_seed(5)
    kind = getattr(torch, dtype)
    layer = penstock.MoE(d, n, num_experts, top_k, device="cuda", dtype=kind)
    x = torch.randn(num_tokens, d, device="cuda", dtype=kind, requires_grad=True)
    d_output = torch.randn(num_tokens, d, device="cuda", dtype=kind)
    (together,) = torch.autograd.grad(layer(x), x, d_output)
    x_router, x_experts = (x.detach().requires_grad_() for _ in range(2))
    output = layer.experts(x_experts, layer.route(x_router)[1])
    apart = torch.autograd.grad(output, [x_router, x_experts], d_output)
    want = sum(grad.double() for grad in apart)
    assert plain.relative_l2(together, want) < {"bfloat16": 4e-3, "float16": 6e-4}[dtype]
    (again,) = torch.autograd.grad(layer(x), x, d_output)
    assert torch.equal(again, together)
