# SPDX-License-Identifier: Apache-2.0
"""The operators of adapted experts in torch.library's eyes: opcheck and torch.compile."""

import plain
import pytest
import torch
from adapted import SHAPE, frozen, leaves, make_adapters, routed, run

import penstock
from penstock import _torch_adapters as ops
from penstock import functional, lora


@pytest.mark.filterwarnings("ignore")
def test_opcheck_and_compile():
    weights = frozen(plain.make_weights(SHAPE))
    adapters = make_adapters((3, 2))
    x, (scores, ids) = plain.make_x(SHAPE), routed()

    def layer(x, scores, *factors):
        return run(x, weights, scores, ids, lora.Adapters(*factors))

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = leaves([x, scores], adapters)
    eager, fused = layer(*inputs), compiled(*inputs)
    assert torch.equal(eager, fused)
    for a, b in zip(
        torch.autograd.grad(eager.sum(), inputs),
        torch.autograd.grad(fused.sum(), inputs),
        strict=True,
    ):
        assert torch.equal(a, b)
    # Rows of skipped slots hold what was there before: opcheck would compare them.
    ids = ids.clamp(0, SHAPE[3] - 1)
    plan = functional.plan(functional.Routing.from_topk(scores, ids), SHAPE[3])
    config = penstock._engine.Config()
    arguments = (
        x, scores.reshape(-1).detach().requires_grad_(), *adapters, weights["w1"], None,
        weights["w2"], weights["b1"], None, weights["b2"], *plan, config.pack(), config.clamp,
        penstock._context.CallContext().pack(),
    )  # fmt: skip
    torch.library.opcheck(ops.adapted_experts, arguments)
