# SPDX-License-Identifier: Apache-2.0
"""Hostile cases 1 to 7 on the GPU: how many tokens, experts, choices; their load.

The CPU's tests of the same numbers are in tests/python/cases; sizes are rounded up to the multiples
of 8 that the backend takes.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from case_layer import make_layer, parameters
from doors import CudaDoor, case, check_statement
from gpu_layer import layer_of, make_inputs, sized

import penstock
from penstock import functional


@case(1, "cuda")
def test_case_01_no_tokens(dtype) -> None:
    layer = layer_of(1, dtype)
    results = CudaDoor.run(layer)
    assert tuple(results["output"].shape) == tuple(results["dx"].shape) == (0, layer.shape[1])
    assert not any(any(CudaDoor.bits(results[name])) for name in ("dw1", "dw2", "db1", "db2"))
    module = penstock.MoE(16, 8, 4, 2, device="cuda", dtype=torch.bfloat16)
    module(torch.empty(0, 16, device="cuda", dtype=torch.bfloat16)).sum().backward()
    assert all(not parameter.grad.any() for parameter in module.parameters())


def check_idle(layer, results: dict) -> None:
    """Gradients of experts that no slot names are exact zeros."""
    for expert in set(range(layer.shape[3])) - set(layer.ids.reshape(-1).tolist()):
        for name in ("dw1", "dw2", "db1", "db2"):
            assert not any(CudaDoor.bits(results[name][expert])), f"{name} of expert {expert}"


@case(2, "cuda")
@pytest.mark.parametrize("empty", ["first", "last", "middle", "all_but_two"])
def test_case_02_empty_experts(dtype, empty) -> None:
    layer = layer_of(2, dtype)
    live = [e for e in range(layer.shape[3]) if e not in parameters(2)[f"empty_{empty}"]]
    index = np.arange(layer.ids.shape[0])[:, None] + np.arange(layer.ids.shape[1])
    layer.ids = np.array(live, np.int32)[index % len(live)]
    check_idle(layer, check_statement(CudaDoor, layer))


@case(2, "cuda")
def test_case_02_random_steps() -> None:
    """Each step's idle experts have exact zeros and all is finite; looked at on the GPU."""
    layer = layer_of(2)
    inputs = CudaDoor.inputs(layer)
    num_experts = layer.shape[3]
    random = np.random.default_rng(3)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(parameters(2)["random_steps"]):
        spread = random.integers(1, num_experts)
        ids = random.integers(0, spread, layer.ids.shape).astype(np.int32)
        ids[:, 1] = spread
        inputs["ids"] = CudaDoor.ids(ids)
        idle = torch.from_numpy(~np.isin(np.arange(num_experts), ids)).cuda()
        results = CudaDoor.run_inputs(inputs, layer)
        for value in results.values():
            bad += (~torch.isfinite(value)).sum()
        for name in ("dw1", "dw2", "db1", "db2"):
            bad += (results[name][idle] != 0).sum()
    assert bad.item() == 0


@case(3, "cuda")
@pytest.mark.parametrize("shape", [parameters(3)["shape"], [1500, 64, 48, 16, 1]], ids=str)
def test_case_03_one_hot_expert(dtype, shape) -> None:
    layer = make_layer(sized(shape), dtype)
    layer.ids = np.full_like(layer.ids, parameters(3)["hot_expert"])
    with penstock.testing.watch_workspaces() as log:
        check_statement(CudaDoor, layer)
    formulas = [
        functional.workspace_bytes(layer.shape, which, dtype=dtype, device="cuda")
        for which in ("forward", "backward")
    ]
    assert set(formulas) <= set(log.sizes) and log.peak_bytes == max(log.sizes)


@case(4, "cuda")
@pytest.mark.parametrize("which", ["shape", "one_expert_shape"])
def test_case_04_few_tokens_and_tile_edges(dtype, which) -> None:
    for num_tokens in (*parameters(4)["num_tokens"], 255, 256, 257):
        check_statement(CudaDoor, make_layer(sized((num_tokens, *parameters(4)[which][1:])), dtype))


@case(5, "cuda")
@pytest.mark.parametrize("shape", [*parameters(5)["shapes"], [7, 8, 8, 8192, 64]], ids=str)
def test_case_05_experts_and_choices(dtype, shape) -> None:
    layer = make_layer(sized(shape), dtype)
    num_tokens, _, _, num_experts, top_k = shape
    logits = np.random.default_rng(2).integers(0, 97, (num_tokens, num_experts)) / 8.0  # has ties
    scores, ids = CudaDoor.route(logits, top_k, "softmax_topk", "float32")
    assert (ids == np.argsort(-logits, axis=1, kind="stable")[:, :top_k]).all()
    check_statement(CudaDoor, layer.with_(scores=scores.astype(np.float64), ids=ids))


@case(6, "cuda")
@pytest.mark.skipif("PENSTOCK_LARGE" not in os.environ, reason="needs 40 GiB: set PENSTOCK_LARGE=1")
@pytest.mark.parametrize("which", ["h_shape", "y_shape"])
@pytest.mark.parametrize("times", [1, 2], ids=["past 2^31", "past 2^32"])
def test_case_06_more_elements_than_32_bits_count(which, times) -> None:
    """The last tokens of a huge call have the bits that they have alone, backward included."""
    num_tokens, d, n, num_experts, top_k = parameters(6)[which]
    num_tokens *= times
    assert num_tokens * top_k * max(d, 2 * n) > times * parameters(6)["elements"]
    inputs = make_inputs((num_tokens, d, n, num_experts, top_k), "bfloat16")
    ids = torch.arange(num_tokens * top_k, dtype=torch.int32, device="cuda") % num_experts
    last = slice(num_tokens - parameters(6)["checked_rows"], None)

    def run(tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs["x"].detach()[tokens].clone().requires_grad_()
        chosen = ids.view(num_tokens, top_k)[tokens].clone()
        scores = torch.full(chosen.shape, 0.5, device="cuda")
        output = functional.moe_experts(
            x, inputs["w1"].detach(), inputs["w2"].detach(), scores, chosen
        )
        (dx,) = torch.autograd.grad(output, x, inputs["d_output"][tokens])
        return output.detach(), dx

    everything, alone = run(slice(0, num_tokens)), run(last)
    for got, want in zip(everything, alone, strict=True):
        assert torch.equal(got[last], want)


@case(7, "cuda")
def test_case_07_too_many_slots() -> None:
    values = parameters(7)
    ids = torch.zeros(1, dtype=torch.int32, device="cuda")
    ids = ids.expand(values["num_tokens"] * values["top_k"])
    routing = penstock.Routing(None, ids, values["num_tokens"], values["top_k"])
    with pytest.raises(ValueError, match=str(values["limit"])):
        functional.make_plan(routing, values["num_experts"])
