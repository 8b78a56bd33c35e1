# SPDX-License-Identifier: Apache-2.0
"""Draws text from a trained model, the same text every time for the same weights and seed."""

from __future__ import annotations

import torch
from penstock.train.trainer import Trainer

TEMPERATURE = 0.8
LENGTH = 400
PROMPT = b"\n\ndef "


def sample(trainer: Trainer, prompt: bytes = PROMPT, length: int = LENGTH) -> bytes:
    """`prompt` and `length` bytes after it, each drawn given at most one window before it."""
    generator = torch.Generator().manual_seed(trainer.config.seed)
    window = trainer.config.model.sequence
    text = list(prompt)
    for _ in range(length):
        logits = trainer.logits(torch.tensor([text[-window:]]))[0, -1]
        probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(text)
