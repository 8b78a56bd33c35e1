# SPDX-License-Identifier: Apache-2.0
"""Hostile cases 13 to 17 and 21 through NumPy and torch: strides, alignment, dtypes, devices,
missing backends, allocations that fail.

C++ twins are in tests/cpp/hostile/memory_cases.cpp and allocation_case.cpp.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from case_layer import make_layer, parameters
from doors import DOORS, EVERY_KIND, NumpyDoor, TorchDoor, case, check_same_bits, check_statement

import penstock
from penstock import functional

every_kind = pytest.mark.parametrize(("backend", "dtype"), EVERY_KIND)


def padded(door, array, padding: int):
    """The same values as columns of a wider array that is NaN elsewhere."""
    rows, columns = array.shape
    shape = (rows, columns + padding)
    if door is TorchDoor:
        wide = torch.full(shape, torch.nan, dtype=array.dtype)
    else:
        wide = np.full(shape, np.nan, array.dtype)
    wide[:, 3 : 3 + columns] = array
    return wide[:, 3 : 3 + columns]


@case(13, "numpy", "torch")
@every_kind
def test_case_13_sliced_x(door, backend, dtype) -> None:
    layer = make_layer(parameters(13)["shape"], dtype)
    inputs = door.inputs(layer)
    with penstock.backend(backend):
        expected = door.run_inputs(inputs, layer)
        for name in ("x", "d_output"):
            inputs[name] = padded(door, inputs[name], parameters(13)["padding"])
        got = door.run_inputs(inputs, layer)
    check_same_bits(door, got, expected)


@case(13, "numpy", "torch")
@every_kind
def test_case_13_transposed_and_strided_x(door, backend, dtype) -> None:
    """Columns that are not adjacent: torch copies x (documented), NumPy refuses."""
    layer = make_layer(parameters(13)["shape"], dtype)
    inputs = door.inputs(layer)
    with penstock.backend(backend):
        expected = door.run_inputs(inputs, layer)
        if door is TorchDoor:
            inputs["x"] = inputs["x"].t().contiguous().t()
            check_same_bits(door, door.run_inputs(inputs, layer), expected)
        else:
            inputs["x"] = np.asfortranarray(inputs["x"])
            with pytest.raises(ValueError, match="x"):
                door.run_inputs(inputs, layer)


@case(13, "numpy", "torch")
@every_kind
def test_case_13_expanded_x(door, backend, dtype) -> None:
    layer = make_layer(parameters(13)["shape"], dtype)
    layer.x[:] = layer.x[0]
    inputs = door.inputs(layer)
    with penstock.backend(backend):
        expected = door.run_inputs(inputs, layer)
        one = inputs["x"][:1]
        inputs["x"] = (
            one.expand(layer.x.shape) if door is TorchDoor else np.broadcast_to(one, layer.x.shape)
        )
        check_same_bits(door, door.run_inputs(inputs, layer), expected)


@case(13, "numpy", "torch")
@every_kind
def test_case_13_transposed_weights(door, backend, dtype) -> None:
    layer = make_layer(parameters(13)["shape"], dtype)
    inputs = door.inputs(layer)
    for name in ("w1", "w2"):
        if door is TorchDoor:
            inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        else:
            inputs[name] = np.ascontiguousarray(inputs[name].swapaxes(1, 2)).swapaxes(1, 2)
    with penstock.backend(backend):
        check_statement(door, layer, door.run_inputs(inputs, layer))


@case(13, "numpy", "torch")
def test_case_13_weights_are_never_copied(door) -> None:
    """Weights with no packed axis are refused, where a copy would have been the easy way out."""
    layer = make_layer(parameters(13)["shape"], "float32")
    inputs = door.inputs(layer)
    inputs["w1"] = door.array(np.repeat(np.repeat(layer.w1, 2, 1), 2, 2), "float32")[:, ::2, ::2]
    with pytest.raises(ValueError, match="w1"):
        door.run_inputs(inputs, layer)


@case(13, "numpy", "torch")
def test_case_13_outputs_are_contiguous(door) -> None:
    layer = make_layer(parameters(13)["shape"], "float32")
    for name, value in door.run(layer).items():
        packed = value.is_contiguous() if door is TorchDoor else value.flags.c_contiguous
        assert packed, name


@case(14, "numpy", "torch")
@every_kind
def test_case_14_sizes_that_divide_nothing(door, backend, dtype) -> None:
    values = parameters(14)
    with penstock.backend(backend):
        for d in values["sizes"]:
            for n in (1, d, 17):
                shape = (values["num_tokens"], d, n, values["num_experts"], values["top_k"])
                check_statement(door, make_layer(shape, dtype))


def moved(door, array, offset: int):
    """The same values at an address that is `offset` bytes past a 64-byte boundary."""
    size = array.nbytes
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    raw[start : start + size] = np.frombuffer(door.bits(array), np.uint8)
    place = raw[start : start + size]
    if door is TorchDoor:
        return torch.from_numpy(place).view(array.dtype).view(array.shape)
    return place.view(array.dtype).reshape(array.shape)


@case(14, "numpy", "torch")
@every_kind
def test_case_14_pointers_off_alignment(door, backend, dtype) -> None:
    layer = make_layer(parameters(13)["shape"], dtype)
    inputs = door.inputs(layer)
    with penstock.backend(backend):
        expected = door.run_inputs(inputs, layer)
        for offset in parameters(14)["offsets"]:
            if offset % inputs["x"].itemsize:
                continue  # below
            places = {name: moved(door, value, offset) for name, value in inputs.items()
                      if name not in ("scores", "ids")}  # fmt: skip
            check_same_bits(door, door.run_inputs(inputs | places, layer), expected)


@case(14, "numpy")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_case_14_pointers_inside_an_element(dtype) -> None:
    """Torch cannot make such a tensor; NumPy can."""
    layer = make_layer(parameters(13)["shape"], dtype)
    inputs = NumpyDoor.inputs(layer)
    inputs["x"] = moved(NumpyDoor, inputs["x"], 2)
    with pytest.raises(ValueError, match=r"x.*align|align.*x"):
        NumpyDoor.run_inputs(inputs, layer)


@case(15, "numpy", "torch")
def test_case_15_mixed_dtypes(door) -> None:
    layer = make_layer(parameters(15)["shape"], "float32")
    inputs = door.inputs(layer)
    for name in ("w1", "w2", "b1", "b2"):
        mixed = inputs | {name: door.array(getattr(layer, name), "bfloat16")}
        with pytest.raises(ValueError, match=rf"{name}(.|\n)*bfloat16(.|\n)*float32"):
            door.run_inputs(mixed, layer)
    with pytest.raises(ValueError, match="scores"):
        door.run_inputs(inputs | {"scores": door.array(layer.scores, "float16")}, layer)
    with pytest.raises(ValueError, match="ids"):
        door.run_inputs(inputs | {"ids": door.array(layer.scores, "float32")}, layer)


@case(15, "torch")
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_case_15_autocast(autocast) -> None:
    """The modules cast x and the experts' weights; the router stays in fp32; gradients are fp32."""
    torch.manual_seed(0)
    layer = penstock.MoE(16, 8, 4, 2)
    x = torch.randn(12, 16)
    expected_ids = layer.route(x)[1].ids
    with torch.autocast("cpu", dtype=autocast):
        y = layer(x)
        assert y.dtype == autocast
        assert torch.equal(layer.route(x)[1].ids, expected_ids)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert torch.allclose(y.float(), layer(x), rtol=0.05, atol=0.02)


