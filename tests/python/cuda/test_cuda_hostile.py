# SPDX-License-Identifier: Apache-2.0
"""Hostile cases 8 to 34 on the GPU: values, memory, state.

Cases 1 to 7 are in test_cuda_hostile_load.py, those of streams and graphs (18, 19, 20, 25) in files
of their own.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import plain
import pytest
import torch
from case_layer import bound_for, parameters, relative_l2, statement
from doors import CudaDoor, case, check_same_bits, check_statement
from gpu_layer import layer_of, make_inputs, other_bits, sized, step

import penstock
from penstock import functional
from penstock.bench.self_check import self_check


@case(8, "cuda")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_case_08_one_bad_token(dtype, bad) -> None:
    clean = layer_of(8, dtype)
    token = parameters(8)["token"]
    x = clean.x.copy()
    x[token, 3] = bad
    expected, got = CudaDoor.run(clean), CudaDoor.run(clean.with_(x=x))
    others = torch.arange(clean.shape[0], device="cuda") != token
    for name in ("output", "dx", "dscores"):
        assert CudaDoor.bits(got[name][others]) == CudaDoor.bits(expected[name][others]), name
    assert not torch.isfinite(got["output"][token]).all()
    touched = set(clean.ids[token].tolist())
    for expert in range(clean.shape[3]):
        if expert in touched:
            assert not torch.isfinite(got["dw1"][expert]).all()
            continue
        for name in ("dw1", "dw2", "db1", "db2"):
            assert CudaDoor.bits(got[name][expert]) == CudaDoor.bits(expected[name][expert]), name


@case(9, "cuda")
@pytest.mark.parametrize("router", plain.ROUTERS)
def test_case_09_strange_logits(router) -> None:
    """The CPU's choice and scores, whatever the logits hold."""
    num_tokens, _, _, num_experts, top_k = parameters(9)["shape"]
    logits = np.full((num_tokens, num_experts), 0.25)  # token 4: all equal
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2] = -np.arange(num_experts, dtype=np.float64)
    logits[2, 0] = np.nan
    logits[3] = np.nan
    logits[3, 6] = 1.0
    scores, ids = CudaDoor.route(logits, top_k, router, "float32")
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [6, 0, 1], [0, 1, 2]]
    assert np.isnan(scores[[0, 1, 3]]).all()
    assert np.isnan(scores[2]).all() == (router != "softmax_topk")
    equal = 1 / num_experts if router == "topk_softmax" else 1 / top_k
    assert np.allclose(scores[4], equal, rtol=1e-6)


@case(10, "cuda")
def test_case_10_garbage_in_memory(dtype, monkeypatch) -> None:
    """Every output and workspace of the front-end starts as one byte; the bits must not show it."""
    layer = layer_of(10, dtype)
    layer.ids.reshape(-1)[:: parameters(10)["skipped_every"]] = -1
    from penstock._arrays import TorchArrays

    real_empty, real_workspace = TorchArrays.empty, TorchArrays.workspace
    runs = []
    for poison in parameters(10)["poisons"]:

        def fill(memory, poison=poison):
            memory.view(torch.uint8)[...] = poison
            return memory

        monkeypatch.setattr(TorchArrays, "empty", lambda *a, fill=fill: fill(real_empty(*a)))
        monkeypatch.setattr(
            TorchArrays, "workspace", lambda *a, fill=fill: fill(real_workspace(*a))
        )
        runs.append(check_statement(CudaDoor, layer))
    for results in runs[1:]:
        check_same_bits(CudaDoor, results, runs[0])


@case(11, "cuda")
@pytest.mark.parametrize("integer", [np.int32, np.int64], ids=["int32", "int64"])
def test_case_11_ids_that_skip(dtype, integer) -> None:
    layer = layer_of(11, dtype)
    num_experts = layer.shape[3]
    ids = layer.ids.astype(integer)
    ids[:4, 0] = [-1, num_experts, num_experts + 1, np.iinfo(integer).max]
    ids[4] = -1
    ids[5, 0], ids[6, 0] = -2, np.iinfo(integer).min
    ids[7, 1] = ids[7, 0]
    layer = layer.with_(ids=ids)
    results = check_statement(CudaDoor, layer)
    skipped = (ids < 0) | (ids >= num_experts)
    assert not CudaDoor.as_float64(results["dscores"]).reshape(ids.shape)[skipped].any()


