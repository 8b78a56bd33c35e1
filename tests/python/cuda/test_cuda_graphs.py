# SPDX-License-Identifier: Apache-2.0
"""Forward and backward as one CUDA graph: captured once, replayed with new inputs and a new routing
each time, with the bits of the eager call (hostile case 19).
"""

from __future__ import annotations

import pytest
import torch
from case_layer import parameters
from doors import case
from gpu_layer import forward, gradients, leaves_of, make_inputs, other_bits, step

import penstock
from penstock import functional

SHAPES = [[200, 64, 48, 12, 3], [3, 128, 64, 24, 2], [777, 256, 128, 9, 2]]


def captured(inputs, run):
    """The graph of `run(inputs)`, and the results that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(inputs)
    return graph, results


def refill(inputs, shape, *, seed: int, idle: int) -> None:
    """New values in place; the first `idle` experts are so unlikely that no token takes them."""
    fresh = make_inputs(shape, str(inputs["x"].dtype).removeprefix("torch."), seed=seed)
    with torch.no_grad():
        fresh["x"][:, 0] = 8.0
        fresh["router_weight"][:, 0] = 1.0
        fresh["router_weight"][: min(idle, shape[3] - shape[4]), 0] = -8.0
        for name, values in fresh.items():
            inputs[name].copy_(values)


def busy_experts(inputs, top_k: int) -> list[int]:
    """The experts that get any token."""
    with torch.no_grad():
        logits = functional.router_logits(inputs["x"], inputs["router_weight"])
        return functional.route(logits, top_k).ids.unique().tolist()


@case(19, "cuda")
@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_case_19_replays_have_the_bits_of_eager_calls(shape, save, dtype) -> None:
    top_k = shape[4]
    inputs = make_inputs(shape, dtype)

    def run(tensors):
        return step(tensors, top_k, save=save)

    graph, results = captured(inputs, run)
    loads = set()
    for replay in range(parameters(19)["replays"]):
        refill(inputs, shape, seed=replay + 1, idle=replay % shape[3])
        graph.replay()
        got = {name: value.clone() for name, value in results.items()}
        expected = run(inputs)
        assert not (wrong := other_bits(got, expected)), f"replay {replay}: {wrong}"
        loads.add(tuple(busy_experts(inputs, shape[4])))
    assert len(loads) > 2, "the load never changed"


@case(19, "cuda")
def test_case_19_many_replays_of_a_small_step() -> None:
    """The declared number of replays without a look at each: the last has the eager bits."""
    shape = SHAPES[0]
    inputs = make_inputs(shape, "bfloat16")
    graph, results = captured(inputs, lambda tensors: step(tensors, shape[4]))
    for replay in range(parameters(19)["many_replays"]):
        if replay % 100 == 0:
            refill(inputs, shape, seed=replay, idle=replay // 100)
        graph.replay()
    got = {name: value.clone() for name, value in results.items()}
    assert not other_bits(got, step(inputs, shape[4]))


@case(19, "cuda")
def test_case_19_the_first_call_of_a_shape_may_be_captured() -> None:
    """Nothing is set up at a shape's first call, so a capture needs no warm-up of ours.

    torch's own set-up (the autograd thread's stream, cuBLAS) is not part of such a call.
    """
    warm = make_inputs([40, 64, 40, 6, 2], "bfloat16")
    step(warm, 2)  # torch's set-up
    shape = [123, 72, 56, 11, 3]
    inputs = make_inputs(shape, "bfloat16")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = step(inputs, shape[4])
    graph.replay()
    got = {name: value.clone() for name, value in results.items()}
    assert not other_bits(got, step(inputs, shape[4]))


def test_a_module_is_captured_with_its_losses() -> None:
    torch.manual_seed(0)
    layer = penstock.MoE(
        64, 48, 8, 2, bias=True, shared_intermediate_size=16, device="cuda", dtype=torch.bfloat16
    )
    x = torch.randn(90, 64, device="cuda", dtype=torch.bfloat16)
    parameters_of = list(layer.parameters())

    def run(tensors):
        y = layer(tensors["x"])
        loss = y.float().square().mean() + layer.stats.aux_loss + layer.stats.z_loss
        grads = torch.autograd.grad(loss, parameters_of)
        return {"y": y.detach()} | {f"grad {i}": grad for i, grad in enumerate(grads)}

    inputs = {"x": x}
    graph, results = captured(inputs, run)
    for seed in range(5):
        generator = torch.Generator("cuda").manual_seed(seed)
        x.normal_(generator=generator)
        graph.replay()
        got = {name: value.clone() for name, value in results.items()}
        assert not other_bits(got, run(inputs))


def test_a_captured_forward_for_inference() -> None:
    shape = [5, 64, 48, 12, 3]
    inputs = make_inputs(shape, "bfloat16")

    def run(tensors):
        with torch.no_grad():
            return {"output": forward(tensors, shape[4])}

    graph, results = captured(inputs, run)
    for seed in range(20):
        refill(inputs, shape, seed=seed, idle=seed % 9)
        graph.replay()
        assert torch.equal(results["output"], run(inputs)["output"])


def test_backward_alone_may_be_captured() -> None:
    """Forward outside, backward inside: what is kept is read where it lies."""
    shape = SHAPES[0]
    inputs = make_inputs(shape, "bfloat16")
    expected = step(inputs, shape[4])
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):  # autograd runs a backward pass on its forward pass's stream
        output = forward(inputs, shape[4])
        leaves = list(leaves_of(inputs).values())
        torch.autograd.grad(output, leaves, inputs["d_output"], retain_graph=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = gradients(output, inputs)
    graph.replay()
    assert not other_bits(results, expected)
