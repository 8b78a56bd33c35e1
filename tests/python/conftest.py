# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by the Python tests: which CPU backends this machine runs."""

import json
from pathlib import Path

import penstock
import pytest

CASES = Path(__file__).resolve().parents[1] / "cases"


def pytest_generate_tests(metafunc):
    """Tests that take `cpu_backend` run on every CPU backend that this machine can use."""
    if "cpu_backend" in metafunc.fixturenames:
        names = [b.name for b in penstock.list_backends() if b.device == "cpu" and b.available]
        metafunc.parametrize("cpu_backend", names)


@pytest.fixture(scope="session")
def tolerances():
    """The errors that tests accept: tests/cases/tolerances.json."""
    return json.loads((CASES / "tolerances.json").read_text(encoding="utf-8"))