@case(11, "cuda")
def test_case_11_checked_ids_need_the_host() -> None:
    with (
        penstock.backend(id_checks="checked"),
        pytest.raises(penstock.UnsupportedError, match="id_checks"),
    ):
        CudaDoor.run(layer_of(11))


@case(12, "cuda")
def test_case_12_routing_weights(dtype) -> None:
    layer = layer_of(12, dtype)
    tiny = 2.0**-140
    scores = layer.scores.copy()
    pairs = [(0, 0), (-1.5, 0.5), (1, -1), (tiny, tiny), (-0.0, 2), (-tiny, 1), (100, -100)]
    scores[: len(pairs)] = pairs
    results = check_statement(CudaDoor, layer.with_(scores=scores))
    ones = CudaDoor.run(layer.with_(scores=np.ones_like(scores)))
    assert CudaDoor.bits(results["dscores"]) == CudaDoor.bits(ones["dscores"])


def padded(tensor: torch.Tensor, offset: int, padding: int) -> torch.Tensor:
    """The same values as columns of a wider tensor that is NaN elsewhere."""
    rows, columns = tensor.shape
    wide = torch.full((rows, columns + padding), torch.nan, dtype=tensor.dtype, device="cuda")
    wide[:, offset : offset + columns] = tensor
    return wide[:, offset : offset + columns]


