# SPDX-License-Identifier: Apache-2.0
"""Hostile cases 18, 26, 27, 28, 34 and 35 through NumPy and torch: calls at once, in other company,
again, on top of earlier gradients, in copies and in a child process.

C++ twins are in tests/cpp/hostile/state_cases.cpp.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from case_layer import accumulator, bound_for, make_layer, parameters, relative_l2, statement
from doors import EVERY_KIND, NumpyDoor, TorchDoor, case, check_same_bits

import penstock
from penstock import functional
from penstock.bench.self_check import self_check

every_kind = pytest.mark.parametrize(("backend", "dtype"), EVERY_KIND)


@case(18, "numpy", "torch")
@every_kind
def test_case_18_host_threads_at_once(door, backend, dtype) -> None:
    values = parameters(18)
    layers = [make_layer(shape, dtype) for shape in values["shapes"]]
    with penstock.backend(backend, threads=2):
        serial = [door.run(layer) for layer in layers]
    problems = []

    def work(first: int) -> None:
        try:
            for i in range(values["calls_each"]):
                which = (first + i) % len(layers)
                with penstock.backend(backend, threads=1 + i % 3):
                    check_same_bits(door, door.run(layers[which]), serial[which])
        except BaseException as problem:  # a thread's exception would only be printed
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(values["host_threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


@case(26, "numpy", "torch")
@every_kind
def test_case_26_a_token_alone_and_in_a_batch(door, backend, dtype) -> None:
    values = parameters(26)
    batch = make_layer(values["shape"], dtype)
    with penstock.backend(backend):
        together = door.run(batch)
        for t in values["tokens"]:
            token = slice(t, t + 1)
            alone = door.run(
                batch.with_(
                    shape=(1, *batch.shape[1:]),
                    x=batch.x[token],
                    d_output=batch.d_output[token],
                    scores=batch.scores[token],
                    ids=batch.ids[token],
                )
            )
            for name in ("output", "dx", "dscores"):
                assert door.bits(alone[name]) == door.bits(together[name][token]), name


@case(27, "numpy", "torch")
@every_kind
def test_case_27_recomputation_has_the_same_bits(door, backend, dtype) -> None:
    layer = make_layer(parameters(27)["shape"], dtype)
    with penstock.backend(backend):
        kept, again, recomputed = (
            door.run(layer.with_(save=save)) for save in ("preactivation", "preactivation", "input")
        )
    check_same_bits(door, again, kept)
    check_same_bits(door, recomputed, kept)


@case(27, "numpy")
def test_case_27_backward_twice_and_after_inference() -> None:
    layer = make_layer(parameters(27)["shape"], "float32")
    inputs = NumpyDoor.inputs(layer)
    weights = functional.Weights(w1=inputs["w1"], w2=inputs["w2"], b1=inputs["b1"], b2=inputs["b2"])
    routing = penstock.Routing.from_topk(inputs["scores"], inputs["ids"])
    output, saved = functional.moe_experts_forward(inputs["x"], weights, routing)
    first = functional.moe_experts_backward(inputs["d_output"], saved)
    second = functional.moe_experts_backward(inputs["d_output"], saved)
    assert first.x.tobytes() == second.x.tobytes()
    assert first.weights.w1.tobytes() == second.weights.w1.tobytes()
    config = functional.Config(save="nothing")
    inferred, saved = functional.moe_experts_forward(inputs["x"], weights, routing, config)
    assert inferred.tobytes() == output.tobytes()
    with pytest.raises(ValueError, match="nothing"):
        functional.moe_experts_backward(inputs["d_output"], saved)


def torch_loss(layer):
    """A scalar and its leaves."""
    inputs = TorchDoor.inputs(layer)
    leaves = {
        name: inputs[name].requires_grad_() for name in ("x", "w1", "w2", "b1", "b2", "scores")
    }
    return TorchDoor.forward(leaves, inputs["ids"], layer).square().sum(), leaves


@case(27, "torch")
def test_case_27_retain_graph_and_second_order() -> None:
    layer = make_layer(parameters(27)["shape"], "float64")
    loss, leaves = torch_loss(layer)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):  # the graph is gone: torch's own error
        torch.autograd.grad(loss, list(leaves.values()))
    loss, leaves = torch_loss(layer)
    (dx,) = torch.autograd.grad(loss, leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        dx.sum().backward()


@case(27, "torch")
@pytest.mark.parametrize("reentrant", [False, True])
def test_case_27_activation_checkpointing_counts_once(reentrant) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layer = penstock.MoE(24, 20, 6, 2)
    x = torch.randn(33, 24, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    loads = layer.stats.loads.clone()
    x.grad = None
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.stats.loads, loads), "the recomputation was counted as well"
    got = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@case(28, "torch")
def test_case_28_gradients_add_up() -> None:
    layer = make_layer(parameters(28)["shape"], "float64")
    loss, leaves = torch_loss(layer)
    once = torch.autograd.grad(loss, list(leaves.values()))
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 3.0)
    torch_loss_again = TorchDoor.forward(leaves, torch.from_numpy(layer.ids), layer).square().sum()
    torch_loss_again.backward()
    for leaf, grad in zip(leaves.values(), once, strict=True):
        assert torch.equal(leaf.grad, 3.0 + grad)


@case(28, "torch")
@every_kind
def test_case_28_main_grad(backend, dtype) -> None:
    layer = make_layer(parameters(28)["shape"], dtype)
    inputs = TorchDoor.inputs(layer)
    names = ("w1", "w2", "b1", "b2")
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "scores", *names)}
    wide = getattr(torch, accumulator(dtype))
    for name in names:
        leaves[name].main_grad = torch.full(leaves[name].shape, 3.0, dtype=wide)
    layer.options = {"main_grad": True}
    with penstock.backend(backend):
        for _ in range(2):
            TorchDoor.forward(leaves, inputs["ids"], layer).backward(inputs["d_output"])
    expected = statement(layer)
    for name in names:
        assert leaves[name].grad is None or not leaves[name].grad.any()
        want = 3.0 + 2.0 * expected[f"d{name}"]
        error = relative_l2(leaves[name].main_grad.double().numpy(), want)
        assert error <= bound_for(want.size, dtype), name


@case(28, "torch")
@every_kind
def test_case_28_frozen_experts(backend, dtype) -> None:
    values = parameters(28)
    layer = make_layer(values["shape"], dtype)
    trainable = torch.ones(layer.shape[3], dtype=torch.bool)
    trainable[values["frozen"]] = False
    with penstock.backend(backend):
        expected = TorchDoor.run(layer)
        got = TorchDoor.run(layer.with_(options={"trainable": trainable}))
    for name in ("dw1", "dw2", "db1", "db2"):
        assert torch.equal(got[name][trainable], expected[name][trainable])
        assert not got[name][~trainable].any()
    check_same_bits(TorchDoor, {"dx": got["dx"]}, {"dx": expected["dx"]})


@case(28, "numpy")
def test_case_28_numpy_gradients_are_new_arrays() -> None:
    """NumPy has no .grad to add to: a second backward leaves the first one's arrays alone."""
    layer = make_layer(parameters(28)["shape"], "float32")
    first = NumpyDoor.run(layer)
    before = {name: value.tobytes() for name, value in first.items()}
    NumpyDoor.run(layer.with_(d_output=-layer.d_output))
    assert {name: value.tobytes() for name, value in first.items()} == before


