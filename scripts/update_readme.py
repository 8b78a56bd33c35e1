# SPDX-License-Identifier: Apache-2.0
"""Writes README's tables of speed and memory from committed benchmark rows.

`update_readme.py` rewrites what stands between <!-- bench:begin --> and <!-- bench:end --> from the
CPU's rows, and between <!-- bench-gpu:begin --> and <!-- bench-gpu:end --> from the GPU's;
`--check` fails if that would change anything, so the table cannot say what no row says. A row is
one JSON object of benchmarks/results/*.jsonl, as `penstock bench --json FILE` writes it. Rows of
one shape, dtype, device and save policy make one line of the table: ours, and how many times longer
each peer took. A later row replaces an earlier one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "penstock"  # any other `impl` is a peer
YARDSTICK = "cublas"  # of the GPU's rows; it computes no layer
MIB = 2**20
NEEDED = ("shape", "device", "dtype", "save", "impl", "cpu", "threads", "torch", "commit")
MEASURED = ("forward_ms", "backward_ms", "total_ms")

Row = dict[str, Any]


class BadRows(ValueError):
    """A row that cannot be shown, or a README without the two marks."""


def read_rows(folder: Path) -> list[Row]:
    """Every row of every file, in order of file name and line."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if "pass" in row:  # decoding, a profile: no step of a layer
                continue
            needed = NEEDED if "not_run" in row else NEEDED + MEASURED
            if row.get("impl") != YARDSTICK and "not_run" not in row:
                needed += ("kept_bytes",)
            missing = [name for name in needed if name not in row]
            if missing:
                raise BadRows(f"{path.name}:{number}: a row without {', '.join(missing)}")
            rows.append(row)
    return rows


def line_of(row: Row, by_impl: dict[str, Row], peers: list[str]) -> str:
    """The table's line for one row of ours, with the ratio to each peer."""
    sizes = ", ".join(str(row["shape"][name]) for name in "TdnEK")
    cells = [row["device"], row["dtype"], row["save"], sizes]
    cells += [f"{row[name]:.2f}" for name in ("forward_ms", "backward_ms", "total_ms")]
    cells.append(f"{row['kept_bytes'] / 1e6:.2f}")
    for peer in peers:
        other = by_impl.get(peer, {"not_run": ""})
        ratio = other["total_ms"] / row["total_ms"] if "not_run" not in other else None
        cells.append("does not run" if ratio is None else f"{ratio:.2f}")
    return "| " + " | ".join(cells) + " |"


def caption(rows: list[Row]) -> str:
    """What the figures were measured on."""
    places = {(r["cpu"], r["threads"], r["torch"], r["commit"]) for r in rows}
    texts = [
        f"{cpu}, {threads} threads, torch {torch}, commit {commit}"
        for cpu, threads, torch, commit in sorted(places, key=str)
    ]
    return (
        "Measured on " + "; ".join(texts) + ". Medians; kept: bytes between forward and backward."
    )


def grouped(rows: list[Row]) -> list[dict[str, Row]]:
    """Rows of one shape, dtype, device, save policy and load, by implementation."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["device"], row["dtype"], row["save"], row.get("load", "uniform"))
        groups.setdefault((*key, json.dumps(row["shape"], sort_keys=True)), {})[row["impl"]] = row
    for by_impl in groups.values():
        if "total_ms" not in by_impl.get(OURS, {}):
            raise BadRows(f"no {OURS} row that ran beside {', '.join(by_impl)}")
    return list(groups.values())


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, one line for each row of ours, and what it was measured on."""
    groups = grouped(rows)
    peers = sorted({row["impl"] for row in rows} - {OURS})

    head = ["device", "dtype", "save", "T, d, n, E, K", "forward ms", "backward ms", "both ms"]
    head += ["kept MB", *(f"{peer} takes, times ours" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [line_of(by_impl[OURS], by_impl, peers) for by_impl in groups]
    shown = [row for by_impl in groups for row in by_impl.values()]
    return "\n".join([*lines, "", caption(shown), ""])


def gpu_line(by_impl: dict[str, Row], peers: list[str]) -> str:
    """The GPU table's line for one row of ours."""
    ours, yard = by_impl[OURS], by_impl.get(YARDSTICK, {})
    sizes = ", ".join(str(ours["shape"][name]) for name in "TdnEK")
    cells = [ours["shape"]["name"], sizes, ours["load"]]
    cells += [f"{ours['forward_ms']:.3f}", f"{ours['total_ms']:.3f}", f"{ours['tflops']:.0f}"]
    for name in ("forward_ms", "total_ms"):
        cells.append(f"{ours[name] / yard[name]:.2f}" if name in yard else "")
    cells.append(f"{ours['eager_total_ms']:.3f}")
    cells += [f"{ours[name] / MIB:.0f}" for name in ("kept_bytes", "peak_beyond_results")]
    for peer in peers:
        other = by_impl.get(peer, {})
        ran = "total_ms" in other
        cells.append(f"{other['total_ms'] / ours['total_ms']:.2f}" if ran else "does not run")
    return "| " + " | ".join(cells) + " |"


def gpu_table(rows: list[Row]) -> str:
    """The GPU's rows: graph-replayed times, and how many times as long as cuBLAS's six products."""
    groups = grouped(rows)
    ran = {row["impl"] for row in rows if "total_ms" in row}
    peers = sorted(ran - {OURS, YARDSTICK})
    head = [
        "shape",
        "T, d, n, E, K",
        "load",
        "forward ms",
        "both ms",
        "TFLOP/s",
        "forward / cuBLAS",
    ]
    head += ["both / cuBLAS", "both, eager ms", "kept MiB", "peak - gradients MiB"]
    head += [f"{peer} takes, times ours" for peer in peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [gpu_line(by_impl, peers) for by_impl in groups]
    places = sorted({
        f"{row['gpu']}, driver {row['driver']}, torch {row['torch']}, commit {row['commit']}, "
        f"{row['dtype']}, {row['ceilings']['matmul_tflops']:.0f} TFLOP/s in an 8192^3 product"
        for row in rows
    })  # fmt: skip
    note = "Medians, replayed as CUDA graphs, caches cleared, router included (not in cuBLAS's)."
    return "\n".join([*lines, "", "Measured on " + "; ".join(places) + ". " + note, ""])


def updated(readme: str, rows: list[Row]) -> str:
    """README with its tables made anew."""
    fast = [row for row in rows if row.get("order", "fast") == "fast"]
    on_gpu = [row for row in fast if row["device"] == "cuda"]
    on_cpu = [row for row in fast if row["device"] != "cuda"]
    readme = replaced(readme, "bench", table(on_cpu) if on_cpu else "")
    return replaced(readme, "bench-gpu", gpu_table(on_gpu) if on_gpu else "")


def replaced(readme: str, mark: str, text: str) -> str:
    """README with `text` between the two marks of this name."""
    first, last = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->\n"
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise BadRows(f"README has no line {first.strip()} with a line {last.strip()} behind it")
    return before + begin + text + end + after


def main() -> int:
    """Rewrites README, or with --check only says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if needed")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.root / "README.md"
    old = path.read_text()
    try:
        new = updated(old, read_rows(args.root / "benchmarks" / "results"))
    except (BadRows, json.JSONDecodeError) as error:
        print(f"update_readme: {error}", file=sys.stderr)
        return 1
    if args.check and new != old:
        print("README.md does not show the committed rows: run scripts/update_readme.py")
        return 1
    if new != old:
        path.write_text(new)
    print("update_readme: README.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
