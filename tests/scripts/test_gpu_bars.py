# SPDX-License-Identifier: Apache-2.0
"""The bars that GPU rows are held against: which figures, and that a miss is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_bars import Bar, bars_of, geometric_mean

ROOT = Path(__file__).resolve().parents[2]
BARS = json.loads((ROOT / "benchmarks" / "bars.json").read_text(encoding="utf-8"))
SHAPES = json.loads((ROOT / "tests" / "cases" / "shapes.json").read_text(encoding="utf-8"))[
    "shapes"
]


def row(name: str, impl: str, total: float, **more) -> dict:
    times = {"forward_ms": total / 3, "total_ms": total, "eager_total_ms": 1.1 * total}
    memory = {"first_step_s": 0.5, "peak_beyond_results": 1 << 30}
    where = {"shape": {**SHAPES[name], "name": name}, "impl": impl, "dtype": "bfloat16"}
    where |= {"save": "preactivation", "kept_bytes": 5 << 20}
    return where | {"timed": "graph", "load": "uniform"} | times | memory | more


def found(*rows: dict) -> dict[str, Bar]:
    return {bar.name: bar for bar in bars_of(list(rows), BARS)}


def test_ratios_to_the_yardstick():
    bars = found(
        row("7B-n256", "penstock", 3.0), row("7B-n256", "cublas", 2.0),
        row("olmoe", "penstock", 12.0), row("olmoe", "cublas", 10.0),
    )  # fmt: skip
    assert bars["7B-n256 step / cublas (SonicMoE's)"].figure == pytest.approx(1.5)
    assert bars["7B-n256 step / cublas (SonicMoE's)"].bound == 1.39
    assert bars["7B-n256 step / cublas (n = 256)"].bound == 1.17
    assert "olmoe step / cublas (n = 256)" not in bars
    assert bars["mean of 2 step / cublas"].figure == pytest.approx((1.5 * 1.2) ** 0.5)
    assert bars["mean of 2 forward / cublas"].bound == 1.18


def test_figures_of_one_shape():
    bars = found(row("7B-n256", "penstock", 3.0), row("small-T", "penstock", 1.0))
    assert bars["7B-n256 eager / graph"] == Bar("7B-n256 eager / graph", pytest.approx(1.1), 1.05)
    assert bars["small-T eager / graph"].bound == 1.5
    output = 24576 * 1536 * 2 / 2**20
    assert bars["7B-n256 peak - gradients - O, MiB"].figure == pytest.approx(1024 - output)


def test_of_a_shape_measured_twice_the_first_counts():
    bars = found(
        row("olmoe", "penstock", 12.0), row("olmoe", "cublas", 10.0),
        row("olmoe", "penstock", 11.0, eager_total_ms=22.0), row("olmoe", "cublas", 10.0),
    )  # fmt: skip
    assert bars["olmoe step / cublas (SonicMoE's)"].figure == pytest.approx(1.2)
    assert bars["olmoe eager / graph"].figure == pytest.approx(1.1)


def test_uneven_loads_and_decoding():
    decoding = {"pass": "forward", "bound_ms": 0.1, "forward_ms": 0.15, "impl": "penstock"}
    decoding["shape"] = {**SHAPES["olmoe"], "T": 8, "name": "olmoe/T8"}
    bars = found(
        row("7B-n256", "penstock", 3.0),
        row("7B-n256", "penstock", 3.6, load="zipf"),
        decoding,
    )
    assert bars["7B-n256 load zipf / uniform"].figure == pytest.approx(1.2)
    assert bars["olmoe/T8 forward, us"] == Bar("olmoe/T8 forward, us", 150.0, 145.0)


def test_a_row_that_computes_h_again_is_held_against_its_memory_alone():
    bars = found(
        row("7B-n256", "penstock", 3.0),
        row("7B-n256", "cublas", 2.0),
        row("7B-n256", "penstock", 4.0, save="input"),
    )
    assert bars["7B-n256 kept, save input, MiB"] == Bar("7B-n256 kept, save input, MiB", 5.0, 6)
    assert bars["7B-n256 step / cublas (SonicMoE's)"].figure == pytest.approx(1.5)


def test_the_low_memory_order_is_held_against_the_fast_one():
    output = 24576 * 1536 * 2
    low = {"order": "low_memory", "peak_beyond_results": output + (1 << 28)}
    fast = {"order": "fast", "peak_beyond_results": output + (1 << 29)}
    bars = found(
        row("7B-n256", "penstock", 3.0, **fast),
        row("7B-n256", "cublas", 2.0),
        row("7B-n256", "penstock", 3.3, **low),
    )
    peak, time = "7B-n256 low memory / fast, peak", "7B-n256 low memory / fast, time"
    assert bars[peak] == Bar(peak, pytest.approx(0.5), 0.65)
    assert bars[time] == Bar(time, pytest.approx(1.1), 1.05)
    assert bars["7B-n256 step / cublas (SonicMoE's)"].figure == pytest.approx(1.5)
    assert bars["7B-n256 peak - gradients - O, MiB"].figure == pytest.approx(512)


def test_a_profile_counts_launches_and_weighs_routing():
    launches = [{"name": "top-k", "microseconds": 10.0}, {"name": "plan", "microseconds": 20.0}]
    profile = {"pass": "profile", "impl": "penstock", "shape": {**SHAPES["olmoe"], "name": "olmoe"},
               "forward_launches": 9, "backward_launches": 17, "launches": launches}  # fmt: skip
    bars = found(profile)
    assert bars["olmoe launches forward"] == Bar("olmoe launches forward", 9, 10)
    assert bars["olmoe launches backward"].line().endswith("no")
    assert bars["olmoe routing / top-k"] == Bar("olmoe routing / top-k", 3.0, 2.5)


def test_a_miss_says_no():
    assert Bar("a", 1.0, 1.0).line().endswith("yes")
    assert Bar("a", 1.01, 1.0).line().endswith("no")
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_every_bar_has_a_shape():
    for name in BARS["step_over_cublas"]:
        assert name in SHAPES


def test_a_folder_of_rows(tmp_path):
    rows = [
        row("7B-n256", "penstock", 3.0),
        {"shape": SHAPES["olmoe"], "not_run": "x", "impl": "a"},
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / "gpu_bars.py", tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "7B-n256 first step, s" in output and "yes" in output


def test_the_script_explains_itself_and_refuses_unknown_parts():
    script = ROOT / "scripts" / "gpu_check.sh"
    usage = subprocess.run([script], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "gpu_check.sh sanitize" in usage.stdout
