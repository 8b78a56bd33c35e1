# SPDX-License-Identifier: Apache-2.0
"""Verifies before anything is timed: nothing that computes something else gets a row.

Twice: a scaled-down layer against float64 (relative L2 of the output and of every gradient), and
the full layer against the torch loop in the same dtype. Routing is decided by the same logits for
everyone, but in a 16-bit dtype two implementations may round a logit differently and choose another
expert where two nearly tie; such tokens are left out of the comparison.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock.bench.peers import torch_loop
from penstock.bench.peers.peer import Peer
from penstock.bench.problem import GRADIENTS, Problem, Tensors, cast, make_tensors

# End-to-end relative L2 against float64, as tests/cases/tolerances.json has it, and the width of
# the full-size comparison, where both sides carry an error of that size.
END_TO_END = {"bfloat16": 5.0e-3, "float16": 6.5e-4, "float32": 5.0e-6, "float64": 1.0e-12}
BOTH_SIDES = 4.0
# Logits are of order 1, so this is past what rounding one to bf16 changes.
CLEAR_GAP = 0.03


class Verified(NamedTuple):
    """What one peer's verification found."""

    rel_l2: float  # the largest of output and gradients, scaled down, against float64
    rel_l2_full: float  # the output at full size against the torch loop
    problem: str  # empty: verified


def verify(peer: Peer, problem: Problem, tensors: Tensors) -> Verified:
    """Compares, and says what is wrong if anything is."""
    small = problem._replace(shape=problem.shape.scaled_down())
    errors = errors_against_float64(peer, small, make_tensors(small, seed=1))
    worst = max(errors, key=errors.__getitem__)
    bound = END_TO_END[problem.dtype] * peer.allowance
    if not errors[worst] <= bound:  # NaN included
        text = f"{worst} is {errors[worst]:.1e} from float64, more than {bound:.1e}"
        return Verified(errors[worst], float("nan"), text)
    full = error_against_loop(peer, problem, tensors)
    bound = END_TO_END[problem.dtype] * BOTH_SIDES
    if not full <= bound:
        text = f"output is {full:.1e} from the torch loop, more than {bound:.1e}"
        return Verified(errors[worst], full, text)
    return Verified(errors[worst], full, "")


def errors_against_float64(peer: Peer, problem: Problem, tensors: Tensors) -> dict[str, float]:
    """Relative L2 of the output and of every gradient."""
    import torch

    separate_top_k(problem, tensors)
    wide = cast(tensors, torch.float64)
    expected = _run(torch_loop.PEER, problem, wide)
    got = _run(peer, problem, tensors)
    names = ("output", *GRADIENTS)
    return {name: relative_l2(*pair) for name, *pair in zip(names, got, expected, strict=True)}


def separate_top_k(problem: Problem, tensors: Tensors) -> None:
    """Replaces the rows of x whose K-th and next logits nearly tie by copies of clear ones.

    A near tie is decided by rounding, so the two sides would compute different layers.
    """
    import torch

    top_k, num_experts = problem.shape.top_k, problem.shape.num_experts
    if top_k == num_experts:
        return
    with torch.no_grad():
        logits = tensors.x.double() @ tensors.router_weight.double().t()
        values = logits.topk(top_k + 1, dim=-1).values
        gaps = values[:, -2] - values[:, -1]
        clear = (gaps > CLEAR_GAP).nonzero().flatten()
        close = (gaps <= CLEAR_GAP).nonzero().flatten()
        if clear.numel() == 0:
            raise RuntimeError(
                f"{problem.shape.name}: got no token with clear choices, expected one. "
                "Use fewer experts or a larger hidden size"
            )
        source = clear[torch.arange(close.numel()) % clear.numel()]
        tensors.x[close] = tensors.x[source]


def error_against_loop(peer: Peer, problem: Problem, tensors: Tensors) -> float:
    """Relative L2 of the outputs, over the tokens whose experts every rounding agrees on."""
    import torch

    with torch.no_grad():
        got = peer.forward(problem, tensors)
        expected = torch_loop.PEER.forward(problem, tensors)
        keep = _clear_tokens(problem, tensors)
    return relative_l2(got[keep], expected[keep])


def _clear_tokens(problem: Problem, tensors: Tensors) -> Any:
    import torch

    top_k = problem.shape.top_k
    if top_k == problem.shape.num_experts:
        return torch.ones(problem.shape.num_tokens, dtype=torch.bool)
    logits = (tensors.x @ tensors.router_weight.t()).float()
    values = logits.topk(top_k + 1, dim=-1).values
    return values[:, -2] - values[:, -1] > CLEAR_GAP


def _run(peer: Peer, problem: Problem, tensors: Tensors) -> tuple[Any, ...]:
    import torch

    output = peer.forward(problem, tensors)
    grads = torch.autograd.grad(output, peer.leaves(tensors), tensors.d_output)
    return (output.detach(), *peer.in_our_layout(grads))


def relative_l2(got: Any, expected: Any) -> float:
    """||got - expected|| / ||expected|| in float64."""
    expected = expected.double()
    norm = expected.norm().item()
    return (got.double() - expected).norm().item() / (norm or 1.0)
