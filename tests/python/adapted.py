# SPDX-License-Identifier: Apache-2.0
"""Layers with adapters for the tests, and the same layers with merged weights."""

import plain
import torch

from penstock import lora

SHAPE = (37, 24, 20, 6, 2)  # T, d, n, E, K


def make_adapters(ranks, activation="swiglu", dtype=torch.float64, shape=SHAPE):
    """Random factors for ranks (r1, r2), 0 for none, of a size that matters beside the weights."""
    _, d, n, num_experts, _ = shape
    h = 2 * n if activation in plain.GATED else n
    generator = torch.Generator().manual_seed(11)

    def draw(*size):
        values = torch.randn(size, generator=generator, dtype=torch.float64) * size[-1] ** -0.5
        return values.to(dtype).requires_grad_()

    up, down = ranks
    return lora.Adapters(
        draw(num_experts, up, d) if up else None,
        draw(num_experts, h, up) if up else None,
        draw(num_experts, down, n) if down else None,
        draw(num_experts, d, down) if down else None,
    )


def merged(weights, adapters):
    """The weights with B A added, by autograd-visible products."""
    result = dict(weights)
    if adapters.up_a is not None:
        result["w1"] = weights["w1"] + adapters.up_b.to(weights["w1"]) @ adapters.up_a.to(
            weights["w1"]
        )
    if adapters.down_a is not None:
        result["w2"] = weights["w2"] + adapters.down_b.to(weights["w2"]) @ adapters.down_a.to(
            weights["w2"]
        )
    return result


def frozen(weights):
    return {name: weight.detach() for name, weight in weights.items()}


def routed(shape=SHAPE, dtype=torch.float64):
    scores, ids = plain.make_logits(shape, dtype=torch.float64).detach().topk(shape[4])
    ids[0, 1], ids[3, 0] = -1, shape[3]  # two slots without an expert
    return scores.softmax(-1).to(dtype).requires_grad_(), ids


def run(x, weights, scores, ids, adapters, **settings):
    biases = {name: weights.get(name) for name in ("b1", "b2")}
    return lora.adapted_experts(
        x, weights["w1"], weights["w2"], scores, ids, adapters=adapters, **biases, **settings
    )


def leaves(*groups):
    return [t for group in groups for t in group if t is not None]
