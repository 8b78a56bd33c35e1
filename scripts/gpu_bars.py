# SPDX-License-Identifier: Apache-2.0
"""Holds a folder of GPU rows against benchmarks/bars.json and prints what is met and what is not.

`gpu_bars.py FOLDER` reads every *.jsonl that `penstock bench --device cuda --json` wrote there. It
only reports: a bar that is missed is a line with "no", never an exit status, since a card in
another state gives other figures. Of a shape that ran more than once the first file's rows count:
gpu-bf16.jsonl, where all peers take turns. Called by scripts/gpu_check.sh.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OURS, YARDSTICK = "penstock", "cublas"
MIB = 2**20

Row = dict[str, Any]


class Bar(NamedTuple):
    """One figure beside what it should not exceed."""

    name: str
    figure: float
    bound: float

    def line(self) -> str:
        """The bar as text."""
        met = "yes" if self.figure <= self.bound else "no"
        return f"{self.name:44}{self.figure:10.3f}{self.bound:10.3f}  {met}"


def read_rows(folder: Path) -> list[Row]:
    """Every row of the folder."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def geometric_mean(values: list[float]) -> float:
    """The n-th root of the product."""
    return math.exp(sum(map(math.log, values)) / len(values))


def bars_of(rows: list[Row], bars: dict[str, Any]) -> list[Bar]:
    """Every bar that the rows say something about, in a fixed order."""
    whole = [row for row in rows if "pass" not in row and "total_ms" in row]
    uniform = [row for row in whole if row.get("load", "uniform") == "uniform"]
    recomputing = [row for row in uniform if row["save"] == "input" and row["impl"] == OURS]
    uniform = [row for row in uniform if row["save"] != "input"]
    low_memory = [row for row in uniform if row.get("order") == "low_memory"]
    uniform = [row for row in uniform if row.get("order") != "low_memory"]
    found = _against_the_yardstick(uniform, bars)
    ours = {row["shape"]["name"]: row for row in reversed(uniform) if row["impl"] == OURS}
    for name, row in ours.items():
        found += _of_one_shape(name, row, bars)
    for row in whole:
        name, load = row["shape"]["name"], row.get("load", "uniform")
        if row["impl"] == OURS and load != "uniform" and name in ours:
            ratio = row["total_ms"] / ours[name]["total_ms"]
            found.append(Bar(f"{name} load {load} / uniform", ratio, bars["skew_over_uniform"]))
    for row in low_memory:
        if row["impl"] == OURS and row["shape"]["name"] in ours:
            found += _of_low_memory(row, ours[row["shape"]["name"]], bars)
    for row in recomputing:
        name = row["shape"]["name"]
        if name in bars["kept_under_input_mib"]:
            kept, limit = row["kept_bytes"] / MIB, bars["kept_under_input_mib"][name]
            found.append(Bar(f"{name} kept, save input, MiB", kept, limit))
    for row in rows:
        if row.get("pass") == "profile":
            found += _of_a_profile(row, bars)
    forward = [row for row in rows if row.get("pass") == "forward" and "forward_ms" in row]
    return found + [_decoding(row, bars) for row in forward if row["impl"] == OURS]


def _against_the_yardstick(rows: list[Row], bars: dict[str, Any]) -> list[Bar]:
    by_shape: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"]["name"], {}).setdefault(row["impl"], row)
    pairs = {
        name: (by_impl[OURS], by_impl[YARDSTICK])
        for name, by_impl in by_shape.items()
        if OURS in by_impl and YARDSTICK in by_impl
    }
    step = {name: ours["total_ms"] / yard["total_ms"] for name, (ours, yard) in pairs.items()}
    forward = [ours["forward_ms"] / yard["forward_ms"] for ours, yard in pairs.values()]
    found = [
        Bar(f"{name} step / cublas (SonicMoE's)", step[name], bound)
        for name, bound in bars["step_over_cublas"].items()
        if name in step
    ]
    found += [
        Bar(f"{name} step / cublas (n = 256)", step[name], bars["narrow_step_over_cublas"])
        for name in bars["narrow_shapes"]
        if name in step
    ]
    if step:
        mean = geometric_mean(list(step.values()))
        found.append(Bar(f"mean of {len(step)} step / cublas", mean, bars["mean_step_over_cublas"]))
        mean = geometric_mean(forward)
        bound = bars["mean_forward_over_cublas"]
        found.append(Bar(f"mean of {len(step)} forward / cublas", mean, bound))
    return found


def _of_one_shape(name: str, row: Row, bars: dict[str, Any]) -> list[Bar]:
    small = row["shape"]["T"] < bars["small_tokens"]
    bound = bars["eager_over_graph_small" if small else "eager_over_graph"]
    found = []
    if row["timed"] == "graph":
        ratio = row["eager_total_ms"] / row["total_ms"]
        found.append(Bar(f"{name} eager / graph", ratio, bound))
    found.append(Bar(f"{name} first step, s", row["first_step_s"], bars["first_step_s"]))
    if name in bars["peak_beyond_results_mib"]:
        beyond = row["peak_beyond_results"] - _output_bytes(row)
        limit = bars["peak_beyond_results_mib"][name]
        found.append(Bar(f"{name} peak - gradients - O, MiB", beyond / MIB, limit))
    return found


def _of_low_memory(row: Row, fast: Row, bars: dict[str, Any]) -> list[Bar]:
    name = row["shape"]["name"]
    low, whole = (r["peak_beyond_results"] - _output_bytes(r) for r in (row, fast))
    time = row["total_ms"] / fast["total_ms"]
    return [
        Bar(f"{name} low memory / fast, peak", low / whole, bars["low_memory_peak_over_fast"]),
        Bar(f"{name} low memory / fast, time", time, bars["low_memory_step_over_fast"]),
    ]


def _output_bytes(row: Row) -> int:
    element = {"bfloat16": 2, "float16": 2}.get(row["dtype"], 4)
    return row["shape"]["T"] * row["shape"]["d"] * element


def _of_a_profile(row: Row, bars: dict[str, Any]) -> list[Bar]:
    name = row["shape"]["name"]
    found = [
        Bar(f"{name} launches {which}", row[f"{which}_launches"], bars[f"{which}_launches"])
        for which in ("forward", "backward")
    ]
    times = {launch["name"]: launch["microseconds"] for launch in row["launches"]}
    if "top-k" in times and "plan" in times:
        ratio = (times["top-k"] + times["plan"]) / times["top-k"]
        found.append(Bar(f"{name} routing / top-k", ratio, bars["routing_over_top_k"]))
    return found


def _decoding(row: Row, bars: dict[str, Any]) -> Bar:
    extra = bars["decode_extra_us"].get(str(row["shape"]["T"]), 10)
    bound = bars["decode_factor"] * row["bound_ms"] * 1e3 + extra
    return Bar(f"{row['shape']['name']} forward, us", row["forward_ms"] * 1e3, bound)


def main() -> None:
    """Prints one line a bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    bars = json.loads((ROOT / "benchmarks" / "bars.json").read_text(encoding="utf-8"))
    found = bars_of(read_rows(folder), bars)
    if found:
        print(f"{'':44}{'measured':>10}{'at most':>10}  met")
    for bar in found:
        print(bar.line())


if __name__ == "__main__":
    main()
