# SPDX-License-Identifier: Apache-2.0
"""The whole product of tests/cases/products.json, through the torch interface, on every backend.

Each combination runs forward and backward once and is compared with the float64 statement: output
and every gradient, the logits' included where a router of ours chose. Combinations that differ only
in layout, order and save policy share one statement. The last tests tell what is left out.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from case_layer import declared, far_from, make_layer, statement
from doors import EVERY_KIND, TorchDoor

import penstock
from penstock import functional

PRODUCT = declared("products")
AXES = PRODUCT["axes"]
SHAPE = [declared("shapes")["shapes"][PRODUCT["shape"]][key] for key in "TdnEK"]
# These make a different layer; the others are ways to store or run the same one.
LAYER_AXES = ("activation", "bias", "dtype", "router", "load")
STORAGE_AXES = ("layout", "order", "save")


def combined(choice: dict) -> bool:
    """Whether the product has this combination."""
    return not any(
        all(choice[axis] in values for axis, values in rule["when"].items())
        for rule in PRODUCT["not_combined"]
    )


def combinations() -> list[dict]:
    """Every combination of the product."""
    choices = itertools.product(*AXES.values())
    return [c for values in choices if combined(c := dict(zip(AXES, values, strict=True)))]


def spread_logits(load: str, dtype: str) -> np.ndarray:
    """Logits (T, E) that put the load where the case wants it."""
    num_tokens, _, _, num_experts, top_k = SHAPE
    logits = np.random.default_rng(5).normal(size=(num_tokens, num_experts))
    if load == "one_expert":  # as few experts as top_k allows
        logits[:, :top_k] += 20.0
    if load == "empty_experts":
        logits[:, [0, num_experts - 1]] -= 20.0
    return logits.astype(np.float64 if dtype == "float64" else np.float32).astype(np.float64)


def caller_ids(load: str) -> np.ndarray:
    """Ids (T, K) that a caller brings."""
    num_tokens, _, _, num_experts, top_k = SHAPE
    ids = make_layer(SHAPE, "float64").ids.copy()
    if load == "one_expert":
        ids[:] = -1
        ids[:, 0] = 1
    if load == "empty_experts":
        ids = np.where(ids == 0, -1, ids)
        ids = np.where(ids == num_experts - 1, num_experts, ids)
    if load == "skipped_slots":
        ids[::3] = -1
        ids[1, top_k - 1] = num_experts + 7
    return ids


def chosen_by(router: str, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids (T, K) in float64."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, : SHAPE[4]].astype(np.int32)
    chosen = np.take_along_axis(logits, ids, axis=1)
    over = logits if router == "topk_softmax" else chosen
    peak = over.max(axis=1, keepdims=True)
    return np.exp(chosen - peak) / np.exp(over - peak).sum(axis=1, keepdims=True), ids


def logits_gradient(router: str, logits, scores, ids, dscores) -> np.ndarray:
    """Dlogits (T, E) from dscores (T, K) in float64."""
    mean = (scores * dscores).sum(axis=1, keepdims=True)
    dlogits = np.zeros_like(logits)
    if router == "topk_softmax":
        full = np.exp(logits - logits.max(axis=1, keepdims=True))
        dlogits -= full / full.sum(axis=1, keepdims=True) * mean
        np.put_along_axis(
            dlogits,
            ids.astype(np.int64),
            np.take_along_axis(dlogits, ids, axis=1) + scores * dscores,
            axis=1,
        )
        return dlogits
    np.put_along_axis(dlogits, ids.astype(np.int64), scores * (dscores - mean), axis=1)
    return dlogits


def build(choice: dict):
    """The layer of a choice, its logits (None for a caller's routing) and its statement."""
    layer = make_layer(SHAPE, choice["dtype"], activation=choice["activation"], bias=choice["bias"])
    if choice["router"] == "caller":
        layer = layer.with_(ids=caller_ids(choice["load"]))
        return layer, None, statement(layer)
    logits = spread_logits(choice["load"], choice["dtype"])
    scores, ids = chosen_by(choice["router"], logits)
    layer = layer.with_(scores=scores, ids=ids)
    expected = statement(layer)
    expected["dlogits"] = logits_gradient(
        choice["router"], logits, scores, ids, expected.pop("dscores")
    )
    return layer, logits, expected


def interleave(rows, halves: int):
    """Gate and up rows (axis 1) in turn instead of one after the other."""
    if halves == 1:
        return rows
    return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)