@case(16, "torch")
@pytest.mark.parametrize("name", ["w1", "w2", "b1", "b2"])
def test_case_16_operands_on_different_devices(name) -> None:
    layer = make_layer(parameters(16)["shape"], "float32")
    inputs = TorchDoor.inputs(layer)
    with pytest.raises(ValueError, match=rf"{name}(.|\n)*meta(.|\n)*cpu"):
        TorchDoor.forward(inputs | {name: inputs[name].to("meta")}, inputs["ids"], layer)


@case(16, "torch")
@pytest.mark.parametrize("name", ["scores", "ids"])
def test_case_16_routing_on_another_device(name) -> None:
    layer = make_layer(parameters(16)["shape"], "float32")
    inputs = TorchDoor.inputs(layer)
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}(.|\n)*meta(.|\n)*cpu"):
        TorchDoor.forward(inputs, inputs["ids"], layer)


@case(17, "numpy", "torch")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_case_17_a_backend_that_is_not_there(door) -> None:
    layer = make_layer(parameters(17)["shape"], "float32")
    with penstock.backend("cuda"), pytest.raises(penstock.UnsupportedError, match="CUDA"):
        door.run(layer)
    with penstock.backend("no-such"), pytest.raises(ValueError, match="no-such"):
        door.run(layer)
    check_statement(door, layer)  # the CPU still works
    reasons = {backend.name: backend.reason for backend in penstock.list_backends()}
    assert "CUDA" in reasons["cuda"]


