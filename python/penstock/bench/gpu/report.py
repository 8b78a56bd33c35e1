# SPDX-License-Identifier: Apache-2.0
"""Figures of a GPU run: how samples become a row's figures, and rows become text.

The keys are listed in docs/bench.md and stay. A row's forward_ms, backward_ms and total_ms are
those of the graph where there is one, else eager, and `timed` says which; backward is the step less
the forward pass.
"""

from __future__ import annotations

from typing import Any

from penstock.bench.gpu.ceilings import Ceilings
from penstock.bench.gpu.clock import Summary
from penstock.bench.gpu.launches import Rate

MIB = 2**20

Row = dict[str, Any]


def add_times(
    row: Row, name: str, times: dict[str, Summary], flops: tuple[int, int], ceilings: Ceilings
) -> None:
    """Adds the figures of one implementation; `times` is keyed by "name/how/pass"."""
    how = "graph" if f"{name}/graph/step" in times else "eager"
    forward, step = times[f"{name}/{how}/forward"], times[f"{name}/{how}/step"]
    eager_forward, eager_step = times[f"{name}/eager/forward"], times[f"{name}/eager/step"]
    tflops = sum(flops) / step.median * 1e-9
    row |= {
        "timed": how,
        "forward_ms": forward.median,
        "backward_ms": step.median - forward.median,
        "total_ms": step.median,
        "total_ms_quartiles": [step.low, step.high],
        "eager_forward_ms": eager_forward.median,
        "eager_total_ms": eager_step.median,
        "tflops": tflops,
        "forward_tflops": flops[0] / forward.median * 1e-9,
        "share_of_matmul": tflops / ceilings.matmul_tflops,
    }


def as_launch_rows(rates: list[Rate]) -> list[Row]:
    """Rates as JSON holds them: a share that is not known is null."""
    return [
        rate._asdict()
        | {"share_of_ceiling": None if rate.share_of_ceiling != rate.share_of_ceiling
           else rate.share_of_ceiling}
        for rate in rates
    ]  # fmt: skip


def shape_lines(rows: list[Row]) -> list[str]:
    """The table of one shape: a line an implementation, and why some did not run."""
    yard = next((row for row in rows if row["impl"] == "cublas" and "total_ms" in row), None)
    lines = [
        title(rows[0]),
        f"{'':15}{'fwd ms':>8}{'bwd ms':>8}{'both':>8}{'+-%':>6}{'TF/s':>6}{'peak%':>6}"
        f"{'/cublas':>8}{'fwd':>6}{'eager':>8}{'kept':>7}{'peak':>7}{'1st s':>7}{'error':>8}",
    ]
    for row in rows:
        if "total_ms" in row:
            lines.append(_shape_line(row, yard))
    return [*lines, *reasons(rows)]


def _shape_line(row: Row, yard: Row | None) -> str:
    low, high = row["total_ms_quartiles"]
    spread = 50 * (high - low) / row["total_ms"]
    total_ratio = row["total_ms"] / yard["total_ms"] if yard else float("nan")
    forward_ratio = row["forward_ms"] / yard["forward_ms"] if yard else float("nan")
    line = (
        f"{row['impl']:15}{row['forward_ms']:8.3f}{row['backward_ms']:8.3f}{row['total_ms']:8.3f}"
        f"{spread:6.1f}{row['tflops']:6.0f}{100 * row['share_of_matmul']:6.0f}"
        f"{total_ratio:8.3f}{forward_ratio:6.2f}{row['eager_total_ms']:8.3f}"
    )
    if "kept_bytes" not in row:
        return line
    return line + (
        f"{row['kept_bytes'] / MIB:7.0f}{row['peak_bytes'] / MIB:7.0f}"
        f"{row['first_step_s']:7.2f}{row['rel_l2']:8.0e}"
    )


def forward_lines(rows: list[Row]) -> list[str]:
    """The table of forward alone; bound is the time to read what has to be read."""
    lines = [
        title(rows[0]),
        f"{'':15}{'fwd us':>9}{'eager us':>10}{'bound us':>10}{'x bound':>9}{'experts':>9}",
    ]
    for row in rows:
        if "forward_ms" in row:
            forward, eager = 1e3 * row["forward_ms"], 1e3 * row["eager_forward_ms"]
            bound = 1e3 * row["bound_ms"]
            lines.append(
                f"{row['impl']:15}{forward:9.1f}{eager:10.1f}{bound:10.1f}{forward / bound:9.2f}"
                f"{row['experts_touched']:9}"
            )
    return [*lines, *reasons(rows)]


def profile_lines(row: Row) -> list[str]:
    """The table of our launches of one step."""
    total = sum(launch["microseconds"] for launch in row["launches"])
    lines = [
        f"{title(row)}: {row['forward_launches']} launches forward, {row['backward_launches']} "
        f"backward, {total:.0f} us in all",
        f"{'':24}{'count':>6}{'us':>9}{'%':>6}{'TF/s':>7}{'GB/s':>7}{'of ceiling %':>14}",
    ]
    for launch in row["launches"]:
        share = launch["share_of_ceiling"]
        lines.append(
            f"{launch['name'][:23]:24}{launch['count']:6}{launch['microseconds']:9.1f}"
            f"{100 * launch['microseconds'] / total:6.1f}{launch['tflops']:7.0f}"
            f"{launch['gbs']:7.0f}{'' if share is None else f'{100 * share:.0f}':>14}"
        )
    return lines


def title(row: Row) -> str:
    """The shape and how it was run."""
    shape = row["shape"]
    sizes = " ".join(f"{key}={shape[key]}" for key in "TdnEK")
    return f"{shape['name']}: {sizes}, {row['dtype']}, load {row['load']}, save {row['save']}"


def reasons(rows: list[Row]) -> list[str]:
    """A line for each implementation that did not run."""
    return [f"  {row['impl']}: {row['not_run']}" for row in rows if "not_run" in row]


def session_line(facts: Row) -> str:
    """What the figures depend on besides the code."""
    ceilings = facts["ceilings"]
    return (
        f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, commit "
        f"{facts['commit']}; ceilings: {ceilings['matmul_tflops']:.0f} TFLOP/s (8192^3 bf16), "
        f"{ceilings['copy_gbs']:.0f} GB/s copied, {ceilings['read_gbs']:.0f} GB/s read; start: "
        f"{facts['start']['imports_s']:.2f} s imports, {facts['start']['context_s']:.2f} s context"
    )


KEY = (
    "Medians, caches cleared; as a replayed CUDA graph where it can be captured. +-%: half the "
    "quartiles' distance; TF/s: the experts' products; peak%: of the 8192^3 product; /cublas, fwd: "
    "time over the yardstick's, both passes and forward; kept, peak: MiB for backward and beyond "
    "what was there before, results included; 1st s: first step of this shape, verification and "
    "imports apart; error: relative L2 from float64, scaled down."
)