def run(choice: dict, layer, logits) -> dict[str, np.ndarray]:
    """The torch door with the choice's layout, order and save policy; results as float64."""
    inputs = TorchDoor.inputs(layer)
    leaves = {name: inputs[name] for name in ("x", "w1", "w2", "b1", "b2") if name in inputs}
    leaves["logits" if logits is not None else "scores"] = (
        inputs["scores"] if logits is None else TorchDoor.array(logits, _score_type(layer))
    )
    for leaf in leaves.values():
        leaf.requires_grad_()
    halves = layer.w1.shape[1] // layer.shape[2]
    w1, w2, b1 = leaves["w1"], leaves["w2"], leaves.get("b1")
    if choice["layout"] == "interleaved":
        w1, b1 = interleave(w1, halves), None if b1 is None else interleave(b1, halves)
    if choice["order"] == "input_major":
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    if logits is None:
        routing = penstock.Routing.from_topk(leaves["scores"], inputs["ids"])
    else:
        routing = functional.route(leaves["logits"], layer.shape[4], router=choice["router"])
    output = functional.moe_experts(
        leaves["x"], w1, w2, routing, b1=b1, b2=leaves.get("b2"), activation=layer.activation,
        gate_layout=choice["layout"], weight_order=choice["order"], save=choice["save"],
    )  # fmt: skip
    grads = torch.autograd.grad(output, list(leaves.values()), inputs["d_output"])
    results = {f"d{name}": TorchDoor.as_float64(g) for name, g in zip(leaves, grads, strict=True)}
    return results | {"output": TorchDoor.as_float64(output.detach())}


def _score_type(layer) -> str:
    return "float64" if layer.dtype == "float64" else "float32"


@pytest.mark.parametrize("activation", AXES["activation"])
@pytest.mark.parametrize(("backend", "dtype"), EVERY_KIND)
def test_product(backend: str, dtype: str, activation: str) -> None:
    """Every combination of this backend, dtype and activation."""
    wrong, statements = [], {}
    for choice in combinations():
        if (choice["dtype"], choice["activation"]) != (dtype, activation):
            continue
        key = tuple(choice[axis] for axis in LAYER_AXES)
        if key not in statements:
            statements[key] = build(choice)
        layer, logits, expected = statements[key]
        with penstock.backend(backend, threads=2):
            got = run(choice, layer, logits)
        wrong += [f"{choice}: {line}" for line in far_from(got, expected, dtype)]
    assert not wrong, "\n".join(wrong[:20])


def test_every_axis_is_used() -> None:
    """An axis that no code above reads would be counted but not tested."""
    assert set(LAYER_AXES) | set(STORAGE_AXES) == set(AXES)


def test_what_is_not_covered(capsys: pytest.CaptureFixture) -> None:
    """Every option of the interface is in the product, or listed here with the reason."""
    from penstock import modules
    from penstock.routers import NAMES

    outside = {
        ("router", router): "a product of its own: tests/cases/routers.json"
        for router in ("sigmoid_topk", "token_rounding", "expert_choice", "threshold")
    }
    outside |= {
        ("save", "nothing"): "keeps nothing for backward; hostile case 27 compares its output",
    }
    options = {
        "activation": modules.ACTIVATIONS,
        "layout": modules.GATE_LAYOUTS,
        "save": modules.SAVE_POLICIES,
        "router": (*NAMES, "caller"),
        "dtype": ("float64", "float32", "bfloat16", "float16"),
    }
    missing = [
        (axis, value)
        for axis, values in options.items()
        for value in values
        if value not in AXES[axis] and (axis, value) not in outside
    ]
    total = int(np.prod([len(values) for values in AXES.values()]))
    run_count = len(combinations())
    with capsys.disabled():
        print(f"\nproduct: {run_count} of {total} combinations, on each backend of their dtype")
        for rule in PRODUCT["not_combined"]:
            print(f"  not combined: {rule['when']}: {rule['why']}")
        for (axis, value), why in outside.items():
            print(f"  not in the product: {axis} {value}: {why}")
        for backend in penstock.list_backends():
            if not backend.available:
                print(f"  backend {backend.name} not run: {backend.reason}")
    assert not missing, f"options without a place in the product: {missing}"
    assert run_count > 5000


def test_every_combination_is_counted_once() -> None:
    """Rules that exclude everything, or axes that repeat a value, would go unnoticed otherwise."""
    chosen = combinations()
    assert len({tuple(choice.values()) for choice in chosen}) == len(chosen)
    for axis, values in AXES.items():
        assert {choice[axis] for choice in chosen} == set(values), axis
