# SPDX-License-Identifier: Apache-2.0
"""Hostile cases 8 to 12 through NumPy and torch: values that are no numbers, ids that name no
expert, garbage in memory, strange routing weights.

C++ twins are in tests/cpp/hostile/value_cases.cpp.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from case_layer import accumulator, make_layer, parameters
from doors import EVERY_KIND, TorchDoor, case, check_same_bits, check_statement

import penstock
from penstock import functional
from penstock.routing import SOFTMAX_ROUTERS

every_kind = pytest.mark.parametrize(("backend", "dtype"), EVERY_KIND)


@case(8, "numpy", "torch")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@every_kind
def test_case_08_one_bad_token(door, backend, dtype, bad) -> None:
    values = parameters(8)
    token = values["token"]
    clean = make_layer(values["shape"], dtype)
    x = clean.x.copy()
    x[token, 3] = bad
    with penstock.backend(backend):
        expected, got = door.run(clean), door.run(clean.with_(x=x))
    others = np.arange(clean.shape[0]) != token
    for name in ("output", "dx", "dscores"):
        assert door.bits(got[name][others]) == door.bits(expected[name][others]), name
    assert not np.isfinite(door.as_float64(got["output"])[token]).all()
    touched = set(clean.ids[token].tolist())
    for expert in range(clean.shape[3]):
        if expert in touched:
            assert not np.isfinite(door.as_float64(got["dw1"])[expert]).all()
            continue
        for name in ("dw1", "dw2", "db1", "db2"):
            assert door.bits(got[name][expert]) == door.bits(expected[name][expert]), name


@case(8, "torch")
def test_case_08_a_bad_token_in_a_module_gets_valid_experts() -> None:
    torch.manual_seed(0)
    layer = penstock.MoE(16, 8, 6, 2)
    x = torch.randn(5, 16)
    x[2] = float("nan")
    _, routing = layer.route(x)
    _, ids = routing.topk()
    assert ids[2].tolist() == [0, 1]
    assert torch.isfinite(layer(x)[[0, 1, 3, 4]]).all()


@case(9, "numpy", "torch")
@pytest.mark.parametrize("router", SOFTMAX_ROUTERS)
@every_kind
def test_case_09_strange_logits(door, backend, dtype, router) -> None:
    num_tokens, _, _, num_experts, top_k = parameters(9)["shape"]
    logits = np.full((num_tokens, num_experts), 0.25)  # token 4: all equal
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2] = -np.arange(num_experts, dtype=np.float64)
    logits[2, 0] = np.nan
    logits[3] = np.nan
    logits[3, 6] = 1.0
    with penstock.backend(backend):
        scores, ids = door.route(logits, top_k, router, accumulator(dtype))
    assert np.asarray(ids).tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [6, 0, 1], [0, 1, 2]]
    assert np.isnan(scores[0]).all()
    assert np.isnan(scores[1]).all()
    assert np.isnan(scores[2]).all() == (router != "softmax_topk")
    assert np.isnan(scores[3]).all()
    equal = 1 / num_experts if router == "topk_softmax" else 1 / top_k
    assert np.allclose(scores[4], equal, rtol=1e-6)


@case(10, "numpy", "torch")
@every_kind
def test_case_10_garbage_in_memory(door, backend, dtype, monkeypatch) -> None:
    """Every output and workspace of the front-end starts as one byte; the bits must not show it."""
    values = parameters(10)
    layer = make_layer(values["shape"], dtype)
    layer.ids.reshape(-1)[:: values["skipped_every"]] = -1
    from penstock import _arrays

    arrays = _arrays.TorchArrays if door is TorchDoor else _arrays.NumpyArrays
    real_empty, real_workspace = arrays.empty, arrays.workspace
    runs = []
    for poison in values["poisons"]:

        def fill(memory, poison=poison):
            view = memory.view(torch.uint8) if door is TorchDoor else memory.view(np.uint8)
            view[...] = poison
            return memory

        monkeypatch.setattr(arrays, "empty", lambda *a, fill=fill: fill(real_empty(*a)))
        monkeypatch.setattr(arrays, "workspace", lambda *a, fill=fill: fill(real_workspace(*a)))
        with penstock.backend(backend):
            runs.append(check_statement(door, layer))
    for results in runs[1:]:
        check_same_bits(door, results, runs[0])


@case(11, "numpy", "torch")
@pytest.mark.parametrize("integer", [np.int32, np.int64], ids=["int32", "int64"])
@every_kind
def test_case_11_ids_that_skip(door, backend, dtype, integer) -> None:
    layer = make_layer(parameters(11)["shape"], dtype)
    num_experts = layer.shape[3]
    ids = layer.ids.astype(integer)
    ids[:4, 0] = [-1, num_experts, num_experts + 1, np.iinfo(integer).max]
    ids[4] = -1
    ids[5, 0], ids[6, 0] = -2, np.iinfo(integer).min  # unchecked: skipped as well
    ids[7, 1] = ids[7, 0]  # unchecked: one more row
    layer = layer.with_(ids=ids)
    with penstock.backend(backend):
        results = check_statement(door, layer)
    skipped = (ids < 0) | (ids >= num_experts)
    assert not door.as_float64(results["dscores"]).reshape(ids.shape)[skipped].any()


@case(11, "numpy", "torch")
def test_case_11_checked_ids_are_refused(door) -> None:
    layer = make_layer(parameters(11)["shape"], "float32")
    negative, duplicate, skipping = (layer.ids.copy() for _ in range(3))
    negative[5, 0] = -2
    duplicate[7, 1] = duplicate[7, 0]
    skipping[4, :2] = -1  # twice -1 is not a duplicate
    with penstock.backend(id_checks="checked"):
        with pytest.raises(ValueError, match=r"-2(.|\n)*token 5|token 5(.|\n)*-2"):
            door.run(layer.with_(ids=negative))
        with pytest.raises(ValueError, match="token 7"):
            door.run(layer.with_(ids=duplicate))
        check_statement(door, layer.with_(ids=skipping))


@case(12, "numpy", "torch")
@every_kind
def test_case_12_routing_weights(door, backend, dtype) -> None:
    layer = make_layer(parameters(12)["shape"], dtype)
    tiny = 2.0**-1070 if dtype == "float64" else 2.0**-140
    scores = layer.scores.copy()
    pairs = [(0, 0), (-1.5, 0.5), (1, -1), (tiny, tiny), (-0.0, 2), (-tiny, 1), (100, -100)]
    scores[: len(pairs)] = pairs
    with penstock.backend(backend):
        results = check_statement(door, layer.with_(scores=scores))
        plain = door.run(layer.with_(scores=np.ones_like(scores)))
    # dS does not depend on the scores, so a zero, tiny or huge one must not change its bits.
    assert door.bits(results["dscores"]) == door.bits(plain["dscores"])


@case(12, "torch")
def test_case_12_gradient_where_the_score_is_zero() -> None:
    """By finite differences of the output, which is linear in the scores."""
    layer = make_layer(parameters(12)["shape"], "float64")
    inputs = TorchDoor.inputs(layer.with_(scores=np.zeros_like(layer.scores)))
    results = TorchDoor.run_inputs(inputs, layer)
    for token, choice in ((0, 0), (7, 1)):
        scores = torch.zeros_like(inputs["scores"])
        scores[token, choice] = 1.0
        output = functional.moe_experts(
            inputs["x"], inputs["w1"], inputs["w2"], scores, inputs["ids"],
            b1=inputs["b1"], b2=inputs["b2"],
        )  # fmt: skip
        slope = (output * inputs["d_output"]).sum()
        assert torch.allclose(results["dscores"][token, choice], slope, rtol=1e-12)
