# SPDX-License-Identifier: Apache-2.0
"""What token rounding gains and costs on a GPU, over the sweeps of its paper (arXiv 2512.14080).

    python benchmarks/routers/gpu_rounding.py [--json FILE] [--png FILE]

For each layer, in one process, replayed as CUDA graphs, in turn, with cold caches (the clock of
`penstock bench`), medians:
- layer: forward and backward with routing included, plain top K and rounded (NR-f). Gain is plain
  over rounded; the bar is 0.99.
- router: logits, choice and plan, which is all of forward before the experts; and the same without
  the logits' product. Cost is rounded over plain; the bar is 1.30.
- experts: their passes alone on the rounded routing, over those on as many rows whose counts are
  equal whole tiles, which is the rate without padding. The bar is 1.03.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock import functional, routers
from penstock.bench.gpu.clock import time_in_turn
from penstock.bench.gpu.runs import Replay
from penstock.routing import Routing

ROUNDS = 20
GAIN, COST, UNEVEN = 0.99, 1.30, 1.03  # the bars
# SonicMoE's own gains, routing excluded, from its paper.
SONICMOE = {(1536, 1024, 2, 128): 1.094, (4096, 1024, 4, 256): 1.159}


class Layer(NamedTuple):
    """One layer of a sweep."""

    d: int
    n: int
    top_k: int
    experts: int

    def __str__(self) -> str:
        return f"{self.d}, {self.n}, {self.experts}, {self.top_k}"


class Setting(NamedTuple):
    """What holds for every layer."""

    tokens: int = 16384
    tile: int = 128
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


SWEEPS = [
    Layer(d, n, top_k, experts)
    for d, n, top_k, every in (
        (1536, 256, 8, (64, 128, 256, 512)),
        (1536, 1024, 2, (16, 32, 64, 128)),
        (4096, 512, 8, (64, 128, 256, 512)),
        (4096, 1024, 4, (32, 64, 128, 256)),
    )
    for experts in every
]


def evenly(num_rows: int, num_experts: int, setting: Setting) -> Routing:
    """A routing of `num_rows` pairs whose experts' counts are whole tiles, as equal as can be."""
    tiles, left = divmod(num_rows // setting.tile, num_experts)
    counts = torch.full((num_experts,), tiles) + (torch.arange(num_experts) < left)
    counts = (counts * setting.tile).to(setting.device)
    # Each expert goes on where the one before ended in one random order of all tokens, around the
    # end, so no token comes to an expert twice.
    order = torch.randperm(setting.tokens, device=setting.device)
    tokens = order[torch.arange(num_rows, device=setting.device) % setting.tokens]
    experts = torch.repeat_interleave(counts)
    by_token = torch.argsort(tokens, stable=True)
    offsets = torch.zeros(setting.tokens + 1, dtype=torch.int32, device=setting.device)
    offsets[1:] = torch.bincount(tokens, minlength=setting.tokens).cumsum(0)
    scores = torch.rand(num_rows, device=setting.device)
    return Routing(scores, experts[by_token].int(), setting.tokens, token_offsets=offsets)


def actions_of(layer: Layer, setting: Setting) -> dict[str, Callable[[], Any]]:
    """What to time of one layer, by name, as calls from the host."""
    torch.manual_seed(0)
    where = {"device": setting.device, "dtype": setting.dtype}

    def parameter(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, **where) * shape[-1] ** -0.5).requires_grad_()

    x = torch.randn(setting.tokens, layer.d, **where).requires_grad_()
    dy = torch.randn_like(x)
    router = parameter(layer.experts, layer.d)
    w1 = parameter(layer.experts, 2 * layer.n, layer.d)
    w2 = parameter(layer.experts, layer.d, layer.n)

    def plain(logits: torch.Tensor) -> Routing:
        return routers.topk_softmax(logits, layer.top_k, renormalize=True)

    def rounded(logits: torch.Tensor) -> Routing:
        return routers.token_rounding(logits, layer.top_k, tile=setting.tile)

    def step(choose: Callable[[torch.Tensor], Routing]) -> Any:
        y = functional.moe_experts(x, w1, w2, choose(functional.router_logits(x, router)))
        return torch.autograd.grad(y, (x, router, w1, w2), dy)

    @torch.no_grad()
    def route(choose: Callable[[torch.Tensor], Routing], logits: torch.Tensor | None) -> Any:
        logits = functional.router_logits(x, router) if logits is None else logits
        return functional.plan(choose(logits), layer.experts)

    def experts(routing: Routing) -> Callable[[], Any]:
        plan = functional.plan(routing, layer.experts)

        def run() -> Any:
            y = functional.moe_experts(x, w1, w2, routing, plan=plan)
            return torch.autograd.grad(y, (x, w1, w2), dy)

        return run

    logits = functional.router_logits(x, router).detach()
    uneven = rounded(logits)
    num_rows = uneven.read_report().pairs
    return {
        "layer_plain": lambda: step(plain),
        "layer_rounded": lambda: step(rounded),
        "router_plain": lambda: route(plain, None),
        "router_rounded": lambda: route(rounded, None),
        "choice_plain": lambda: route(plain, logits),
        "choice_rounded": lambda: route(rounded, logits),
        "experts_rounded": experts(uneven),
        "experts_even": experts(evenly(num_rows, layer.experts, setting)),
    }


