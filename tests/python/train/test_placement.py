# SPDX-License-Identifier: Apache-2.0
"""Where a run computes: the GPU only where it can, and never against an option that was given."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import penstock
from penstock import BackendInfo
from penstock.train import placement
from penstock.train.config import ModelConfig, RunConfig
from penstock.train.errors import TrainError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as the questions go that a placement asks."""
    backend = BackendInfo("cuda", "cuda", True, "", "a GPU", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(penstock, "list_backends", lambda: [backend])
    monkeypatch.setattr(penstock, "why_not", why_not)


def why_not(name, shape, *, dtype, device):
    """As the CUDA backend answers."""
    assert (name, dtype, device) == ("cuda", "bfloat16", "cuda")
    return "" if shape[2] % 8 == 0 else f"intermediate_size {shape[2]} is not a multiple of 8"


@pytest.mark.parametrize(("dtype", "device", "products"), [
    ("auto", GPU, torch.bfloat16), ("bf16", GPU, torch.bfloat16), ("fp32", CPU, torch.float32),
])  # fmt: skip
def test_auto_takes_the_gpu_for_what_it_computes(gpu, dtype, device, products):
    assert placement.resolve_placement(RunConfig(dtype=dtype)) == (device, products)


def test_the_cpu_when_asked_for(gpu):
    for dtype, products in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        config = RunConfig(device="cpu", dtype=dtype)
        assert placement.resolve_placement(config) == (CPU, products)


def test_a_gpu_that_was_asked_for_is_never_replaced(gpu):
    with pytest.raises(TrainError, match="fp32 of --dtype"):
        placement.resolve_placement(RunConfig(device="cuda", dtype="fp32"))
    with pytest.raises(TrainError, match="multiple of 8"):
        placement.resolve_placement(RunConfig(ModelConfig(intermediate_size=6), device="cuda"))


def test_sizes_that_the_gpu_cannot_run_stay_on_the_cpu(gpu):
    model = ModelConfig(intermediate_size=6)
    assert placement.resolve_placement(RunConfig(model)).device == CPU
    dense = dataclasses.replace(RunConfig(model), model=model.as_dense())
    assert placement.resolve_placement(dense).device == CPU


def test_a_backend_that_cannot_be_used_gives_its_reason(gpu, monkeypatch):
    backend = BackendInfo("cuda", "cuda", False, "another GPU", "", ())
    monkeypatch.setattr(penstock, "list_backends", lambda: [backend])
    assert placement.resolve_placement(RunConfig()).device == CPU
    with pytest.raises(TrainError, match="another GPU"):
        placement.resolve_placement(RunConfig(device="cuda"))


def test_it_is_said_in_words():
    assert str(placement.Placement(CPU, torch.bfloat16)) == "CPU, bfloat16"
