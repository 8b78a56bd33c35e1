# SPDX-License-Identifier: Apache-2.0
"""Every declared hostile case has a test at each of its doors, and says why where it has none."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from case_layer import HOSTILE
from doors import TESTED

HERE = Path(__file__).resolve().parent
CPP = HERE.parents[1] / "cpp" / "hostile"
CUDA = HERE.parent / "cuda"
DOOR_NAMES = ("cpp", "numpy", "torch", "cuda")
COVERED = {*range(1, 24), 25, 26, 27, 28, 34, 35}


def numbers_in_cpp() -> set[int]:
    """Case numbers in the names of the C++ tests."""
    return {
        int(number)
        for path in CPP.glob("*.cpp")
        for number in re.findall(r"TEST(?:_P)?\(\w+, Case(\d\d)_", path.read_text("utf-8"))
    }


@pytest.fixture(scope="module", autouse=True)
def every_test_module() -> None:
    """Importing them fills TESTED, also when only this file was chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CUDA)
        for path in (*HERE.glob("test_hostile_*.py"), *CUDA.glob("test_cuda_*.py")):
            importlib.import_module(path.stem)


def test_the_list_is_complete() -> None:
    assert set(HOSTILE) == COVERED


@pytest.mark.parametrize("number", sorted(HOSTILE))
def test_each_door_has_a_test(number) -> None:
    declared = HOSTILE[number]
    tested = TESTED[number] | ({"cpp"} if number in numbers_in_cpp() else set())
    assert tested == set(declared["doors"])
    for door in set(DOOR_NAMES) - set(declared["doors"]):
        assert declared.get("why_not", {}).get(door), f"no reason why {door} has no test"


def test_the_document_names_every_case() -> None:
    text = (HERE.parents[2] / "docs" / "hostile-cases.md").read_text(encoding="utf-8")
    for number, declared in HOSTILE.items():
        assert f"| {number} | {declared['title']}" in text, number
