# SPDX-License-Identifier: Apache-2.0
"""Where a run computes and in which dtype: the GPU in bf16 where torch and penstock both can use
it, else the CPU in fp32. Weights, moments and losses are fp32 everywhere.

An option that is given is never overruled: what it excludes is an error or, for `--device auto`, a
reason for the CPU. Called by the command line (early, for its errors) and by the trainer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import penstock
from penstock.train.config import RunConfig
from penstock.train.errors import TrainError


class Placement(NamedTuple):
    """A device, and the dtype of the matrix products."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        name = "CPU"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"


def resolve_placement(config: RunConfig) -> Placement:
    """The placement that a configuration asks for; TrainError where that cannot be."""
    if config.device != "cpu":
        reason = why_no_gpu(config)
        if not reason:
            return Placement(torch.device("cuda"), torch.bfloat16)
        if config.device == "cuda":
            raise TrainError(
                "--device",
                got=f"'cuda' ({reason})",
                expected="a GPU that torch and penstock can use",
                remedy="Pass --device cpu; `penstock info` lists the backends.",
            )
    bf16 = config.dtype == "bf16"
    return Placement(torch.device("cpu"), torch.bfloat16 if bf16 else torch.float32)


def why_no_gpu(config: RunConfig) -> str:
    """Why this run cannot be on a GPU; empty if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    backends = [backend for backend in penstock.list_backends() if backend.device == "cuda"]
    if not any(backend.available for backend in backends):
        reasons = "; ".join(f"{backend.name}: {backend.reason}" for backend in backends)
        return reasons or "this build of penstock has no CUDA backend"
    if config.dtype == "fp32":
        return "its products take bf16, not the fp32 of --dtype"
    model = config.model  # the dense model's sizes count too: a comparison runs in one place
    tokens = config.batch * model.sequence
    shape = (tokens, model.hidden_size, model.intermediate_size, model.experts, model.top_k)
    return penstock.why_not("cuda", shape, dtype="bfloat16", device="cuda")
