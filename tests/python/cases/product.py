# SPDX-License-Identifier: Apache-2.0
"""The product of tests/cases/products.json as code: its combinations, their layers and their runs.

Combinations that differ only in layout, order and save policy share one statement. Used on the CPU
by test_coverage.py, on the GPU by tests/python/cuda.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from case_layer import declared, make_layer, statement
from doors import TorchDoor

import penstock
from penstock import functional

PRODUCT = declared("products")
AXES = PRODUCT["axes"]
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


def spread_logits(shape: list[int], load: str, dtype: str) -> np.ndarray:
    """Logits (T, E) that put the load where the case wants it."""
    num_tokens, _, _, num_experts, top_k = shape
    logits = np.random.default_rng(5).normal(size=(num_tokens, num_experts))
    if load == "one_expert":  # as few experts as top_k allows
        logits[:, :top_k] += 20.0
    if load == "empty_experts":
        logits[:, [0, num_experts - 1]] -= 20.0
    return logits.astype(np.float64 if dtype == "float64" else np.float32).astype(np.float64)


def caller_ids(shape: list[int], load: str) -> np.ndarray:
    """Ids (T, K) that a caller brings."""
    num_tokens, _, _, num_experts, top_k = shape
    ids = make_layer(shape, "float64").ids.copy()
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


def chosen_by(router: str, logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids (T, K) in float64."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k].astype(np.int32)
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


def build(choice: dict, shape: list[int]):
    """The layer of a choice, its logits (None for a caller's routing) and its statement."""
    layer = make_layer(shape, choice["dtype"], activation=choice["activation"], bias=choice["bias"])
    if choice["router"] == "caller":
        layer = layer.with_(ids=caller_ids(shape, choice["load"]))
        return layer, None, statement(layer)
    logits = spread_logits(shape, choice["load"], choice["dtype"])
    scores, ids = chosen_by(choice["router"], logits, shape[4])
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


def run(choice: dict, layer, logits, door=TorchDoor) -> dict[str, np.ndarray]:
    """A torch door with the choice's layout, order and save policy; results as float64."""
    inputs = door.inputs(layer)
    leaves = {name: inputs[name] for name in ("x", "w1", "w2", "b1", "b2") if name in inputs}
    leaves["logits" if logits is not None else "scores"] = (
        inputs["scores"] if logits is None else door.array(logits, _score_type(layer))
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
    results = {f"d{name}": door.as_float64(g) for name, g in zip(leaves, grads, strict=True)}
    return results | {"output": door.as_float64(output.detach())}


def _score_type(layer) -> str:
    return "float64" if layer.dtype == "float64" else "float32"
