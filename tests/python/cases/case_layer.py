# SPDX-License-Identifier: Apache-2.0
"""One MoE layer's inputs as float64 arrays, and its statement: the tests' own arithmetic.

The Python twin of tests/cpp/hostile/layer.h. Inputs are rounded to the storage dtype when made, so
statement and library see the same numbers. The statement is float64, rounded only where the
contract stores a value (H, A, A', dH, Y, dX~), slot by slot and vectorised; it shares no code with
the library. Weights are output_major, gate and up concatenated; ids outside [0, E) skip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np

CASES = Path(__file__).resolve().parents[2] / "cases"
NUMPY_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
GATED = ("swiglu", "geglu", "reglu", "swiglu_clamped")
MANY_ELEMENTS = 2048  # below, chance can double a root mean square: see bound_for
CLAMP_ALPHA, CLAMP_LIMIT = np.float32(1.702), 7.0


def declared(name: str) -> dict:
    """One file of tests/cases."""
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


HOSTILE = {case["number"]: case for case in declared("hostile")["cases"]}
TOLERANCES = declared("tolerances")


def parameters(number: int) -> dict:
    """The parameters of a hostile case."""
    return HOSTILE[number]["parameters"]


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """What the values become when stored."""
    if dtype == "float64":
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32).astype(NUMPY_DTYPES[dtype]).astype(np.float64)


def accumulator(dtype: str) -> str:
    """The dtype of scores and dS."""
    return "float64" if dtype == "float64" else "float32"


@dataclass
class Layer:
    """A layer's inputs. shape is (T, d, n, E, K); scores and ids are (T, K)."""

    shape: tuple[int, int, int, int, int]
    dtype: str
    x: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    scores: np.ndarray
    ids: np.ndarray
    d_output: np.ndarray
    b1: np.ndarray | None = None
    b2: np.ndarray | None = None
    activation: str = "swiglu"
    save: str = "preactivation"
    options: dict = field(default_factory=dict)  # of moe_experts, beside the above

    def with_(self, **changes) -> Layer:
        """A changed copy; arrays that are not named are shared."""
        return replace(self, **changes)


def make_layer(
    shape, dtype: str, *, activation: str = "swiglu", bias: str = "both", seed: int = 1
) -> Layer:
    """Random values of order 1 and K distinct random experts a token."""
    num_tokens, d, n, num_experts, top_k = shape
    h = 2 * n if activation in GATED else n
    random = np.random.default_rng(seed)

    def values(*sizes: int, scale: float = 1.0) -> np.ndarray:
        return rounded(random.uniform(-scale, scale, sizes), dtype)

    def distinct_ids() -> np.ndarray:
        order = random.random((num_tokens, num_experts)).argsort(axis=1)
        return order[:, :top_k].astype(np.int32)

    has_bias = bias == "both"
    return Layer(
        tuple(shape),
        dtype,
        x=values(num_tokens, d),
        w1=values(num_experts, h, d, scale=2 / d**0.5),
        w2=values(num_experts, d, n, scale=2 / n**0.5),
        b1=values(num_experts, h, scale=0.5) if has_bias else None,
        b2=values(num_experts, d, scale=0.5) if has_bias else None,
        scores=rounded(random.uniform(-1, 1, (num_tokens, top_k)), accumulator(dtype)),
        ids=distinct_ids(),
        d_output=values(num_tokens, d),
        activation=activation,
    )


def activated(kind: str, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A (slots, n) of H (slots, h), and the slopes (slots, h) by each of H's columns."""
    if kind not in GATED:
        return _one_sided(kind, h)
    gate, up = np.split(h, 2, axis=-1)
    if kind == "swiglu_clamped":
        alpha = float(CLAMP_ALPHA)
        g, u = np.minimum(gate, CLAMP_LIMIT), np.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT)
        s = _sigmoid(alpha * g)
        by_gate = np.where(gate <= CLAMP_LIMIT, (s + alpha * g * s * (1 - s)) * (u + 1), 0.0)
        by_up = np.where(np.abs(up) <= CLAMP_LIMIT, g * s, 0.0)
        return g * s * (u + 1), np.concatenate([by_gate, by_up], axis=-1)
    inner = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}[kind]
    value, slope = _one_sided(inner, gate)
    return value * up, np.concatenate([slope * up, value], axis=-1)


def _sigmoid(v: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-v))


def _normal_cdf(v: np.ndarray) -> np.ndarray:
    from math import erfc

    return 0.5 * np.vectorize(erfc, otypes=[np.float64])(-v / np.sqrt(2.0))


