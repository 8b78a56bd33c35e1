# SPDX-License-Identifier: Apache-2.0
"""The Python interfaces over a Layer, and the decorator that ties tests to declared cases.

A door runs a layer and returns its results as arrays in their own dtypes, so that bits can be
compared; as_float64 makes them comparable with the statement.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from case_layer import HOSTILE, NUMPY_DTYPES, Layer, accumulator, far_from, statement

import penstock
from penstock import functional

TORCH_DTYPES = {name: getattr(torch, name) for name in NUMPY_DTYPES}
TESTED: dict[int, set[str]] = defaultdict(set)  # case number -> doors that have a test


def case(number: int, *doors: str) -> Callable:
    """Marks a test of a declared case; with doors, the test takes one as `door`."""

    def decorate(test: Callable) -> Callable:
        if not doors:
            raise TypeError("name the doors that the test goes through")
        TESTED[number].update(doors)
        declared_doors = HOSTILE[number]["doors"]
        assert set(doors) <= set(declared_doors), f"case {number} declares {declared_doors}"
        if "door" not in test.__code__.co_varnames[: test.__code__.co_argcount]:
            return test
        return pytest.mark.parametrize("door", [DOORS[name] for name in doors], ids=doors)(test)

    return decorate


def backends_for(dtype: str) -> list[str]:
    """The CPU backends of this machine that run the dtype."""
    return [
        backend.name
        for backend in penstock.list_backends()
        if backend.device == "cpu"
        and backend.available
        and not penstock.why_not(backend.name, (4, 8, 8, 2, 1), dtype=dtype)
    ]


EVERY_KIND = [(backend, dtype) for dtype in NUMPY_DTYPES for backend in backends_for(dtype)]


def weights_of(layer: Layer) -> dict:
    """The layer's weights that exist, by name."""
    named = {"w1": layer.w1, "w2": layer.w2, "b1": layer.b1, "b2": layer.b2}
    return {name: value for name, value in named.items() if value is not None}


class Door:
    """What both doors have in common."""

    @classmethod
    def inputs(cls, layer: Layer) -> dict:
        """Every tensor of a call."""
        arrays = {name: cls.array(value, layer.dtype) for name, value in weights_of(layer).items()}
        arrays["x"] = cls.array(layer.x, layer.dtype)
        arrays["d_output"] = cls.array(layer.d_output, layer.dtype)
        arrays["scores"] = cls.array(layer.scores, accumulator(layer.dtype))
        arrays["ids"] = cls.ids(layer.ids)
        return arrays

    @classmethod
    def run(cls, layer: Layer) -> dict:
        """Results of a layer, in their own dtypes."""
        return cls.run_inputs(cls.inputs(layer), layer)


class NumpyDoor(Door):
    """penstock.functional on NumPy arrays."""

    name = "numpy"

    @staticmethod
    def array(values: np.ndarray, dtype: str) -> np.ndarray:
        """Values as an array of the dtype."""
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(NUMPY_DTYPES[dtype])

    @staticmethod
    def ids(values: np.ndarray) -> np.ndarray:
        """Ids as they are passed."""
        return np.ascontiguousarray(values)

    @staticmethod
    def run_inputs(inputs: dict, layer: Layer) -> dict:
        """Forward and backward of the given tensors."""
        names = {name: inputs[name] for name in weights_of(layer)}
        routing = penstock.Routing.from_topk(inputs["scores"], inputs["ids"])
        config = functional.Config(activation=layer.activation, save=layer.save)
        output, saved = functional.moe_experts_forward(
            inputs["x"], functional.Weights(**names), routing, config._replace(**layer.options)
        )
        grads = functional.moe_experts_backward(inputs["d_output"], saved)
        results = {
            "output": output,
            "dx": grads.x,
            "dscores": grads.scores.reshape(inputs["scores"].shape),
        }
        return results | {f"d{name}": getattr(grads.weights, name) for name in names}

    @staticmethod
    def route(logits: np.ndarray, top_k: int, router: str, dtype: str) -> tuple:
        """Scores and ids (T, K) as NumPy arrays."""
        return functional.route(logits.astype(NUMPY_DTYPES[dtype]), top_k, router=router).topk()

    @staticmethod
    def bits(array: np.ndarray) -> bytes:
        """The bytes of a result."""
        return array.tobytes()

    @staticmethod
    def as_float64(array: np.ndarray) -> np.ndarray:
        """A result's values."""
        return array.astype(np.float64)


class TorchDoor(Door):
    """penstock.functional on torch tensors, gradients by autograd."""

    name = "torch"
    device = "cpu"

    @classmethod
    def array(cls, values: np.ndarray, dtype: str) -> torch.Tensor:
        """Values as a tensor of the dtype."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(device=cls.device, dtype=TORCH_DTYPES[dtype])

    @classmethod
    def ids(cls, values: np.ndarray) -> torch.Tensor:
        """Ids as they are passed."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(cls.device)

    @classmethod
    def run_inputs(cls, inputs: dict, layer: Layer) -> dict:
        """Forward and backward of the given tensors."""
        names = ["x", "scores", *weights_of(layer)]
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        output = cls.forward(leaves, inputs["ids"], layer)
        grads = torch.autograd.grad(output, list(leaves.values()), inputs["d_output"])
        results = {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
        return {"output": output.detach()} | results

    @staticmethod
    def forward(leaves: dict, ids: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The output, with its graph."""
        biases = {name: leaves[name] for name in ("b1", "b2") if name in leaves}
        return functional.moe_experts(
            leaves["x"], leaves["w1"], leaves["w2"], leaves["scores"], ids,
            activation=layer.activation, save=layer.save, **biases, **layer.options,
        )  # fmt: skip

    @classmethod
    def route(cls, logits: np.ndarray, top_k: int, router: str, dtype: str) -> tuple:
        """Scores and ids (T, K) as NumPy arrays."""
        scores, ids = functional.route(cls.array(logits, dtype), top_k, router=router).topk()
        return scores.cpu().numpy(), ids.cpu().numpy()

    @staticmethod
    def bits(tensor: torch.Tensor) -> bytes:
        """The bytes of a result."""
        if not tensor.numel():
            return b""
        return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()

    @staticmethod
    def as_float64(tensor: torch.Tensor) -> np.ndarray:
        """A result's values."""
        return tensor.double().cpu().numpy()


class CudaDoor(TorchDoor):
    """The same on the GPU, for the tests in tests/python/cuda."""

    name = "cuda"
    device = "cuda"


DOORS = {door.name: door for door in (NumpyDoor, TorchDoor, CudaDoor)}


def check_statement(door, layer: Layer, results: dict | None = None) -> dict:
    """Runs the layer (unless results are given) and compares with float64; returns the results."""
    results = door.run(layer) if results is None else results
    values = {name: door.as_float64(value) for name, value in results.items()}
    assert not (far := far_from(values, statement(layer), layer.dtype)), "\n".join(far)
    return results


def check_same_bits(door, got: dict, expected: dict) -> None:
    """The same bits in every result."""
    different = [name for name in expected if door.bits(got[name]) != door.bits(expected[name])]
    assert not different, f"other bits in {', '.join(different)}"
