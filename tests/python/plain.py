# SPDX-License-Identifier: Apache-2.0
"""The layer stated in plain torch, one expert at a time, in whatever dtype it is given.

The oracle of these tests: no code is shared with penstock. Gradients come from autograd.
"""

import torch
import torch.nn.functional as F

GATED = ("swiglu", "geglu", "reglu", "swiglu_clamped")
ACTIVATIONS = (*GATED, "silu", "gelu", "gelu_tanh", "relu", "relu_squared")
ROUTERS = ("softmax_topk", "topk_softmax", "topk_softmax_normalized")


ALPHA = torch.tensor(1.702).item()  # the engine's clamp_alpha is an fp32


def activate(name, h, alpha=ALPHA, limit=7.0):
    """act(H) of H (.., h), gate first."""
    if name in GATED:
        gate, up = h.chunk(2, dim=-1)
        if name == "swiglu":
            return F.silu(gate) * up
        if name == "geglu":
            return F.gelu(gate) * up
        if name == "reglu":
            return F.relu(gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    if name == "relu_squared":
        return F.relu(h).square()
    if name == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    return getattr(F, name)(h)


def concatenated(tensor, name, layout):
    """Rows of w1 or b1 (E, h, ..) reordered to gate first."""
    if name not in GATED or layout == "concatenated":
        return tensor
    return torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)


def experts(x, weights, scores, ids, *, activation="swiglu", layout="concatenated"):
    """weights: w1, w2 and optionally b1, b2; scores, ids (T, K); ids outside [0, E) skip."""
    w1 = concatenated(weights["w1"], activation, layout)
    b1 = weights.get("b1")
    b1 = None if b1 is None else concatenated(b1, activation, layout)
    w2, b2 = weights["w2"], weights.get("b2")
    output = torch.zeros_like(x)
    for expert in range(w1.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = F.linear(x[token], w1[expert], None if b1 is None else b1[expert])
        y = F.linear(activate(activation, h), w2[expert], None if b2 is None else b2[expert])
        output = output.index_add(0, token, scores[token, slot, None].to(y.dtype) * y)
    return output


def route(logits, top_k, router):
    """Scores and ids (T, K)."""
    if router == "softmax_topk":
        values, ids = logits.topk(top_k, dim=-1)
        return values.softmax(dim=-1), ids
    scores, ids = logits.softmax(dim=-1).topk(top_k, dim=-1)
    if router == "topk_softmax_normalized":
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores, ids


def make_weights(shape, activation="swiglu", *, bias=True, dtype=torch.float64, seed=0):
    """Random weights of a layer; shape is (T, d, n, E, K). Values of order 1 / sqrt(fan in)."""
    _, d, n, num_experts, _ = shape
    h = 2 * n if activation in GATED else n
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, scale):
        values = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    weights = {
        "w1": draw(num_experts, h, d, scale=d**-0.5),
        "w2": draw(num_experts, d, n, scale=n**-0.5),
    }
    if bias:
        weights["b1"] = draw(num_experts, h, scale=0.3)
        weights["b2"] = draw(num_experts, d, scale=0.3)
    return weights


def make_x(shape, *, dtype=torch.float64, seed=1):
    """Random x (T, d) that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[0], shape[1], generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def make_logits(shape, *, dtype=torch.float64, idle=(), seed=2):
    """Random logits (T, E) that want a gradient; experts in `idle` are never among the K best."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], shape[3], generator=generator, dtype=torch.float64)
    for expert in idle:
        logits[:, expert] -= 20.0
    return logits.to(dtype).requires_grad_()


def relative_l2(got, expected):
    """|got - expected| / |expected|, in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    norm = expected.norm()
    return ((got - expected).norm() / norm).item() if norm > 0 else got.norm().item()
