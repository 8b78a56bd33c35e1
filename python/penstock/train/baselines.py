# SPDX-License-Identifier: Apache-2.0
"""Unigram and bigram byte models: the marks a language model has to beat.

Both are counted on the training side with add-one smoothing, p(b | a) = (c(a, b) + 1) /
(c(a) + 256), and scored on exactly the held-out bytes that the network is scored on.
"""

from __future__ import annotations

import numpy as np
from penstock.train.config import VOCABULARY

_CHUNK = 1 << 24  # bytes counted at a time, which bounds the temporary arrays


def unigram_loss(train: np.ndarray, windows: np.ndarray) -> float:
    """Nats per byte of the targets windows[:, 1:]."""
    counts = np.zeros(VOCABULARY, dtype=np.int64)
    for start in range(0, len(train), _CHUNK):
        counts += np.bincount(train[start : start + _CHUNK], minlength=VOCABULARY)
    log_p = np.log(counts + 1.0) - np.log(counts.sum() + VOCABULARY)
    return float(-log_p[windows[:, 1:]].mean())


def bigram_loss(train: np.ndarray, windows: np.ndarray) -> float:
    """Nats per byte of the targets windows[:, 1:], each given the byte before it."""
    counts = np.zeros(VOCABULARY * VOCABULARY, dtype=np.int64)
    for start in range(0, len(train) - 1, _CHUNK):
        part = train[start : start + _CHUNK + 1].astype(np.int32)
        counts += np.bincount(part[:-1] * VOCABULARY + part[1:], minlength=counts.size)
    table = counts.reshape(VOCABULARY, VOCABULARY)
    log_p = np.log(table + 1.0) - np.log(table.sum(axis=1, keepdims=True) + VOCABULARY)
    return float(-log_p[windows[:, :-1], windows[:, 1:]].mean())