@case(13, "cuda")
def test_case_13_strided_x_and_weights(dtype) -> None:
    layer = layer_of(13, dtype)
    inputs = CudaDoor.inputs(layer)
    expected = CudaDoor.run_inputs(inputs, layer)
    sliced = {name: padded(inputs[name], 8, 24) for name in ("x", "d_output")}
    check_same_bits(CudaDoor, CudaDoor.run_inputs(inputs | sliced, layer), expected)
    across = {"x": inputs["x"].t().contiguous().t()}
    check_same_bits(CudaDoor, CudaDoor.run_inputs(inputs | across, layer), expected)
    for name in ("w1", "w2"):
        turned = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2)}
        check_statement(CudaDoor, layer, CudaDoor.run_inputs(inputs | turned, layer))
    every_second = {"w1": inputs["w1"].repeat_interleave(2, 0)[::2]}
    check_same_bits(CudaDoor, CudaDoor.run_inputs(inputs | every_second, layer), expected)
    one = inputs | {"x": inputs["x"][:1].expand(inputs["x"].shape)}
    packed = inputs | {"x": one["x"].contiguous()}
    check_same_bits(CudaDoor, CudaDoor.run_inputs(one, layer), CudaDoor.run_inputs(packed, layer))


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values at an address that is `offset` bytes past a 16-byte boundary."""
    raw = torch.zeros(tensor.nbytes + 16, dtype=torch.uint8, device="cuda")
    place = raw[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


@case(14, "cuda")
@pytest.mark.parametrize("offset", [2, 4, 8])
@pytest.mark.parametrize("name", ["x", "w1", "w2", "b1", "b2", "d_output"])
def test_case_14_pointers_off_alignment(name, offset, dtype) -> None:
    """The right bits, or an error that says what to do; never a fault."""
    layer = layer_of(13, dtype)
    inputs = CudaDoor.inputs(layer)
    expected = CudaDoor.run_inputs(inputs, layer)
    shifted = inputs | {name: moved(inputs[name], offset)}
    try:
        got = CudaDoor.run_inputs(shifted, layer)
    except (ValueError, penstock.UnsupportedError) as error:
        assert "align" in str(error)
    else:
        check_same_bits(CudaDoor, got, expected)
    torch.cuda.synchronize()


@case(15, "cuda")
def test_case_15_mixed_dtypes() -> None:
    layer = layer_of(15)
    inputs = CudaDoor.inputs(layer)
    for name in ("w1", "w2", "b1", "b2"):
        mixed = inputs | {name: inputs[name].float()}
        with pytest.raises(ValueError, match=rf"{name}(.|\n)*float32(.|\n)*bfloat16"):
            CudaDoor.run_inputs(mixed, layer)
    with pytest.raises(ValueError, match="scores"):
        CudaDoor.run_inputs(inputs | {"scores": inputs["scores"].half()}, layer)


@case(15, "cuda")
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_case_15_autocast(autocast) -> None:
    """An fp32 module has the bits of one whose experts are in the autocast dtype already."""
    torch.manual_seed(0)
    layer = penstock.MoE(64, 48, 8, 2, bias=True, device="cuda")
    x = torch.randn(30, 64, device="cuda").to(autocast)
    with torch.autocast("cuda", dtype=autocast):
        y = layer(x.float())
    assert y.dtype == autocast
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    cast = copy.deepcopy(layer)
    cast.experts.to(autocast)
    assert torch.equal(y, cast(x))


@case(16, "cuda")
@pytest.mark.parametrize("name", ["w1", "w2", "b1", "b2", "scores", "ids"])
def test_case_16_operands_on_different_devices(name) -> None:
    layer = layer_of(16)
    inputs = CudaDoor.inputs(layer)
    inputs[name] = inputs[name].cpu()
    with pytest.raises(ValueError, match=rf"{name}(.|\n)*cpu(.|\n)*cuda"):
        CudaDoor.forward(inputs, inputs["ids"], layer)


@case(16, "cuda")
def test_case_16_a_backend_of_the_other_device() -> None:
    layer = layer_of(16)
    with penstock.backend("fast"), pytest.raises(penstock.UnsupportedError, match="cuda"):
        CudaDoor.run(layer)


@case(21, "cuda")
def test_case_21_every_allocation_fails_once(monkeypatch) -> None:
    from test_hostile_memory import FailingAllocator

    layer = layer_of(21)
    expected = CudaDoor.run(layer)
    inputs = CudaDoor.inputs(layer)
    allocator = FailingAllocator(monkeypatch, CudaDoor)
    failures = 0
    for failing in range(200):
        allocator.remaining = failing
        try:
            CudaDoor.run_inputs(inputs, layer)
        except RuntimeError as error:
            failures += 1
            assert "cannot allocate" in str(error)
        allocator.remaining = -1
        check_same_bits(CudaDoor, CudaDoor.run_inputs(inputs, layer), expected)
        if failures == failing:
            break
    assert failures >= 8, "the allocations are not where the test thinks they are"


FAULT_BEFORE = """
import torch, penstock
layer = penstock.MoE(16, 8, 4, 2, device="cuda", dtype=torch.bfloat16)
x = torch.zeros(4, 16, device="cuda", dtype=torch.bfloat16)
layer(x)
torch.cuda.synchronize()
x[torch.full((1,), 99, device="cuda")] += 0  # a device-side assertion: the context is lost
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    with torch.no_grad():
        penstock.functional.router_logits(x, layer.router.weight)
except penstock.DeviceError as error:
    assert "before" in str(error), error
    print("told apart")
