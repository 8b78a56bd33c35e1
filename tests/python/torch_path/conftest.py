# SPDX-License-Identifier: Apache-2.0
"""Every test here runs under penstock.backend("torch"), and may use the helpers of ../cases."""

import sys
from pathlib import Path

import pytest

import penstock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cases"))


@pytest.fixture(autouse=True)
def torch_chosen():
    """Chosen by name for the whole test; a test enters a block of its own for another backend."""
    with penstock.backend("torch"):
        yield
