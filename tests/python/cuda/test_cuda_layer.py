# SPDX-License-Identifier: Apache-2.0
"""The layer on the GPU against float64: published shapes scaled down, the product of all options,
small integers that must be exact; the same bits each time; memory as the formulas say.
"""

from __future__ import annotations

import numpy as np
import plain
import pytest
import torch
from case_layer import declared, far_from, make_layer, rounded, statement
from doors import CudaDoor
from gpu_layer import (
    GRANULE,
    chosen_ids,
    forward,
    leaves_of,
    make_inputs,
    other_bits,
    plain_step,
    published_shapes,
    step,
)
from product import AXES, LAYER_AXES, build, combinations, run

import penstock
from penstock import functional

SHAPES = published_shapes()
PRODUCT_SHAPE = [declared("shapes")["shapes"]["tiny"][key] for key in "TdnEK"]


@pytest.mark.parametrize("num_tokens", [None, 37], ids=["as_scaled", "few_tokens"])
@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_against_float64(name, num_tokens, dtype, tolerances) -> None:
    shape = SHAPES[name]
    shape = [num_tokens or shape[0], *shape[1:]]
    inputs = make_inputs(shape, dtype, bias=name == "olmoe")
    ids = chosen_ids(inputs, shape[4])
    exact = plain_step(inputs, ids, torch.float64)
    simple = plain_step(inputs, ids, getattr(torch, dtype))
    wrong = []
    for result, got in step(inputs, shape[4]).items():
        error = plain.relative_l2(got, exact[result])
        bound = min(
            tolerances["end_to_end"][dtype],
            tolerances["plain_torch_factor"] * plain.relative_l2(simple[result], exact[result]),
        )
        if not error <= bound:
            wrong.append(f"{result}: {error:.2e} from float64, more than {bound:.2e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_each_time_and_under_both_save_policies(name, dtype) -> None:
    shape = SHAPES[name]
    inputs = make_inputs(shape, dtype)
    kept = step(inputs, shape[4])
    assert not other_bits(step(inputs, shape[4]), kept)
    assert not other_bits(step(inputs, shape[4], save="input"), kept)
    with torch.no_grad():
        inferred = forward(inputs, shape[4])
    assert torch.equal(inferred, kept["output"])


def runs_on_cuda(choice: dict) -> bool:
    """The one combination that the backend refuses, and says so: see the next test."""
    gated = choice["activation"] in plain.GATED
    return not (gated and choice["order"] == "input_major" and choice["layout"] == "interleaved")


# Tiles narrow for the token alone; in the call wide, of 128 rows and of 64.
@pytest.mark.parametrize("shape", [(600, 1288, 328, 16, 4), (200, 264, 200, 70, 4)], ids=str)
def test_a_token_alone_has_its_bits_of_a_batch_though_its_tiles_are_narrower(shape, dtype) -> None:
    inputs = {name: leaf.detach() for name, leaf in make_inputs(shape, dtype).items()}

    def run(tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x = inputs["x"][tokens]
        logits = functional.router_logits(x, inputs["router_weight"])
        scores, ids = functional.route(logits, shape[4]).topk()
        return logits, functional.moe_experts(x, inputs["w1"], inputs["w2"], scores, ids)

    together = run(slice(None))
    for first, last in ((0, 1), (77, 78), (150, 190)):
        part = slice(first, last)
        for got, want in zip(run(part), together, strict=True):
            assert torch.equal(got, want[part])


@pytest.mark.parametrize("activation", AXES["activation"])
def test_product(activation, dtype) -> None:
    """Every activation, bias, layout, order, save policy, router and load, at tests' tiny shape."""
    wrong, statements = [], {}
    for choice in combinations():
        if (choice["dtype"], choice["activation"]) != (dtype, activation):
            continue
        if not runs_on_cuda(choice):
            continue
        key = tuple(choice[axis] for axis in LAYER_AXES)
        if key not in statements:
            statements[key] = build(choice, PRODUCT_SHAPE)
        layer, logits, expected = statements[key]
        got = run(choice, layer, logits, CudaDoor)
        wrong += [f"{choice}: {line}" for line in far_from(got, expected, dtype)]
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


def test_the_one_layout_that_is_refused_says_so() -> None:
    choice = next(choice for choice in combinations() if not runs_on_cuda(choice))
    choice = choice | {"dtype": "bfloat16", "router": "caller"}
    layer, logits, _ = build(choice, PRODUCT_SHAPE)
    with pytest.raises(penstock.UnsupportedError, match="input_major with gate_layout interleaved"):
        run(choice, layer, logits, CudaDoor)


INTEGER_SHAPES = [
    [1, 64, 64, 4, 2],
    [9, 64, 72, 3, 2],
    [70, 136, 64, 2, 1],
    [200, 128, 256, 4, 2],
    [1000, 64, 192, 5, 3],
    [1500, 192, 64, 3, 2],
]


@pytest.mark.parametrize("shape", INTEGER_SHAPES, ids=str)
def test_small_integers_are_exact(shape, dtype) -> None:
    """Products and sums of small integers have no rounding but where a value is stored."""
    random = np.random.default_rng(7)

    def integers(like: np.ndarray, most: int) -> np.ndarray:
        return random.integers(-most, most + 1, like.shape).astype(np.float64)

    layer = make_layer(shape, dtype, activation="relu")
    layer = layer.with_(
        x=integers(layer.x, 1),
        w1=integers(layer.w1, 1),
        w2=integers(layer.w2, 1),
        b1=integers(layer.b1, 2),
        b2=integers(layer.b2, 2),
        scores=integers(layer.scores, 2),
        d_output=integers(layer.d_output, 1),
    )
    results = CudaDoor.run(layer)
    for name, want in statement(layer).items():
        stored = want if name == "dscores" else rounded(want, dtype)
        got = CudaDoor.as_float64(results[name]).reshape(want.shape)
        different = int((got != stored).sum())
        assert different == 0, f"{name}: {different} of {want.size} values differ"


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_memory_is_what_the_formulas_say(save, dtype) -> None:
    shape = SHAPES["7B-n256"]
    inputs = make_inputs(shape, dtype)
    with penstock.testing.kept_bytes(*leaves_of(inputs).values()) as kept:
        output = forward(inputs, shape[4], save=save)
    assert kept.total == functional.saved_bytes(shape, dtype=dtype, save=save)
    with penstock.testing.watch_workspaces() as log:
        output.backward(inputs["d_output"])
    sizes = {"dtype": dtype, "save": save, "device": "cuda"}
    assert functional.workspace_bytes(shape, "backward", **sizes) in log.sizes


@pytest.mark.parametrize(("d", "n"), [(GRANULE + 4, GRANULE), (GRANULE, GRANULE + 1)])
def test_sizes_that_are_no_multiple_of_the_granule_are_refused(d, n, dtype) -> None:
    """By the layer with its router, whose product has d as well, and by the experts alone."""
    inputs = make_inputs((16, d, n, 4, 2), dtype)
    with pytest.raises(penstock.UnsupportedError, match="multiples? of 8"):
        step(inputs, 2)
    ids = torch.arange(32, dtype=torch.int32, device="cuda").view(16, 2) % 4
    scores = torch.full((16, 2), 0.5, device="cuda")
    with pytest.raises(penstock.UnsupportedError, match="multiples? of 8"):
        functional.moe_experts(inputs["x"], inputs["w1"], inputs["w2"], scores, ids)


def test_a_router_of_a_size_that_is_refused_names_the_size(dtype) -> None:
    """Both passes, for x that is contiguous: the size is at fault, not the layout."""
    inputs = make_inputs((16, GRANULE + 4, GRANULE, 4, 2), dtype)
    x, weight = inputs["x"].detach(), inputs["router_weight"].detach()
    with pytest.raises(penstock.UnsupportedError, match="hidden_size: got 12"):
        functional.router_logits(x, weight)
    dlogits = torch.zeros(16, 4, device="cuda")
    with pytest.raises(penstock.UnsupportedError, match="hidden_size: got 12"):
        functional.router_logits_backward(dlogits, x, weight)


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_dtypes_that_are_refused_name_the_way_out(wide) -> None:
    shape = (16, 16, 8, 4, 2)
    with pytest.raises(penstock.UnsupportedError, match="bfloat16"):
        step(make_inputs(shape, wide), 2)
