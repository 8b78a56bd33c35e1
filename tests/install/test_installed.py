# SPDX-License-Identifier: Apache-2.0
"""The installed package is the wheel that was promised: for every Python, and self-contained."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import penstock

LIB = Path(penstock.__file__).parent / "lib"


def output_of(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not on this machine")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_one_wheel_serves_every_python():
    tags = re.findall(r"^Tag: (.*)$", metadata.distribution("penstock").read_text("WHEEL"), re.M)
    assert tags
    assert all(tag.startswith("py3-none-") for tag in tags)


@pytest.mark.parametrize("name", ["libpenstock.so", "libpenstock_ffi.so"])
def test_libraries_find_their_neighbours(name):
    dynamic = output_of("readelf", "--dynamic", LIB / name)
    assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic) == ["$ORIGIN"]


@pytest.mark.parametrize("name", ["libpenstock.so", "libpenstock_ffi.so"])
def test_libraries_know_neither_python_nor_torch(name):
    dynamic = output_of("readelf", "--dynamic", LIB / name)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed
    assert not [other for other in needed if re.search(r"python|torch|c10|cuda", other)]


def test_the_binding_exports_what_tvm_ffi_looks_up_and_nothing_else():
    symbols = output_of(
        "nm", "-D", "--defined-only", "--format=just-symbols", LIB / "libpenstock_ffi.so"
    ).split()
    assert symbols
    assert [name for name in symbols if not name.startswith("__tvm_ffi_")] == []


def test_headers_and_cmake_files_come_along():
    assert (LIB.parent / "include" / "penstock" / "penstock.h").is_file()
    assert (LIB / "cmake" / "penstock" / "penstockConfig.cmake").is_file()


def test_the_version_is_the_project_s():
    assert penstock.__version__ == metadata.version("penstock")


def test_the_program_starts():
    program = Path(sys.executable).with_name("penstock")
    result = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
