# SPDX-License-Identifier: Apache-2.0
"""penstock bench: verifies before it times, measures what it says, and refuses bad options."""

from __future__ import annotations

import argparse
import json

import pytest

from penstock.bench import command
from penstock.bench.measure import measure_memory, time_peers
from penstock.bench.peers import ALL, penstock_engine, torch_grouped, torch_loop
from penstock.bench.problem import Problem, make_tensors
from penstock.bench.shapes import Shape, known_shapes, parse_shape
from penstock.bench.verify import verify

SMALL = Shape("small", 40, 32, 16, 6, 2)
KEYS = {
    "shape", "device", "dtype", "save", "order", "impl", "cpu", "threads", "torch", "commit",
    "verified", "forward_ms", "backward_ms", "total_ms", "total_ms_quartiles", "gflops",
    "kept_bytes", "peak_bytes", "rel_l2", "rel_l2_full", "ratio_to",
}  # fmt: skip
OWN_KEYS = {"backend", "kept_bytes_formula", "workspace_bytes", "workspace_bytes_formula"}


def bench(*options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(options))


def test_shapes_by_name_and_by_numbers():
    assert parse_shape("cpu-1").sizes == (2048, 512, 256, 32, 4)
    assert parse_shape("64,20,12,8,2").sizes == (64, 20, 12, 8, 2)
    assert {"cpu-1", "cpu-2", "cpu-3", "olmoe"} <= set(known_shapes())


@pytest.mark.parametrize("text", ["", "no-such", "1,2,3", "1,2,3,4,5,6", "0,8,8,2,1", "4,8,8,2,3"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(ValueError, match="--shape"):
        parse_shape(text)


@pytest.mark.parametrize(
    "options",
    [("--shape", "x"), ("--device", "tpu"), ("--repeats", "0"), ("--threads", "-1"),
     ("--backend", "torch"),
     ("--peers", "x"), ("--backend", "no-such", "--shape", "8,8,8,2,1", "--repeats", "1")],
)  # fmt: skip
def test_bad_options_are_refused(options, capsys):
    assert bench(*options) == command.UNUSABLE
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_rows(dtype, save, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    options = ("--shape", "40,32,16,6,2", "--repeats", "2", "--save", save, "--dtype", dtype)
    assert bench(*options, "--json", str(path)) == 0
    rows = {row["impl"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert set(rows) == {peer.name for peer in ALL}
    ours = rows["penstock"]
    assert set(ours) == KEYS | OWN_KEYS
    assert ours["kept_bytes"] == ours["kept_bytes_formula"]
    assert ours["workspace_bytes"] == ours["workspace_bytes_formula"]
    assert ours["ratio_to"]["torch-loop"] == pytest.approx(
        rows["torch-loop"]["total_ms"] / ours["total_ms"]
    )
    assert set(rows["torch-loop"]) == KEYS
    assert set(rows["torch-grouped"]) == KEYS or "torch" in rows["torch-grouped"]["not_run"]
    assert "penstock" in capsys.readouterr().out


def wrong_forward(problem, tensors):
    """A layer that is right but for one factor."""
    return torch_loop.forward(problem, tensors) * 1.01


def test_a_wrong_peer_is_found_and_not_timed(monkeypatch, tmp_path):
    from penstock.bench import peers

    wrong = torch_loop.PEER._replace(name="wrong", forward=wrong_forward)
    problem = Problem(SMALL, "float32")
    found = verify(wrong, problem, make_tensors(problem))
    assert "float64" in found.problem
    assert found.rel_l2 > 5e-3

    monkeypatch.setattr(peers, "ALL", (wrong, penstock_engine.PEER))
    path = tmp_path / "rows.jsonl"
    code = bench("--shape", "40,32,16,6,2", "--repeats", "1", "--json", str(path))
    assert code == command.NOT_VERIFIED
    row = json.loads(path.read_text().splitlines()[0])
    assert row["verified"] is False
    assert "total_ms" not in row


def test_an_error_at_full_size_alone_is_found():
    def wrong_when_large(problem, tensors):
        output = torch_loop.forward(problem, tensors)
        return output if problem.shape.num_tokens < 200 else output * 1.01

    problem = Problem(SMALL._replace(num_tokens=200), "float32")
    peer = torch_loop.PEER._replace(forward=wrong_when_large)
    assert "torch loop" in verify(peer, problem, make_tensors(problem)).problem


def test_why_not_of_the_grouped_product():
    assert "multiples" in torch_grouped.why_not(Problem(SMALL._replace(hidden_size=33), "float32"))


def test_times_and_memory_of_a_peer_that_keeps_what_it_says():
    problem = Problem(SMALL, "float32")
    tensors = make_tensors(problem)
    memory = measure_memory(torch_loop.PEER, problem, tensors)
    ours = measure_memory(penstock_engine.PEER, problem, tensors)
    assert memory.kept_bytes > ours.kept_bytes > 0
    times = time_peers([torch_loop.PEER], problem, tensors, 3)["torch-loop"]
    assert 0 < times.low_ms <= times.total_ms <= times.high_ms
