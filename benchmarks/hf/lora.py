# SPDX-License-Identifier: Apache-2.0
"""A step of adapters beside frozen experts against the frozen experts' own forward and dX.

    python benchmarks/hf/lora.py --device cuda                    # OLMoE's layer, ranks 8 to 256
    python benchmarks/hf/lora.py --shape 512,1024,512,16,2 --json rows.jsonl

Both compute the gradients of x and of the scores; a step of adapters those of its four factors as
well. Adapters have the same rank on both projections. Goals: at rank 16 at most 1.25 times the
frozen experts, at other ranks at most 1.15 (1 + the adapters' FLOP over the frozen experts').
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from timing import Effort, device_name, medians_in_turn
from torch import Tensor

import penstock
from penstock import functional, lora

OLMOE = (32768, 2048, 1024, 64, 8)
SMALL = (512, 1024, 512, 16, 2)
RANKS = (8, 16, 32, 64, 128, 256)
GOAL_RANK, GOAL_AT_RANK, GOAL_FACTOR = 16, 1.25, 1.15


class Layer(NamedTuple):
    """A SwiGLU layer's tensors; x and scores want gradients."""

    x: Tensor  # (T, d)
    w1: Tensor  # (E, 2n, d)
    w2: Tensor  # (E, d, n)
    scores: Tensor  # (T, K) fp32
    ids: Tensor  # (T, K)
    d_output: Tensor  # (T, d)


def make_layer(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Layer:
    """Random values of order 1 / sqrt(fan in), and a random routing."""
    num_tokens, d, n, num_experts, top_k = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    logits = torch.randn(num_tokens, num_experts, device=device, generator=generator)
    scores, ids = logits.topk(top_k, dim=-1)
    return Layer(
        draw(num_tokens, d).requires_grad_(),
        draw(num_experts, 2 * n, d) * d**-0.5,
        draw(num_experts, d, n) * n**-0.5,
        scores.softmax(-1).requires_grad_(),
        ids,
        draw(num_tokens, d),
    )


def make_adapters(layer: Layer, rank: int) -> lora.Adapters:
    """Random factors of one rank on both projections."""
    num_experts, h, d = layer.w1.shape
    n = layer.w2.shape[2]

    def draw(*size: int) -> Tensor:
        values = torch.randn(size, device=layer.x.device, dtype=layer.x.dtype) * size[-1] ** -0.5
        return values.requires_grad_()

    return lora.Adapters(
        draw(num_experts, rank, d),
        draw(num_experts, h, rank),
        draw(num_experts, rank, n),
        draw(num_experts, d, rank),
    )


def frozen_step(layer: Layer) -> Callable[[], object]:
    """Forward and the gradients of x and scores, weights frozen."""

    def step() -> object:
        output = functional.moe_experts(layer.x, layer.w1, layer.w2, layer.scores, layer.ids)
        return torch.autograd.grad(output, (layer.x, layer.scores), layer.d_output)

    return step


def adapted_step(layer: Layer, adapters: lora.Adapters) -> Callable[[], object]:
    """The same with adapters, and the gradients of their factors."""

    def step() -> object:
        output = lora.adapted_experts(
            layer.x, layer.w1, layer.w2, layer.scores, layer.ids, adapters=adapters
        )
        return torch.autograd.grad(output, (layer.x, layer.scores, *adapters), layer.d_output)

    return step


def flop_ratio(shape: tuple[int, ...], rank: int) -> float:
    """Multiplications of the adapters (both passes and their gradients) over the frozen experts'.

    A row: forward and dX of the experts 2 (2n d + n d); each of the adapters' factors meets a row
    once in the forward pass, once in dX and once in its own gradient.
    """
    _, d, n, _, _ = shape
    return 3 * rank * (d + 2 * n + n + d) / (2 * 3 * n * d)


def measure(shape: tuple[int, ...], ranks: list[int], args: argparse.Namespace) -> list[dict]:
    """One row a rank."""
    layer = make_layer(shape, args.device, getattr(torch, args.dtype))
    actions = {"frozen": frozen_step(layer)}
    for rank in ranks:
        actions[f"rank {rank}"] = adapted_step(layer, make_adapters(layer, rank))
    times = medians_in_turn(actions, args.device, Effort(args.rounds, args.seconds))
    rows = []
    for rank in ranks:
        spent, ratio = times[f"rank {rank}"], flop_ratio(shape, rank)
        rows.append(
            {
                "device": device_name(args.device),
                "dtype": args.dtype,
                "shape": list(shape),
                "rank": rank,
                "frozen_ms": times["frozen"],
                "adapted_ms": spent,
                "ratio": spent / times["frozen"],
                "flop_ratio": ratio,
                "goal": GOAL_AT_RANK if rank == GOAL_RANK else GOAL_FACTOR * (1 + ratio),
            }
        )
    return rows


def table_of(rows: list[dict]) -> Table:
    """The rows for people."""
    first = rows[0]
    table = Table(
        title=f"{first['shape']} {first['dtype']}, {first['device']}: "
        f"frozen forward and dX {first['frozen_ms']:.2f} ms"
    )
    for name in ("rank", "with adapters ms", "ratio", "goal", "FLOP ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        style = "green" if row["ratio"] <= row["goal"] else "red"
        table.add_row(
            str(row["rank"]),
            f"{row['adapted_ms']:.2f}",
            f"[{style}]{row['ratio']:.3f}[/]",
            f"{row['goal']:.3f}",
            f"{row['flop_ratio']:.3f}",
        )
    return table


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shape", help="T,d,n,E,K; OLMoE's on a GPU, a small one on the CPU")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=60.0, help="no further round after these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="add the rows to this file, one object a line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    default = OLMOE if args.device == "cuda" else SMALL
    shape = tuple(map(int, args.shape.split(","))) if args.shape else default
    with penstock.backend(threads=args.threads):
        rows = measure(shape, [int(rank) for rank in args.ranks.split(",")], args)
    Console().print(table_of(rows))
    if args.json is not None:
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
