# SPDX-License-Identifier: Apache-2.0
"""benchmarks/routers/gpu_rounding.py, whose clock needs a GPU: what it times, on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from penstock import functional

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "routers" / "gpu_rounding.py"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("gpu_rounding", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where NamedTuple looks its annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def small(sweep):
    layer = sweep.Layer(d=16, n=8, top_k=2, experts=4)
    return layer, sweep.Setting(tokens=256, tile=16, device="cpu", dtype=torch.float32)


def test_every_action_runs(sweep):
    actions = sweep.actions_of(*small(sweep))
    results = {name: run() for name, run in actions.items()}
    for name in ("layer_plain", "layer_rounded"):
        assert [tuple(grad.shape) for grad in results[name]] == [
            (256, 16), (4, 16), (4, 16, 16), (4, 16, 8)
        ]  # fmt: skip
    plain, rounded = (results[f"choice_{how}"].expert_counts for how in ("plain", "rounded"))
    assert (plain % 16).any() and not (rounded % 16).any()
    assert torch.equal(results["router_rounded"].expert_counts, rounded)


@pytest.mark.parametrize("num_rows", [512, 464, 1024])
def test_an_even_routing(sweep, num_rows):
    """As many rows, counts of whole tiles that differ by one at most, no token twice."""
    layer, setting = small(sweep)
    routing = sweep.evenly(num_rows, layer.experts, setting)
    counts = functional.plan(routing, layer.experts).expert_counts
    assert counts.sum() == num_rows and not (counts % 16).any()
    assert counts.max() - counts.min() <= 16
    offsets = routing.token_offsets.tolist()
    for begin, end in zip(offsets, offsets[1:], strict=False):
        ids = routing.ids[begin:end].tolist()
        assert len(set(ids)) == len(ids)


def test_bars_and_picture(sweep, tmp_path):
    layer, _ = small(sweep)
    row = {
        "d": 16, "n": 8, "K": 2, "E": 4, "gain": 0.98, "gain_of_sonicmoe": 1.1,
        "router_cost": 1.2, "choice_plain_ms": 0.01, "choice_rounded_ms": 0.012, "uneven": 1.04,
    }  # fmt: skip
    line = sweep.line_of(layer, row)
    assert "gain 0.980 (missed) (SonicMoE 1.1)" in line
    assert "router 1.200, " in line and "uneven 1.040 (missed)" in line
    pytest.importorskip("matplotlib")
    sweep.draw([row, {**row, "gain_of_sonicmoe": None}], "a card", tmp_path / "gain.png")
    assert (tmp_path / "gain.png").stat().st_size > 1000
