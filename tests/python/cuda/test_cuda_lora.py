# SPDX-License-Identifier: Apache-2.0
"""Adapters beside frozen experts on the GPU: against float64 with merged weights, bit for bit where
integers make both exact, and the same bits each time.
"""

from __future__ import annotations

import plain
import pytest
import torch
from adapted import frozen, leaves, make_adapters, merged, routed, run
from torch import Tensor

import penstock
from penstock.lora import Adapters

FEW_ROWS = (37, 24, 40, 6, 2)  # T, d, n, E, K: tiles of 64 rows
MANY_ROWS = (700, 328, 200, 5, 2)  # tiles of 128 rows, several along every axis
SHAPES = [FEW_ROWS, MANY_ROWS]
RANKS = [(16, 16), (1, 3), (0, 8), (72, 0), (200, 256)]


def on_gpu(tensor: Tensor | None) -> Tensor | None:
    """The tensor's values as a leaf of its own on the GPU."""
    if tensor is None:
        return None
    return tensor.detach().cuda().requires_grad_(tensor.requires_grad)


class AdaptedLayer:
    """The tensors of a layer with adapters, and the layer with merged weights in float64."""

    def __init__(self, shape, ranks, dtype: str, activation: str = "swiglu") -> None:
        storage = getattr(torch, dtype)
        weights = frozen(plain.make_weights(shape, activation, dtype=storage))
        self.weights = {name: on_gpu(weight) for name, weight in weights.items()}
        self.adapters = Adapters(*map(on_gpu, make_adapters(ranks, activation, storage, shape)))
        scores, ids = routed(shape, torch.float32)
        self.scores, self.ids = on_gpu(scores), ids.cuda()
        self.x = on_gpu(plain.make_x(shape, dtype=storage))
        self.activation = activation

    @property
    def inputs(self) -> list[Tensor]:
        """What has a gradient."""
        return leaves([self.x, self.scores], self.adapters)

    def step(self, **settings) -> list[Tensor]:
        """The output and the gradients of the inputs."""
        output = run(
            self.x, self.weights, self.scores, self.ids, self.adapters,
            activation=self.activation, **settings,
        )  # fmt: skip
        return [output.detach(), *torch.autograd.grad(output.sum(), self.inputs)]

    def exact_step(self) -> list[Tensor]:
        """The same in float64 with B A added to the weights."""
        wide = merged({name: w.double() for name, w in self.weights.items()}, self.adapters)
        output = plain.experts(
            self.x.double(), wide, self.scores.double(), self.ids, activation=self.activation
        )
        return [output.detach(), *torch.autograd.grad(output.sum(), self.inputs)]


def far(got: list[Tensor], expected: list[Tensor], bound: float) -> list[str]:
    """What is further than bound away; a gradient passes through one more rounded product."""
    errors = [plain.relative_l2(a, b) for a, b in zip(got, expected, strict=True)]
    bounds = [bound] + [2 * bound] * (len(errors) - 1)
    return [f"result {i}: {e:.2e}" for i, e in enumerate(errors) if not e <= bounds[i]]


@pytest.mark.parametrize("activation", ["swiglu", "relu_squared"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_merged_weights(
    shape, ranks, activation, dtype, tolerances
) -> None:
    layer = AdaptedLayer(shape, ranks, dtype, activation)
    # A square doubles the relative error of the rounded H; the bound is made for the others.
    factor = 1.5 if activation == "relu_squared" else 1.0
    assert not far(layer.step(), layer.exact_step(), factor * tolerances["end_to_end"][dtype])


def test_interleaved_gates(dtype, tolerances) -> None:
    layer = AdaptedLayer(MANY_ROWS, (16, 8), dtype)
    expected = layer.exact_step()
    size = MANY_ROWS[2]
    order = torch.arange(2 * size).reshape(2, size).t().flatten()  # gate and up rows in turn
    for name in ("w1", "b1"):
        layer.weights[name] = layer.weights[name][:, order].contiguous()
    up_b = layer.adapters.up_b.detach()[:, order].contiguous().requires_grad_()
    layer.adapters = layer.adapters._replace(up_b=up_b)
    got = layer.step(gate_layout="interleaved")
    place = 1 + [t is up_b for t in layer.inputs].index(True)
    got[place] = got[place][:, order.argsort()]
    assert not far(got, expected, tolerances["end_to_end"][dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(16, 0), (0, 16)], ids=["up", "down"])
def test_small_integers_give_the_bits_of_merged_weights(shape, ranks, dtype) -> None:
    """An adapter on the up-projection leaves forward exact; on the other one, dX and dS."""
    layer = AdaptedLayer(shape, ranks, dtype, "relu")
    generator = torch.Generator("cuda").manual_seed(5)
    with torch.no_grad():
        for tensor in (layer.x, *layer.weights.values(), *leaves(layer.adapters)):
            tensor.copy_(torch.randint(-1, 2, tensor.shape, generator=generator, device="cuda"))
    adapted = layer.step()
    layer.weights = {name: w.detach() for name, w in merged(layer.weights, layer.adapters).items()}
    layer.adapters = Adapters(
        *(None if f is None else torch.zeros_like(f).requires_grad_() for f in layer.adapters)
    )
    plainly = layer.step()
    chosen = [0] if ranks[1] == 0 else [1, 2]
    assert all(torch.equal(adapted[index], plainly[index]) for index in chosen)


def test_the_same_bits_each_time_and_under_both_save_policies(dtype) -> None:
    layer = AdaptedLayer(MANY_ROWS, (16, 40), dtype)
    kept = layer.step()
    for again in (layer.step(), layer.step(save="input")):
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def test_weights_the_other_way_round_are_refused_by_name(dtype) -> None:
    layer = AdaptedLayer(FEW_ROWS, (8, 8), dtype)
    for name in ("w1", "w2"):
        layer.weights[name] = layer.weights[name].transpose(1, 2).contiguous()
    with pytest.raises(penstock.UnsupportedError, match="adapters with weight_order input_major"):
        layer.step(weight_order="input_major")
