# SPDX-License-Identifier: Apache-2.0
"""`penstock bench --device cuda` end to end on a small layer: rows, profile, decoding, picture."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from penstock.bench import command
from penstock.bench.gpu.ceilings import measure_ceilings
from penstock.bench.gpu.clock import time_in_turn
from penstock.bench.gpu.runs import Replay

SHAPE = "600,128,64,16,2"
ALLOCATOR_BLOCK = 512
KEPT_TENSORS = 8  # H, scores, ids, three maps, counts, offsets


def bench(path, *options: str) -> dict[tuple, dict]:
    """The rows of a run by implementation and pass."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ("--device", "cuda", "--repeats", "2", "--json", str(path), *options)
    assert command.run(parser.parse_args(given)) == 0
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {(row["impl"], row.get("pass", "step")): row for row in rows}


def test_rows_and_picture(tmp_path) -> None:
    png = tmp_path / "bars.png"
    rows = bench(tmp_path / "rows.jsonl", "--shape", SHAPE, "--profile", "--png", str(png))
    ours, yard = rows["penstock", "step"], rows["cublas", "step"]
    assert ours["verified"] and ours["timed"] == yard["timed"] == "graph"
    assert ours["dtype"] == "bfloat16" and ours["gpu"] == torch.cuda.get_device_name()
    assert 0 < ours["forward_ms"] < ours["total_ms"]
    beyond = ours["kept_bytes"] - ours["kept_bytes_formula"]
    assert 0 <= beyond < KEPT_TENSORS * ALLOCATOR_BLOCK
    assert ours["peak_beyond_results"] > 0 and ours["first_step_s"] > 0
    grouped = rows["torch-grouped", "step"]
    assert "not_run" in grouped or grouped["verified"]
    assert png.read_bytes().startswith(b"\x89PNG")
    launches = {launch["name"]: launch for launch in rows["penstock", "profile"]["launches"]}
    products = {"logits", "up-projection", "down-projection", "dH", "dX rows", "combine"}
    assert products <= set(launches), sorted(launches)
    assert all(launches[name]["share_of_ceiling"] > 0 for name in products)
    assert {"dW1", "dW2"} <= set(launches) or "dW1 and dW2" in launches


@pytest.mark.parametrize("load", ["zipf", "hot"])
def test_uneven_loads(load, tmp_path) -> None:
    rows = bench(tmp_path / "rows.jsonl", "--shape", SHAPE, "--load", load, "--peers", "penstock")
    assert rows["penstock", "step"]["load"] == load and rows["penstock", "step"]["verified"]


def test_decoding(tmp_path) -> None:
    options = ("--shape", SHAPE, "--tokens", "1,8", "--peers", "penstock")
    row = bench(tmp_path / "rows.jsonl", *options)["penstock", "forward"]
    assert row["shape"]["T"] == 8 and row["forward_ms"] > 0 and 2 <= row["experts_touched"] <= 16


def test_the_clock_and_the_ceilings_are_plausible() -> None:
    """A product of twice the work takes about twice as long; a card copies and multiplies fast."""
    generator = torch.Generator("cuda").manual_seed(0)
    left = torch.randn(8192, 4096, device="cuda", generator=generator).bfloat16()
    actions = {"all": lambda: left @ left.t(), "half": lambda: left[:4096] @ left.t()}
    actions["replayed"] = Replay(actions["all"])
    times = time_in_turn(actions, 10)
    assert times["all"].median == pytest.approx(2 * times["half"].median, rel=0.35)
    assert times["replayed"].median == pytest.approx(times["all"].median, rel=0.2)
    ceilings = measure_ceilings()
    assert 300 < ceilings.matmul_tflops < 1100 and 1000 < ceilings.copy_gbs < 6000
