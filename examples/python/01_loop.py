# SPDX-License-Identifier: Apache-2.0
"""Rung 1: what a Mixture-of-Experts layer computes, one expert at a time, in plain torch.

Every token chooses 2 of 8 experts; its output is the sum of their outputs, weighed by the router.
Run: python examples/python/01_loop.py. The next rung gives the same numbers through the engine.
"""

import torch
import torch.nn.functional as F

NUM_TOKENS, HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 64, 32, 48, 8, 2


def make_inputs(dtype=torch.float64):
    """x (T, d), the router's weight (E, d), and the experts' w1 (E, 2n, d) and w2 (E, d, n)."""
    torch.manual_seed(0)
    sizes = [
        (NUM_TOKENS, HIDDEN),
        (NUM_EXPERTS, HIDDEN),
        (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        (NUM_EXPERTS, HIDDEN, INTERMEDIATE),
    ]
    return [(torch.randn(s, dtype=dtype) * s[-1] ** -0.5).requires_grad_() for s in sizes]


def layer(x, router_weight, w1, w2):
    """The layer as a loop over experts; swiglu, gate rows of w1 first."""
    logits = x @ router_weight.T  # (T, E)
    best, ids = logits.topk(TOP_K, dim=-1)  # (T, K)
    scores = best.softmax(dim=-1)  # (T, K)
    output = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)  # the rows of this expert
        gate, up = F.linear(x[token], w1[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[expert])
        output = output.index_add(0, token, scores[token, slot, None] * y)
    return output, ids


if __name__ == "__main__":
    inputs = make_inputs()
    output, ids = layer(*inputs)
    output.square().sum().backward()
    print("rows of each expert:", torch.bincount(ids.flatten(), minlength=NUM_EXPERTS).tolist())
    print(
        f"norm of the output {output.norm():.6f}, of the gradient of x {inputs[0].grad.norm():.6f}"
    )