"""


@case(23, "cuda")
def test_case_23_a_fault_of_earlier_code_is_not_ours() -> None:
    """Memory that torch holds is handed out without asking the device, so the call reaches us."""
    child = subprocess.run(
        [sys.executable, "-c", FAULT_BEFORE], capture_output=True, text=True, timeout=300
    )
    lines = child.stdout.splitlines()
    assert "told apart" in lines or "device-side assert" in child.stderr, child.stderr[-2000:]


@case(26, "cuda")
def test_case_26_a_token_alone_and_in_a_batch(dtype) -> None:
    batch = layer_of(26, dtype)
    together = CudaDoor.run(batch)
    for t in parameters(26)["tokens"]:
        token = slice(t, t + 1)
        alone = CudaDoor.run(
            batch.with_(
                shape=(1, *batch.shape[1:]),
                x=batch.x[token],
                d_output=batch.d_output[token],
                scores=batch.scores[token],
                ids=batch.ids[token],
            )
        )
        for name in ("output", "dx", "dscores"):
            assert CudaDoor.bits(alone[name]) == CudaDoor.bits(together[name][token]), name


@case(27, "cuda")
def test_case_27_backward_twice_and_second_order() -> None:
    shape = sized(parameters(27)["shape"])
    inputs = make_inputs(shape, "bfloat16")
    x, weights = inputs["x"], (inputs["w1"], inputs["w2"])
    scores, ids = functional.route(torch.randn(shape[0], shape[3], device="cuda"), 2).topk()
    output = functional.moe_experts(x, *weights, scores, ids)
    leaves = [x, *weights]
    first = torch.autograd.grad(output, leaves, inputs["d_output"], retain_graph=True)
    second = torch.autograd.grad(output, leaves, inputs["d_output"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    output = functional.moe_experts(x, *weights, scores, ids)
    (dx,) = torch.autograd.grad(output, x, inputs["d_output"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        dx.sum().backward()


@case(28, "cuda")
def test_case_28_main_grad_and_frozen_experts(dtype) -> None:
    layer = layer_of(28, dtype)
    inputs = CudaDoor.inputs(layer)
    names = ("w1", "w2", "b1", "b2")
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "scores", *names)}
    for name in names:
        leaves[name].main_grad = torch.full(leaves[name].shape, 3.0, device="cuda")
    for _ in range(2):
        output = CudaDoor.forward(leaves, inputs["ids"], layer.with_(options={"main_grad": True}))
        output.backward(inputs["d_output"])
    expected = statement(layer)
    for name in names:
        want = 3.0 + 2.0 * expected[f"d{name}"]
        got = CudaDoor.as_float64(leaves[name].main_grad)
        assert relative_l2(got, want) <= bound_for(want.size, dtype), name
    trainable = torch.ones(layer.shape[3], dtype=torch.bool, device="cuda")
    trainable[parameters(28)["frozen"]] = False
    everyone = CudaDoor.run(layer)
    some = CudaDoor.run(layer.with_(options={"trainable": trainable}))
    for name in ("dw1", "dw2", "db1", "db2"):
        assert torch.equal(some[name][trainable], everyone[name][trainable])
        assert not some[name][~trainable].any()


@case(34, "cuda")
def test_case_34_copies_of_a_module() -> None:
    torch.manual_seed(0)
    settings = {"bias": True, "shared_intermediate_size": 16}
    layer = penstock.MoE(24, 16, 6, 2, **settings).to("cuda", torch.bfloat16)
    x = torch.randn(33, 24, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = penstock.MoE(24, 16, 6, 2, **settings).to("cuda", torch.bfloat16)
    fresh.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), y)


@case(35, "cuda")
def test_case_35_the_gpu_is_verified() -> None:
    found = [checked for checked in self_check() if checked.backend == "cuda"]
    assert {checked.dtype for checked in found} == {"bfloat16", "float16"}
    assert all(checked.right for checked in found), [checked.line() for checked in found]


def test_rows_already_dispatched_and_delayed_weight_gradients() -> None:
    """The seams of expert parallelism and of pipelines give the bits of the plain call."""
    shape = [64, 48, 40, 6, 2]
    inputs = make_inputs(shape, "bfloat16", bias=True)
    expected = step(inputs, 2)
    delayed = functional.DelayedWeightGrads()
    logits = functional.router_logits(inputs["x"], inputs["router_weight"])
    biases = {name: inputs[name] for name in ("b1", "b2")}
    output = functional.moe_experts(
        inputs["x"], inputs["w1"], inputs["w2"], functional.route(logits, 2),
        delayed=delayed, **biases,
    )  # fmt: skip
    output.backward(inputs["d_output"])
    delayed.run()
    leaves = ("x", "router_weight", "w1", "w2", "b1", "b2")
    got = {f"d{name}": inputs[name].grad for name in leaves}
    assert not other_bits(got, {name: value for name, value in expected.items() if name in got})

    rows = inputs["x"].detach()
    counts = torch.tensor([10, 0, 20, 4, 30, 0], dtype=torch.int32, device="cuda")
    weights = (inputs["w1"].detach(), inputs["w2"].detach())
    on_rows = functional.experts_on_rows(rows, *weights, counts)
    ids = torch.arange(6, device="cuda").repeat_interleave(counts.long()).view(-1, 1)
    one = torch.ones(64, 1, device="cuda")
    assert torch.equal(on_rows, functional.moe_experts(rows, *weights, one, ids))
