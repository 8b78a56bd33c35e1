# SPDX-License-Identifier: Apache-2.0
"""Rung 2: the same layer through penstock.functional, step by step, and compared with rung 1.

Router logits, choice, plan and experts are separate calls, so that each can be looked at or
replaced: any scores and ids of your own become a routing. The last step does it on NumPy arrays.
"""

from importlib import import_module

import torch

import penstock
from penstock import functional

loop = import_module("01_loop")


def layer(x, router_weight, w1, w2):
    """The layer in three calls of the engine."""
    logits = functional.router_logits(x, router_weight)  # (T, E)
    routing = functional.route(logits, loop.TOP_K, router="softmax_topk")
    return functional.moe_experts(x, w1, w2, routing), routing


def main():
    expected_inputs, inputs = loop.make_inputs(), loop.make_inputs()
    expected, _ = loop.layer(*expected_inputs)
    output, routing = layer(*inputs)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for ours, plain in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)
    print("output and all four gradients equal those of the loop")

    plan = functional.plan(routing, loop.NUM_EXPERTS)
    print("rows of each expert:", plan.expert_counts.tolist())
    print("first rows come from tokens", plan.row_to_token[:6].tolist())

    with penstock.backend("reference", threads=1):
        again, _ = layer(*loop.make_inputs())
    print("same bits from the reference backend:", torch.equal(again, output))

    arrays = [tensor.detach().numpy() for tensor in inputs]
    logits = functional.router_logits(arrays[0], arrays[1])
    weights = functional.Weights(w1=arrays[2], w2=arrays[3])
    y, saved = functional.moe_experts_forward(
        arrays[0], weights, functional.route(logits, loop.TOP_K)
    )
    grads = functional.moe_experts_backward(2 * y, saved)
    print("NumPy: same bits:", y.tobytes() == output.detach().numpy().tobytes())
    print(f"kept for backward: {saved.kept_bytes} bytes; dW1 {grads.weights.w1.shape}")


if __name__ == "__main__":
    main()
