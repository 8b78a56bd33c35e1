# SPDX-License-Identifier: Apache-2.0
"""README's table says what the committed rows say, and --check notices when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

EMPTY = (
    "before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n"
    "<!-- bench-gpu:begin -->\n<!-- bench-gpu:end -->\nlast\n"
)


SHAPE = {"T": 8, "d": 4, "n": 2, "E": 4, "K": 2, "name": "tiny"}
FACTS = {"cpu": "A CPU", "threads": 2, "torch": "2.15.0", "commit": "abc"}


def row(impl: str, total: float | None, **more) -> dict:
    what = {"shape": SHAPE, "device": "cpu", "dtype": "bf16", "save": "input", "impl": impl}
    if total is None:
        return {**what, **FACTS, "not_run": "no such operation", **more}
    times = {"forward_ms": total / 4, "backward_ms": total * 3 / 4, "total_ms": total}
    return {**what, **FACTS, **times, "kept_bytes": 2_500_000, **more}


def rows(*objects: dict) -> str:
    return "".join(json.dumps(o) + "\n" for o in objects)


def run(root: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "update_readme.py", "--root", root, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rows_become_lines_with_ratios(tree):
    results = rows(row("penstock", 10.0), row("torch-loop", 25.0), row("torch-grouped", None))
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": results})
    assert run(root, "--check").returncode == 1
    assert (root / "README.md").read_text() == EMPTY

    assert run(root).returncode == 0
    text = (root / "README.md").read_text()
    cells = "cpu | bf16 | input | 8, 4, 2, 4, 2 | 2.50 | 7.50 | 10.00 | 2.50 | does not run | 2.50"
    assert f"| {cells} |\n" in text
    assert "Measured on A CPU, 2 threads, torch 2.15.0, commit abc." in text
    assert text.startswith("before\n")
    assert text.endswith(EMPTY.partition("after")[2])
    assert run(root, "--check").returncode == 0


def test_a_later_row_replaces_an_earlier_one(tree):
    root = tree(
        {
            "README.md": EMPTY,
            "benchmarks/results/a.jsonl": rows(row("penstock", 10.0)),
            "benchmarks/results/b.jsonl": rows(row("penstock", 8.0)),
        }
    )
    assert run(root).returncode == 0
    text = (root / "README.md").read_text()
    assert " 8.00 " in text
    assert " 10.00 " not in text


def test_an_edited_table_is_noticed(tree):
    results = rows(row("penstock", 10.0))
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": results})
    run(root)
    path = root / "README.md"
    path.write_text(path.read_text().replace("10.00", "9.00"))
    assert run(root, "--check").returncode == 1


def test_rows_and_marks_that_are_missing_are_named(tree):
    bad = row("penstock", 1.0)
    del bad["dtype"]
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": rows(bad)})
    result = run(root)
    assert result.returncode == 1
    assert "a.jsonl:1: a row without dtype" in result.stderr
    only_a_peer = rows(row("torch-loop", 1.0))
    result = run(tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": only_a_peer}))
    assert "no penstock row" in result.stderr
    assert run(tree({"README.md": "nothing", "benchmarks/results/a.jsonl": ""})).returncode == 1


GPU_FACTS = {
    "device": "cuda", "gpu": "A GPU", "driver": "580", "load": "uniform",
    "ceilings": {"matmul_tflops": 700.0},
}  # fmt: skip


def gpu_row(impl: str, total: float | None, **more) -> dict:
    figures = {"tflops": 500.0, "eager_total_ms": 3.5, "peak_beyond_results": 50 << 20}
    return row(impl, total, **GPU_FACTS, **(figures if total else {}), **more)


def test_gpu_rows_have_a_table_of_their_own(tree):
    yard = gpu_row("cublas", 2.0)
    del yard["kept_bytes"]
    results = rows(
        row("penstock", 10.0),
        gpu_row("penstock", 3.0),
        yard,
        gpu_row("torch-grouped", 6.0),
        gpu_row("momoe", None),
        {**gpu_row("penstock", 1.0), "pass": "profile"},
    )
    root = tree({"README.md": EMPTY, "benchmarks/results/a.jsonl": results})
    assert run(root).returncode == 0
    cpu, gpu = (root / "README.md").read_text().split("after")
    assert "10.00" in cpu and "A GPU" not in cpu
    assert "| 0.750 | 3.000 | 500 | 1.50 | 1.50 | 3.500 | 2 | 50 | 2.00 |" in gpu
    assert "A GPU" in gpu and "700 TFLOP/s" in gpu and "momoe" not in gpu
    assert run(root, "--check").returncode == 0


def test_without_rows_there_is_no_table(tree):
    root = tree({"README.md": EMPTY})
    assert run(root, "--check").returncode == 0


def test_readme_of_this_project_is_up_to_date():
    assert run(ROOT, "--check").returncode == 0
