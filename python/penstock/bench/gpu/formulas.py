# SPDX-License-Identifier: Apache-2.0
"""Work of each launch of our layer by formula: FLOP, and the bytes of its operands, each once.

SwiGLU without biases, R = T K rows, h = 2n; letters as in docs/design/layer.md. A gathered operand
counts as the T rows it is gathered from, because its repeats come from the cache where that is
large enough; what a kernel moves beyond that shows as a low GB/s. Read by launches.py.
"""

from __future__ import annotations

from typing import NamedTuple

from penstock.bench.shapes import Shape

INDEX_BYTES = 4  # ids, maps, counts and scores alike


class Work(NamedTuple):
    """What one launch has to do."""

    flop: float
    num_bytes: float


def work_of_launches(shape: Shape, element: int) -> dict[str, Work]:
    """By the names of launches.py; `element` is the bytes of a stored value (2 for bf16)."""
    _, tokens, d, n, experts, top_k = shape
    rows, h = tokens * top_k, 2 * n
    x, o, y = tokens * d * element, tokens * d * element, rows * d * element
    pre, act = rows * h * element, rows * n * element
    w1, w2 = experts * h * d * element, experts * n * d * element
    router, logits = experts * d * element, tokens * experts * 4
    slots = rows * INDEX_BYTES
    return {
        "logits": Work(2 * tokens * d * experts, x + router + logits),
        "top-k": Work(0, logits + 2 * slots),
        "plan": Work(0, 4 * slots),
        "up-projection": Work(2 * rows * h * d, x + w1 + pre + act),
        "down-projection": Work(2 * rows * n * d, act + w2 + y),
        "combine": Work(2 * rows * d, y + 2 * slots + o),
        "dH": Work(2 * rows * n * d, o + w2 + 2 * pre + act),
        "dS": Work(0, 2 * slots),
        "dW2": Work(2 * rows * n * d, act + o + w2),
        "dX rows": Work(2 * rows * h * d, pre + w1 + y),
        "dW1": Work(2 * rows * h * d, pre + x + w1),
        "dW1 and dW2": Work(2 * rows * (h + n) * d, pre + act + x + o + w1 + w2),
        "dX combine": Work(rows * d, y + slots + x),
        "router backward": Work(0, 3 * slots + logits),
        "router's dX and dWr": Work(4 * tokens * d * experts, 2 * x + 2 * router + logits),
    }


def bytes_of_experts(shape: Shape, experts_touched: int, element: int) -> int:
    """Bytes that a forward pass has to read at least: weights of the experts, router, x."""
    _, tokens, d, n, experts, _ = shape
    weights = experts_touched * 3 * n * d * element
    return weights + experts * d * element + tokens * d * element