def run_in_child(action) -> int:
    """The exit code of `action` in a forked child: 0 if it returned True, -N for signal N."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
        child = os.fork()
    if child == 0:
        signal.alarm(parameters(34)["timeout_s"])  # a hang ends in a signal
        code = 2
        try:
            code = 0 if action() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@case(34, "numpy", "torch")
@every_kind
def test_case_34_fork(door, backend, dtype) -> None:
    layer = make_layer(parameters(34)["shape"], dtype)

    def bits() -> list[bytes]:
        inputs = door.inputs(layer)
        names = {name: inputs[name] for name in ("w1", "w2", "b1", "b2")}
        routing = penstock.Routing.from_topk(inputs["scores"], inputs["ids"])
        weights = functional.Weights(**names)
        output, saved = functional.moe_experts_forward(inputs["x"], weights, routing)
        grads = functional.moe_experts_backward(inputs["d_output"], saved)
        return [door.bits(value) for value in (output, grads.x, grads.weights.w1)]

    with penstock.backend(backend, threads=2):
        expected = bits()
        assert run_in_child(lambda: bits() == expected) == 0
        assert bits() == expected


@case(34, "torch")
def test_case_34_copies_of_a_module() -> None:
    torch.manual_seed(0)
    layer = penstock.MoE(24, 20, 6, 2, bias=True, shared_intermediate_size=12)
    x = torch.randn(33, 24)
    y = layer(x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = penstock.MoE(24, 20, 6, 2, bias=True, shared_intermediate_size=12)
    fresh.load_state_dict(torch.load(buffer))
    for other in (*copies, fresh):
        assert torch.equal(other(x), y)


@case(35, "torch")
def test_case_35_every_backend_is_verified(cpu_backend) -> None:
    found = [checked for checked in self_check() if checked.backend == cpu_backend]
    assert found and all(checked.right for checked in found)


@case(34, "numpy")
def test_case_34_pickled_routing() -> None:
    layer = make_layer(parameters(34)["shape"], "float32")
    routing = penstock.Routing.from_topk(*(NumpyDoor.inputs(layer)[n] for n in ("scores", "ids")))
    other = pickle.loads(pickle.dumps(routing))
    plans = [functional.make_plan(r, layer.shape[3]) for r in (routing, other)]
    assert all(np.array_equal(a, b) for a, b in zip(plans[0][:5], plans[1][:5], strict=True))
