# SPDX-License-Identifier: Apache-2.0
"""What token rounding gains and costs on a GPU, over the sweeps of its paper (arXiv 2512.14080).

    python benchmarks/routers/gpu_rounding.py [--json FILE]

For each layer, in one process: the router's own time, plain top K and rounded (NR-f); forward and
backward with routing included, both; and the experts' passes alone on the rounded routing against
equal, aligned counts of as many rows, which is the rate without padding. Medians of CUDA events.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from penstock import functional, routers
from penstock.routing import Routing

TOKENS, TILE = 16384, 128
WARM_UP, REPEATS = 5, 20
SWEEPS = [
    (d, n, top_k, experts)
    for d, n, top_k, every in (
        (1536, 256, 8, (64, 128, 256, 512)),
        (1536, 1024, 2, (16, 32, 64, 128)),
        (4096, 512, 8, (64, 128, 256, 512)),
        (4096, 1024, 4, (32, 64, 128, 256)),
    )
    for experts in every
]


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a run on the GPU."""
    times = []
    for index in range(WARM_UP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= WARM_UP:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def aligned(rounded: Routing, num_experts: int) -> Routing:
    """A routing of about as many pairs, with equal counts of whole tiles."""
    pairs = rounded.read_report().pairs
    each = max(1, round(pairs / num_experts / TILE)) * TILE
    # Expert e takes `each` tokens from token e * each on, around the end: counts are exact.
    tokens = torch.arange(num_experts * each, device=rounded.ids.device) % TOKENS
    experts = torch.arange(num_experts, device=tokens.device).repeat_interleave(each)
    order = torch.argsort(tokens, stable=True)
    offsets = torch.zeros(TOKENS + 1, dtype=torch.int32, device=tokens.device)
    offsets[1:] = torch.bincount(tokens, minlength=TOKENS).cumsum(0)
    scores = torch.rand(len(tokens), device=tokens.device)
    return Routing(scores, experts[order].int(), TOKENS, token_offsets=offsets)


def measure(d: int, n: int, top_k: int, num_experts: int) -> dict[str, float]:
    """The times of one layer, in milliseconds."""
    torch.manual_seed(0)

    def parameter(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5
        return values.requires_grad_()

    x = torch.randn(TOKENS, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)
    router = parameter(num_experts, d)
    w1, w2 = parameter(num_experts, 2 * n, d), parameter(num_experts, d, n)

    def plain(logits: torch.Tensor) -> Routing:
        return routers.topk_softmax(logits, top_k, renormalize=True)

    def rounded(logits: torch.Tensor) -> Routing:
        return routers.token_rounding(logits, top_k, tile=TILE)

    def layer(choose: Callable[[torch.Tensor], Routing]) -> object:
        routing = choose(functional.router_logits(x, router))
        y = functional.moe_experts(x, w1, w2, routing)
        return torch.autograd.grad(y, (x, router, w1, w2), dy)

    def experts(routing: Routing, plan: object) -> object:
        y = functional.moe_experts(x, w1, w2, routing, plan=plan)
        return torch.autograd.grad(y, (x, w1, w2), dy)

    logits = functional.router_logits(x, router).detach()
    row = {"d": d, "n": n, "K": top_k, "E": num_experts}
    row["router_plain_ms"] = milliseconds(lambda: plain(logits))
    row["router_rounded_ms"] = milliseconds(lambda: rounded(logits))
    row["layer_plain_ms"] = milliseconds(lambda: layer(plain))
    row["layer_rounded_ms"] = milliseconds(lambda: layer(rounded))
    for name, routing in (
        ("rounded", rounded(logits)),
        ("aligned", aligned(rounded(logits), num_experts)),
    ):
        plan = functional.plan(routing, num_experts)
        assert not (plan.expert_counts % TILE).any()
        rows = int(plan.expert_counts.sum())
        spent = milliseconds(lambda routing=routing, plan=plan: experts(routing, plan))
        row[f"experts_{name}_us_per_row"] = 1e3 * spent / rows
    return row


def main() -> None:
    """Measure every layer and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one JSON object a line here")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), f"T {TOKENS}, M {TILE}")
    rows = []
    for sweep in SWEEPS:
        row = measure(*sweep)
        rows.append(row)
        print(
            "d {d} n {n} K {K} E {E}: ".format(**row)
            + f"gain {row['layer_plain_ms'] / row['layer_rounded_ms']:.3f}, "
            f"router {row['router_rounded_ms'] / row['router_plain_ms']:.2f} x plain, per row "
            f"{row['experts_rounded_us_per_row'] / row['experts_aligned_us_per_row']:.3f} x aligned"
        )
    if args.json is not None:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
