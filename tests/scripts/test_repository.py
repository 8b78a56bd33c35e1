# SPDX-License-Identifier: Apache-2.0
"""Habits of this repository that no other tool checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = {".h", ".cpp", ".cu", ".cuh", ".py", ".sh", ".cmake"}


def tracked() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        output = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = output.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def text_files() -> list[tuple[str, str]]:
    files = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            files.append((path.relative_to(ROOT).as_posix(), data.decode()))
    return files


def test_code_files_name_their_licence():
    line = "SPDX-License-Identifier: Apache-2.0"
    missing = [
        name
        for name, text in text_files()
        if Path(name).suffix in CODE and line not in "\n".join(text.split("\n", 4)[:4])
    ]
    assert missing == []


def test_nothing_is_left_for_later():
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [name for name, text in text_files() if unfinished.search(text)]
    assert found == []


def test_no_package_registry_is_named():
    """Packages come by name, through whatever registry a machine is set up with."""
    hosts = re.compile(r"pypi\.org|pythonhosted\.org|deb\.debian\.org|archive\.ubuntu\.com")
    this = Path(__file__).relative_to(ROOT).as_posix()
    found = [name for name, text in text_files() if name != this and hosts.search(text)]
    assert found == []


def test_what_the_older_torch_leaves_out_exists():
    """pytest ignores an --ignore of nothing, so a moved file would silently run again."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    paths = re.search(r"^OLDEST_LEAVES_OUT := (.+)$", makefile, re.MULTILINE).group(1).split()
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


def test_tool_versions_agree():
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements/lint.txt").read_text(), re.M)
    )
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    used = set(re.findall(r"additional_dependencies: \[([\w-]+)==([^\]]+)\]", hooks))
    assert used == set(pins.items())


def test_build_requirements_agree():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([^"]+)"', re.search(r"^requires = \[(.*)\]$", project, re.M)[1])
    given = (ROOT / "requirements/build.txt").read_text().splitlines()
    assert set(wanted) <= set(given)
