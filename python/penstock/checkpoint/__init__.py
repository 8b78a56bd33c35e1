# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Mixture-of-Experts models: safetensors, experts fused or one by one.

    penstock.checkpoint.convert(source, destination, to="fused")     # or `penstock convert`
    penstock.load(model, source)                                     # either layout, into a model

Reading is strict (a malformed file is refused with the byte where it goes wrong), writing is
atomic, and every byte of a source goes to exactly one place. convert() needs neither torch nor the
safetensors package.
"""

from __future__ import annotations

from typing import Any

from penstock.checkpoint.convert import convert
from penstock.checkpoint.errors import CheckpointError
from penstock.checkpoint.folder import Checkpoint

__all__ = ["Checkpoint", "CheckpointError", "convert", "load"]


def __getattr__(name: str) -> Any:
    """load, which needs torch, at its first use."""
    if name != "load":
        raise AttributeError(f"module 'penstock.checkpoint' has no attribute {name!r}")
    from penstock.checkpoint.into_model import load

    return load
