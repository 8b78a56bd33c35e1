# SPDX-License-Identifier: Apache-2.0
"""What the GPU's tests share: they are skipped with a reason where no GPU can run them, and after
each the device must still work, so that one test's fault is not blamed on the next.

The helpers of tests/python/cases (layers, their float64 statement, doors) are used as they are.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import penstock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cases"))

DTYPES = ("bfloat16", "float16")


@lru_cache
def why_no_gpu() -> str:
    """Why these tests cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    backends = {backend.name: backend for backend in penstock.list_backends()}
    return backends["cuda"].reason


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest):
    """Skips where there is no usable GPU; ends the whole run when a test has broken the device."""
    if why_no_gpu():
        pytest.skip(why_no_gpu())
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU does not work any more after {request.node.nodeid}: {error}", 3)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """Each storage dtype that the backend runs."""
    return request.param
