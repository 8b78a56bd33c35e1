# SPDX-License-Identifier: Apache-2.0
"""A whole layer on the GPU, router included: its tensors, one step, and the step in float64.

shape is (T, d, n, E, K). A step gives the output and the gradient of every input by name.
"""

from __future__ import annotations

import plain
import torch
from case_layer import Layer, declared, make_layer, parameters
from torch import Tensor

from penstock import functional

CLOSE = 1e-3  # a logit of order 1 is summed in fp32, so no other choice can be further away
GRANULE = 8  # the backend's sizes are multiples of this


def sized(shape) -> list[int]:
    """The shape (T, d, n, E, K) with d and n rounded up to what the backend takes."""
    return [-(-size // GRANULE) * GRANULE if i in (1, 2) else size for i, size in enumerate(shape)]


def layer_of(number: int, dtype: str = "bfloat16") -> Layer:
    """The layer of a hostile case's shape."""
    return make_layer(sized(parameters(number)["shape"]), dtype)


def published_shapes() -> dict[str, list[int]]:
    """Every published shape, scaled down so that float64 checks it in moments.

    The ratio of d to n, the tokens an expert gets and K stay near the original's.
    """
    shapes = {}
    for name, entry in declared("shapes")["shapes"].items():
        if entry["kind"] != "published":
            continue
        num_experts = min(entry["E"], 40)
        rows_each = entry["T"] * entry["K"] // entry["E"]
        top_k = min(entry["K"], num_experts)
        num_tokens = min(517, rows_each * num_experts // top_k)
        shapes[name] = [num_tokens, entry["d"] // 4, entry["n"] // 4, num_experts, top_k]
    return shapes


def make_inputs(shape, dtype: str, *, seed: int = 0, bias: bool = False) -> dict[str, Tensor]:
    """x, router_weight, w1, w2 (and b1, b2), which want gradients, and d_output."""
    num_tokens, d, n, num_experts, _ = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(size, device="cuda").normal_(0, scale, generator=generator)
        return values.to(getattr(torch, dtype)).requires_grad_()

    inputs = {
        "x": draw(num_tokens, d),
        "router_weight": draw(num_experts, d, scale=d**-0.5),
        "w1": draw(num_experts, 2 * n, d, scale=d**-0.5),
        "w2": draw(num_experts, d, n, scale=n**-0.5),
    }
    if bias:
        inputs["b1"] = draw(num_experts, 2 * n, scale=0.3)
        inputs["b2"] = draw(num_experts, d, scale=0.3)
    return inputs | {"d_output": draw(num_tokens, d).detach()}


def leaves_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What has a gradient."""
    return {name: tensor for name, tensor in inputs.items() if name != "d_output"}


def forward(inputs: dict[str, Tensor], top_k: int, **options) -> Tensor:
    """The output, with its graph."""
    logits = functional.router_logits(inputs["x"], inputs["router_weight"])
    routing = functional.route(logits, top_k)
    biases = {name: inputs[name] for name in ("b1", "b2") if name in inputs}
    return functional.moe_experts(
        inputs["x"], inputs["w1"], inputs["w2"], routing, **biases, **options
    )


def step(inputs: dict[str, Tensor], top_k: int, **options) -> dict[str, Tensor]:
    """Output and gradients."""
    output = forward(inputs, top_k, **options)
    return gradients(output, inputs)


def gradients(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, detached, and the gradient of each leaf."""
    leaves = leaves_of(inputs)
    grads = torch.autograd.grad(output, list(leaves.values()), inputs["d_output"])
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"output": output.detach()} | named


def chosen_ids(inputs: dict[str, Tensor], top_k: int) -> Tensor:
    """The engine's choice (T, K), after a check that no expert is clearly better than a chosen."""
    with torch.no_grad():
        logits = functional.router_logits(inputs["x"], inputs["router_weight"])
        ids = functional.route(logits, top_k).topk()[1].long()
        exact = inputs["x"].double() @ inputs["router_weight"].double().t()
        best = exact.topk(top_k, dim=-1).values[:, -1]
        assert (exact.gather(1, ids).min(dim=-1).values > best - CLOSE).all()
    return ids


def plain_step(inputs: dict[str, Tensor], ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same step in plain torch, all of it in `dtype`, for the experts in `ids`."""
    wide = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}
    for name in leaves_of(wide):
        wide[name].requires_grad_()
    logits = torch.nn.functional.linear(wide["x"], wide["router_weight"])
    scores = logits.gather(1, ids).softmax(dim=-1)
    return gradients(plain.experts(wide["x"], wide, scores, ids), wide)


def other_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the results that differ in any bit (a NaN equals itself)."""
    return [name for name, want in expected.items() if not same_bits(got[name], want)]


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors are the same in every bit."""
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
