# SPDX-License-Identifier: Apache-2.0
"""Rows of results: a table for people, JSON lines for everything else.

A row holds what was run, on what, and what came out; its keys are listed in docs/bench.md and stay.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from penstock.bench.measure import Memory, Times
from penstock.bench.problem import Problem
from penstock.bench.verify import Verified


def machine_facts(threads: int) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import torch

    from penstock.info import cpu_name

    return {
        "cpu": cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "commit": _commit(),
    }


def make_row(problem: Problem, impl: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that is known before anything runs."""
    shape = problem.shape
    return {
        "shape": dict(zip("TdnEK", shape.sizes, strict=True)) | {"name": shape.name},
        "device": problem.device,
        "dtype": problem.dtype,
        "save": problem.save,
        "order": problem.order,
        "impl": impl,
        **facts,
    }


def add_results(
    row: dict[str, Any], problem: Problem, verified: Verified, times: Times, memory: Memory
) -> None:
    """Figures of one peer."""
    forward_flops, backward_flops = problem.shape.flops
    row |= {
        "forward_ms": times.forward_ms,
        "backward_ms": times.backward_ms,
        "total_ms": times.total_ms,
        "total_ms_quartiles": [times.low_ms, times.high_ms],
        "gflops": (forward_flops + backward_flops) / times.total_ms * 1e-6,
        "kept_bytes": memory.kept_bytes,
        "peak_bytes": memory.peak_bytes,
        "rel_l2": verified.rel_l2,
        "rel_l2_full": verified.rel_l2_full,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """ratio_to: by peer, how many times as fast this row is."""
    timed = {row["impl"]: row["total_ms"] for row in rows if "total_ms" in row}
    for row in rows:
        if "total_ms" in row:
            own = row["total_ms"]
            row["ratio_to"] = {
                name: total / own for name, total in timed.items() if name != row["impl"]
            }


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """One object a line, keys as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def print_table(console: Any, problem: Problem, rows: list[dict[str, Any]]) -> None:
    """One table a shape, and a line for each peer that did not run."""
    from rich import box
    from rich.table import Table

    shape = problem.shape
    sizes = " ".join(f"{key}={size}" for key, size in zip("TdnEK", shape.sizes, strict=True))
    title = f"{shape.name}: {sizes}, {problem.dtype}, {problem.device}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("", no_wrap=True)
    columns = ("fwd ms", "bwd ms", "both", "+-", "GF/s", "kept", "peak", "error", "ours")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    ours = next((row for row in rows if row["impl"] == "penstock" and "total_ms" in row), None)
    for row in rows:
        if "total_ms" in row:
            table.add_row(*_cells(row, ours))
    console.print(table)
    for row in rows:
        if "not_run" in row:
            console.print(f"  {row['impl']}: {row['not_run']}", highlight=False, markup=False)
    first = rows[0]
    console.print(
        f"  {first['cpu']}, {first['threads']} threads, torch {first['torch']}. Medians; +-: half "
        "the quartiles' distance; GF/s: GFLOP/s of the experts' products; kept, peak: MiB besides "
        "x, weights and results; ours: how many times as fast penstock is.",
        highlight=False,
        style="dim",
    )


def _cells(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    low, high = row["total_ms_quartiles"]
    faster = "" if ours in (None, row) else f"{row['total_ms'] / ours['total_ms']:.2f}x"
    return [
        row["impl"],
        _short(row["forward_ms"]),
        _short(row["backward_ms"]),
        _short(row["total_ms"]),
        _short((high - low) / 2),
        _short(row["gflops"]),
        _short(row["kept_bytes"] / 2**20),
        _short(row["peak_bytes"] / 2**20),
        f"{row['rel_l2']:.0e}",
        faster,
    ]


def _short(value: float) -> str:
    """One decimal where it says something."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _commit() -> str | None:
    """The commit of the source tree that this file is in; None for an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
