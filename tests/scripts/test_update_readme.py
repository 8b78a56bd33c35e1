# SPDX-License-Identifier: Apache-2.0
"""README's table says what the committed rows say, and --check notices when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

EMPTY = "before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n"


def row(impl: str, total: float, **more) -> dict:
    shape = {"T": 8, "d": 4, "n": 2, "E": 4, "K": 2}
    times = {"forward_ms": total / 4, "backward_ms": total * 3 / 4, "total_ms": total}
    return {"shape": shape, "device": "cpu", "dtype": "bf16", "impl": impl, **times, **more}


def rows(*objects: dict) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def run(root: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "update_readme.py", "--root", root, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rows_become_lines_with_ratios(tree):
    results = rows(row("fast", 10.0, kept_bytes=2_500_000), row("torch-eager", 25.0))
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": results})
    assert run(root, "--check").returncode == 1
    assert (root / "README.md").read_text() == EMPTY

    assert run(root).returncode == 0
    text = (root / "README.md").read_text()
    assert "| cpu | bf16 | 8, 4, 2, 4, 2 | fast | 2.50 | 7.50 | 10.00 | 2.50 | 2.50 |\n" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert run(root, "--check").returncode == 0


def test_a_later_row_replaces_an_earlier_one(tree):
    root = tree(
        {
            "README.md": EMPTY,
            "benchmarks/results/a.jsonl": rows(row("fast", 10.0)),
            "benchmarks/results/b.jsonl": rows(row("fast", 8.0)),
        }
    )
    assert run(root).returncode == 0
    text = (root / "README.md").read_text()
    assert " 8.00 " in text
    assert " 10.00 " not in text


def test_an_edited_table_is_noticed(tree):
    results = rows(row("fast", 10.0))
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": results})
    run(root)
    path = root / "README.md"
    path.write_text(path.read_text().replace("10.00", "9.00"))
    assert run(root, "--check").returncode == 1


def test_rows_and_marks_that_are_missing_are_named(tree):
    bad = row("fast", 1.0)
    del bad["dtype"]
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": rows(bad)})
    result = run(root)
    assert result.returncode == 1
    assert "a.jsonl:1: a row without dtype" in result.stderr
    assert run(tree({"README.md": "nothing", "benchmarks/results/a.jsonl": ""})).returncode == 1


def test_without_rows_there_is_no_table(tree):
    root = tree({"README.md": EMPTY})
    assert run(root, "--check").returncode == 0


def test_readme_of_this_project_is_up_to_date():
    assert run(ROOT, "--check").returncode == 0