def measure(layer: Layer, setting: Setting) -> dict[str, Any]:
    """Milliseconds of one layer, and the ratios that the bars are about."""
    actions = {name: Replay(run) for name, run in actions_of(layer, setting).items()}
    times = {name: times.median for name, times in time_in_turn(actions, ROUNDS).items()}
    return {
        "d": layer.d, "n": layer.n, "K": layer.top_k, "E": layer.experts,
        **{f"{name}_ms": time for name, time in times.items()},
        "gain": times["layer_plain"] / times["layer_rounded"],
        "gain_of_sonicmoe": SONICMOE.get(layer),
        "router_cost": times["router_rounded"] / times["router_plain"],
        "choice_cost": times["choice_rounded"] / times["choice_plain"],
        "uneven": times["experts_rounded"] / times["experts_even"],
    }  # fmt: skip


def line_of(layer: Layer, row: dict[str, Any]) -> str:
    """One layer's figures, those that miss their bar marked."""

    def judged(name: str, value: float, met: bool) -> str:
        return f"{name} {value:.3f}{'' if met else ' (missed)'}"

    theirs = "" if row["gain_of_sonicmoe"] is None else f" (SonicMoE {row['gain_of_sonicmoe']})"
    figures = [
        judged("gain", row["gain"], row["gain"] >= GAIN) + theirs,
        judged("router", row["router_cost"], row["router_cost"] <= COST),
        f"choice {1e3 * row['choice_plain_ms']:.0f} -> {1e3 * row['choice_rounded_ms']:.0f} us",
        judged("uneven", row["uneven"], row["uneven"] <= UNEVEN),
    ]
    return f"{layer}: " + ", ".join(figures)


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """The gain of every layer as bars, beside the least allowed and SonicMoE's own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar(places, [row["gain"] - 1 for row in rows], bottom=1, label="penstock")
    theirs = [(i, row["gain_of_sonicmoe"]) for i, row in enumerate(rows) if row["gain_of_sonicmoe"]]
    if theirs:
        label = "SonicMoE's paper, routing excluded"
        axes.plot(*zip(*theirs, strict=True), "k_", markersize=18, label=label)
    axes.axhline(GAIN, color="black", linewidth=0.8, linestyle=":")
    names = ["{d}, {n}, {E}, {K}".format(**row) for row in rows]
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set_xlabel("d, n, E, K")
    axes.set_ylabel("plain top K's time over token rounding's")
    axes.set_title(caption, fontsize=8)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Measure every layer; print, write and draw the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write one JSON object a line here")
    parser.add_argument("--png", type=Path, help="draw the gains here")
    args = parser.parse_args()
    setting = Setting()
    card = torch.cuda.get_device_name()
    caption = f"{card}, T {setting.tokens}, M {setting.tile}, bfloat16, forward and backward"
    print(caption, "d, n, E, K:", sep="\n")
    rows = []
    for layer in SWEEPS:
        rows.append({"gpu": card, **measure(layer, setting)})
        torch.cuda.empty_cache()
        print(line_of(layer, rows[-1]), flush=True)
    if args.json is not None:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if args.png is not None:
        draw(rows, caption, args.png)


if __name__ == "__main__":
    main()