def _one_sided(kind: str, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if kind == "silu":
        s = _sigmoid(v)
        return v * s, s + v * s * (1 - s)
    if kind == "gelu":
        cdf = _normal_cdf(v)
        return v * cdf, cdf + v * np.exp(-0.5 * v * v) / np.sqrt(2 * np.pi)
    if kind == "gelu_tanh":
        c = np.sqrt(2 / np.pi)
        t = np.tanh(c * (v + 0.044715 * v**3))
        return 0.5 * v * (1 + t), 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * c * (
            1 + 3 * 0.044715 * v * v
        )
    positive = v > 0
    if kind == "relu_squared":
        return np.where(positive, v * v, 0.0), np.where(positive, 2 * v, 0.0)
    return np.maximum(v, 0.0), positive.astype(np.float64)


def statement(layer: Layer) -> dict[str, np.ndarray]:
    """Every result: output, dx, dscores (T, K), dw1, dw2, and db1, db2 where there are biases."""
    num_experts, top_k = layer.shape[3:]
    dtype = layer.dtype
    flat = layer.ids.reshape(-1).astype(np.int64)
    slots = np.flatnonzero((flat >= 0) & (flat < num_experts))
    experts, tokens = flat[slots], slots // max(top_k, 1)
    scores = layer.scores.reshape(-1)[slots]
    results = {
        "output": np.zeros_like(layer.x),
        "dx": np.zeros_like(layer.x),
        "dscores": np.zeros(flat.shape),
        "dw1": np.zeros_like(layer.w1),
        "dw2": np.zeros_like(layer.w2),
    }
    for name, bias in (("db1", layer.b1), ("db2", layer.b2)):
        if bias is not None:
            results[name] = np.zeros_like(bias)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for rows in np.array_split(np.arange(slots.size), max(1, slots.size // 64)):
            _add_rows(layer, results, (slots[rows], experts[rows], tokens[rows], scores[rows]))
    results["dscores"] = results["dscores"].reshape(layer.scores.shape)
    return {name: rounded(value, _stored_as(name, dtype)) for name, value in results.items()}


def _stored_as(name: str, dtype: str) -> str:
    return accumulator(dtype) if name == "dscores" else "float64"


def _add_rows(layer: Layer, results: dict, rows: tuple) -> None:
    """Adds a block of rows (routed slots) into the results."""
    slots, experts, tokens, scores = rows
    dtype = layer.dtype
    x, d_output = layer.x[tokens], layer.d_output[tokens]
    w1, w2 = layer.w1[experts], layer.w2[experts]
    h = np.einsum("rhd,rd->rh", w1, x)
    if layer.b1 is not None:
        h = h + layer.b1[experts]
    a, slopes = activated(layer.activation, rounded(h, dtype))
    y = np.einsum("rdn,rn->rd", w2, rounded(a, dtype))
    if layer.b2 is not None:
        y = y + layer.b2[experts]
    np.add.at(results["output"], tokens, scores[:, None] * rounded(y, dtype))

    g = np.einsum("rdn,rd->rn", w2, d_output)
    dscores = (g * a).sum(-1)
    if layer.b2 is not None:
        dscores = dscores + (d_output * layer.b2[experts]).sum(-1)
        np.add.at(results["db2"], experts, scores[:, None] * d_output)
    results["dscores"][slots] = dscores
    scaled = rounded(scores[:, None] * a, dtype)
    repeat = slopes.shape[-1] // g.shape[-1]
    dh = rounded(slopes * np.tile(scores[:, None] * g, (1, repeat)), dtype)
    np.add.at(results["dw2"], experts, d_output[:, :, None] * scaled[:, None, :])
    np.add.at(results["dw1"], experts, dh[:, :, None] * x[:, None, :])
    if layer.b1 is not None:
        np.add.at(results["db1"], experts, dh)
    np.add.at(results["dx"], tokens, rounded(np.einsum("rhd,rh->rd", w1, dh), dtype))


def bound_for(elements: int, dtype: str) -> float:
    """The relative error that so many results may have: a stage's, or a block's where few."""
    bound = TOLERANCES["stage"][dtype]
    return bound if elements >= MANY_ELEMENTS else TOLERANCES["block_factor"] * bound


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||; the norm of got where expected is all zero."""
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(got - expected) / (norm if norm > 0 else 1.0))


def far_from(got: dict, expected: dict, dtype: str) -> list[str]:
    """A line for every result that is not as near as the contract asks."""
    lines = []
    for name, want in expected.items():
        error = relative_l2(got[name].reshape(want.shape), want)
        bound = bound_for(want.size, dtype)
        if not error <= bound:
            lines.append(f"{name}: relative error {error:.2e}, more than {bound:.2e}")
    return lines