@case(17, "numpy")
def test_case_17_import_needs_neither_torch_nor_a_gpu() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, penstock\n"
        "x = np.ones((3, 4), np.float32); w = np.ones((2, 4, 4), np.float32)\n"
        "y = penstock.functional.moe_experts(x, w, w[:, :, :2].copy(), np.ones((3, 1), np.float32),"
        " np.zeros((3, 1), np.int32))\n"
        "assert y.shape == (3, 4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class FailingAllocator:
    """Replaces the front-end's allocations: the n-th raises what its library would raise."""

    def __init__(self, monkeypatch, door) -> None:
        from penstock import _arrays

        on_torch = issubclass(door, TorchDoor)
        arrays = _arrays.TorchArrays if on_torch else _arrays.NumpyArrays
        self.error = torch.OutOfMemoryError if on_torch else MemoryError
        self.remaining = -1
        for name in ("empty", "zeros", "workspace"):
            monkeypatch.setattr(arrays, name, self.wrap(getattr(arrays, name)))

    def wrap(self, allocate):
        def wrapped(size, *rest):
            self.remaining -= 1
            if self.remaining == -1:
                raise self.error(f"cannot allocate {size}")
            return allocate(size, *rest)

        return wrapped


@case(21, "numpy", "torch")
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_case_21_every_allocation_fails_once(door, save, monkeypatch) -> None:
    layer = make_layer(parameters(21)["shape"], "float32").with_(save=save)
    small = make_layer((5, *parameters(21)["shape"][1:]), "float32")
    expected, expected_small = door.run(layer), door.run(small)
    inputs = door.inputs(layer)
    before = {name: door.bits(value) for name, value in inputs.items()}
    allocator = FailingAllocator(monkeypatch, door)
    failures = 0
    for failing in range(200):
        allocator.remaining = failing
        try:
            door.run_inputs(inputs, layer)
        except (MemoryError, RuntimeError) as error:
            failures += 1
            assert "cannot allocate" in str(error)
        allocator.remaining = -1
        assert {name: door.bits(value) for name, value in inputs.items()} == before
        check_same_bits(door, door.run(small), expected_small)  # the next, smaller call works
        if failures == failing:
            break
    assert failures >= 8, "the allocations are not where the test thinks they are"
    check_same_bits(door, door.run_inputs(inputs, layer), expected)


@case(21, "torch")
def test_case_21_a_modules_gradients_are_left_alone(monkeypatch) -> None:
    torch.manual_seed(0)
    layer = penstock.MoE(16, 8, 4, 2)
    x = torch.randn(12, 16)
    layer(x).sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    loss = layer(x).sum()
    allocator = FailingAllocator(monkeypatch, DOORS["torch"])
    allocator.remaining = 0
    with pytest.raises(RuntimeError, match="cannot allocate"):
        loss.backward()
    for parameter, grad in zip(layer.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)
    functional.router_logits(x, layer.router.weight)  # the next call works
