# SPDX-License-Identifier: Apache-2.0
"""penstock bench on a GPU, as far as a CPU can show it: rows from stubbed clocks, the arithmetic of
samples, launches and ratios, loads, peers' layouts, the picture.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import weakref
from collections import Counter
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from penstock.bench import command
from penstock.bench.gpu import bench, clock, launches, plot, report, skew, start, yardstick
from penstock.bench.gpu.ceilings import Ceilings
from penstock.bench.gpu.formulas import Work, bytes_of_experts, work_of_launches
from penstock.bench.gpu.memory import Memory
from penstock.bench.gpu.runs import Replay
from penstock.bench.peers import by_name, own_layout, penstock_engine, torch_loop
from penstock.bench.problem import Problem, Tensors, cast, make_tensors
from penstock.bench.shapes import Shape, known_shapes
from penstock.bench.verify import verify

SMALL = Shape("small", 40, 32, 16, 6, 2)
CEILINGS = Ceilings(800.0, 4000.0, 3000.0)
FACTS = {"cpu": "a", "threads": 1, "torch": "b", "commit": "c", "gpu": "d", "driver": "e",
         "ceilings": CEILINGS._asdict(), "start": {"imports_s": 1.0, "context_s": 0.5}}  # fmt: skip
SESSION = bench.Session(FACTS, CEILINGS, rounds=5, load="uniform")


@pytest.fixture
def stubs(monkeypatch):
    """A clock that runs every action once, a graph that is not one, an allocator that counts."""

    def time_once(actions, rounds):
        assert rounds == SESSION.rounds
        for action in actions.values():
            action()
        return {
            name: clock.Summary(1.0 if name.endswith("forward") else 4.0, 0.5, 4.5)
            for name in actions
        }

    def count(forward, backward):
        gradients = backward(forward())
        return Memory(100, 1000, sum(gradient.nbytes for gradient in gradients))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "time_in_turn", time_once)
    monkeypatch.setattr(bench, "measure_memory", count)
    monkeypatch.setattr(bench, "Replay", lambda action: action)
    monkeypatch.setattr("penstock.bench.gpu.runs.Replay", lambda action: action)


def test_rows_of_a_shape(stubs):
    problem = Problem(SMALL, "float32")
    rows = bench.bench_shape(problem, [penstock_engine.PEER, torch_loop.PEER], SESSION)
    ours, loop, yard = rows
    assert [row["impl"] for row in rows] == ["penstock", "torch-loop", "cublas"]
    assert (ours["timed"], loop["timed"]) == ("graph", "eager")
    assert ours["verified"] and loop["verified"] and "verified" not in yard
    assert (ours["forward_ms"], ours["backward_ms"], ours["total_ms"]) == (1.0, 3.0, 4.0)
    assert ours["ratio_to"] == {"torch-loop": 1.0, "cublas": 1.0}
    assert ours["tflops"] == pytest.approx(18 * 80 * 16 * 32 / 4.0 * 1e-9)
    leaf_bytes = 4 * (40 * 32 + 6 * 32 + 6 * 32 * 32 + 6 * 32 * 16)
    assert ours["gradient_bytes"] == leaf_bytes
    assert ours["peak_beyond_results"] == 1000 - leaf_bytes
    assert ours["kept_bytes_formula"] > 0 and "kept_bytes_formula" not in loop
    text = "\n".join(report.shape_lines(rows))
    assert "torch-loop" in text and "1.000" in text


def test_a_wrong_peer_gets_no_figures(stubs):
    def wrong(problem, tensors):
        return torch_loop.forward(problem, tensors) * 1.01

    peers = [torch_loop.PEER._replace(name="wrong", forward=wrong)]
    row, yard = bench.bench_shape(Problem(SMALL, "float32"), peers, SESSION)
    assert row["verified"] is False and "total_ms" not in row and "total_ms" in yard
    assert any("wrong" in line for line in report.shape_lines([row, yard])[3:])


def test_a_replay_keeps_no_graph_of_autograd(monkeypatch):
    """Kept, it would bind the leaves' gradients to the capture's stream in every later step."""
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    leaf, outputs = torch.ones(3, requires_grad=True), []

    def forward():
        output = leaf * 2
        outputs.append(weakref.ref(output))
        return output

    replay = Replay(forward)
    gc.collect()
    assert len(outputs) == 3 and not any(output() is not None for output in outputs)
    replay()
    assert len(outputs) == 3


def test_rows_of_decoding(stubs):
    problem = Problem(SMALL._replace(num_tokens=2), "float32")
    (row,) = bench.bench_forward(problem, [penstock_engine.PEER], SESSION)
    assert row["pass"] == "forward" and 2 <= row["experts_touched"] <= 4
    expected = row["experts_touched"] * 3 * 16 * 32 * 4 + 6 * 32 * 4 + 2 * 32 * 4
    assert row["bytes_touched"] == expected
    assert row["bound_ms"] == pytest.approx(expected / 3000e6)
    assert "penstock" in report.forward_lines([row])[2]


def test_the_median_and_the_quartiles():
    assert clock.summary([5.0, 1.0, 3.0]) == clock.Summary(3.0, 1.0, 5.0)
    assert clock.summary([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == clock.Summary(4.5, 3.0, 6.0)


def test_everyone_follows_everyone_about_equally_often():
    names = ["a", "b", "c"]
    orders = [clock.order_of(names, i) for i in range(300)]
    assert all(sorted(order) == names for order in orders)
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(follows) == 6 and max(follows.values()) < 1.5 * min(follows.values())
    assert clock.order_of(names, 7) == clock.order_of(names, 7)


GEMM = "void penstock::cuda::grouped_gemm<penstock::cuda::Gemm<Tile<bf16, 128, 256>, {}> >(Params)"
KERNELS = [
    GEMM.format("GatheredRows, StoreWideEpilogue<Tile<bf16>, 0>"),
    "void penstock::cuda::(anonymous namespace)::warp_router_kernel<16>(RouterParams)",
    "void penstock::cuda::(anonymous namespace)::plan_count_kernel<FewExperts, int>(PlanParams)",
    GEMM.format("GatheredRows, UpEpilogue<Tile<bf16>, 1>"),
    GEMM.format("ContiguousRows, StoreEpilogue<Tile<bf16>>"),
    "void penstock::cuda::(anonymous namespace)::combine_kernel<__nv_bfloat16>(CombineParams)",
    GEMM.format("GatheredRows, DownBackwardEpilogue<Tile<bf16>, 1>"),
    "void penstock::cuda::(anonymous namespace)::score_gradient_kernel<bf16>(ScoreParams)",
    GEMM.format("GatheredColumns, WeightGradientEpilogue<Tile<bf16>>"),
    GEMM.format("ContiguousRows, StoreEpilogue<Tile<bf16>>"),
    GEMM.format("GatheredColumns, WeightGradientEpilogue<Tile<bf16>>"),
    "void penstock::cuda::(anonymous namespace)::combine_kernel<__nv_bfloat16>(CombineParams)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)",
]


def test_kernels_are_named_by_what_they_are_and_what_came_before():
    assert launches.launch_names(KERNELS) == [
        "logits", "top-k", "plan", "up-projection", "down-projection", "combine", "dH", "dS", "dW2",
        "dX rows", "dW1", "dX combine", "vectorized_elementwise_kernel",
    ]  # fmt: skip
    assert launches.count_passes(launches.launch_names(KERNELS)) == (6, 7)
    with_router = [*KERNELS, KERNELS[10]]
    assert launches.launch_names(with_router)[-1] == "router's dX and dWr"
    only_one = [KERNELS[6], KERNELS[8]]
    assert launches.launch_names(only_one) == ["dH", "dW1 and dW2"]


def test_rates_against_the_ceilings():
    found = [launches.Launch("a", "k", 10.0), launches.Launch("b", "k", 4.0)]
    found.append(launches.Launch("a", "k", 10.0))
    work = {"a": Work(8e9, 1e6)}
    first, second = launches.rates(found, work, CEILINGS)
    assert (first.name, first.count, first.microseconds) == ("a", 2, 20.0)
    assert first.tflops == pytest.approx(400.0) and first.share_of_ceiling == pytest.approx(0.5)
    assert second.share_of_ceiling != second.share_of_ceiling  # not known
    row = {"shape": {**dict.fromkeys("TdnEK", 1), "name": "s"}, "dtype": "x", "load": "uniform"}
    row |= {"save": "input", "forward_launches": 1, "backward_launches": 2}
    row["launches"] = report.as_launch_rows([first, second])
    assert json.loads(json.dumps(row))["launches"][1]["share_of_ceiling"] is None
    assert "50" in report.profile_lines(row)[2]


def test_the_formulas_add_up_to_the_layers_work():
    shape = known_shapes()["7B-n256"]
    work = work_of_launches(shape, 2)
    products = ("up-projection", "down-projection", "dH", "dW2", "dX rows", "dW1")
    assert sum(work[name].flop for name in products) == sum(shape.flops)
    assert work["dW1 and dW2"].flop == work["dW1"].flop + work["dW2"].flop
    rows = 24576 * 8
    assert work["down-projection"].num_bytes == 2 * (rows * 256 + 128 * 256 * 1536 + rows * 1536)
    touched = bytes_of_experts(shape, 3, 2)
    assert touched == 2 * (3 * 3 * 256 * 1536 + 128 * 1536 + 24576 * 1536)


def test_the_yardstick_does_the_six_products_of_equal_groups():
    problem = Problem(SMALL, "float32")
    yard = yardstick.Yardstick(problem, make_tensors(problem))
    shapes = [tuple(product.shape) for product in yard.step()]
    rows = 14  # 40 * 2 / 6, rounded up
    assert shapes == [(6, rows, 32), (6, rows, 32), (6, rows, 16), (6, 32, 16), (6, rows, 32),
                      (6, 32, 32)]  # fmt: skip
    flop = sum(2 * product.numel() * inner for product, inner in zip(
        yard.step(), (32, 16, 32, rows, 32, rows), strict=True))  # fmt: skip
    assert flop == sum(SMALL._replace(num_tokens=rows * 6 // 2).flops)


@pytest.mark.parametrize("load", ["zipf", "hot"])
def test_loads_are_what_the_router_then_chooses(load):
    problem = Problem(Shape("s", 4000, 32, 16, 16, 2), "float32")
    tensors = skew.with_load(problem, make_tensors(problem), load)
    logits = (tensors.x @ tensors.router_weight.t()).detach()
    counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=16)
    if load == "hot":
        assert counts.tolist() == [4000, 4000] + [0] * 14
    else:
        assert counts[0] > 1.5 * counts[3] > 0 and counts[3] > 2 * counts[15] > 0
    assert verify(torch_loop.PEER, problem, tensors).problem == ""


def test_a_load_needs_room_for_its_logits():
    problem = Problem(Shape("s", 8, 8, 8, 16, 2), "float32")
    with pytest.raises(ValueError, match="--load zipf"):
        skew.with_load(problem, make_tensors(problem), "zipf")


def test_a_peer_with_weights_in_its_own_layout():
    """A loop that wants gate and up interleaved is verified by its gradients in our layout."""
    leaves = own_layout.OwnLeaves(
        lambda weights: (weights[0], own_layout.interleaved(weights[1]), weights[2]),
        lambda weights: (weights[0], own_layout.concatenated(weights[1]), weights[2]),
    )

    def forward(problem, tensors):
        x, router_weight, w1, w2 = leaves.of(tensors)
        ours = Tensors(x, router_weight, own_layout.concatenated(w1), w2, tensors.d_output)
        return torch_loop.forward(problem, ours)

    peer = torch_loop.PEER._replace(
        forward=forward, leaves=leaves.of, in_our_layout=leaves.in_our_layout
    )
    problem = Problem(SMALL, "float32")
    tensors = make_tensors(problem)
    assert verify(peer, problem, tensors).problem == ""
    assert verify(peer._replace(in_our_layout=lambda grads: grads), problem, tensors).problem
    assert leaves.of(tensors)[2] is leaves.of(tensors)[2]
    assert leaves.of(cast(tensors, torch.float64))[2].dtype == torch.float64
    swapped = own_layout.halves_swapped(tensors.w1)
    assert torch.equal(swapped[:, :16], tensors.w1[:, 16:])


def test_peers_for_gpus_say_why_not_on_a_cpu():
    for name in ("sonicmoe", "scattermoe", "momoe"):
        assert "GPU" in by_name()[name].why_not(Problem(SMALL, "bfloat16"))
        on_gpu = Problem(SMALL, "bfloat16", "cuda")
        assert by_name()[name].why_not(on_gpu) == "not installed"


def test_the_time_since_the_process_began():
    first = start.seconds_of_process()
    assert 0 < first <= start.seconds_of_process() < 36000


def test_the_picture(tmp_path):
    def row(name, impl, total):
        return {"shape": {"name": name}, "impl": impl, "total_ms": total}

    rows = [row("s", "penstock", 3.0), row("s", "cublas", 2.0), row("t", "penstock", 1.0)]
    assert plot.ratios(rows) == {"penstock": {"s": 1.5}}
    path = tmp_path / "folder" / "bars.png"
    plot.write_png(path, rows, "caption")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--png"):
        plot.write_png(path, rows[:1], "caption")


def parsed(*options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(options)


def test_options(capsys):
    assert parsed("--tokens", "1,8").tokens == (1, 8)
    with pytest.raises(SystemExit):
        parsed("--tokens", "0")
    if not torch.cuda.is_available():
        assert command.run(parsed("--device", "cuda")) == command.UNUSABLE
        assert "torch sees no GPU" in capsys.readouterr().err
