# SPDX-License-Identifier: Apache-2.0
"""Writes README's table of speed and memory from committed benchmark rows.

`update_readme.py` rewrites what stands between <!-- bench:begin --> and <!-- bench:end -->;
`--check` fails if that would change anything, so the table cannot say what no row says. A row is
one JSON object of benchmarks/results/*.jsonl, as `penstock bench --json FILE` writes it. Rows of
one shape, dtype and machine make one line of the table: ours, and how many times longer each peer
took.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"
OURS = ("fast", "cuda", "reference")  # our backends; any other `impl` is a peer
NEEDED = ("shape", "device", "dtype", "impl", "forward_ms", "backward_ms", "total_ms")

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
            missing = [name for name in NEEDED if name not in row]
            if missing:
                raise BadRows(f"{path.name}:{number}: a row without {', '.join(missing)}")
            rows.append(row)
    return rows


def shape_text(shape: Any) -> str:
    """T, d, n, E, K of a row's shape, however it was written."""
    if isinstance(shape, dict):
        shape = [shape[name] for name in ("T", "d", "n", "E", "K")]
    return shape if isinstance(shape, str) else ", ".join(str(extent) for extent in shape)


def is_ours(row: Row) -> bool:
    """Whether a row times one of our backends."""
    return str(row["impl"]).removeprefix("penstock").lstrip(":/-. ") in ("", *OURS)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, one line for each row of ours."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        key = (str(row["device"]), str(row["dtype"]), shape_text(row["shape"]))
        groups.setdefault(key, {})[str(row["impl"])] = row
    peers = sorted({str(row["impl"]) for row in rows if not is_ours(row)})

    head = ["device", "dtype", "T, d, n, E, K", "backend", "forward ms", "backward ms", "both ms"]
    head += ["kept MB", *(f"{peer}: times ours" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (device, dtype, shape), by_impl in groups.items():
        for ours in (row for row in by_impl.values() if is_ours(row)):
            cells = [device, dtype, shape, str(ours["impl"])]
            cells += [f"{ours[name]:.2f}" for name in ("forward_ms", "backward_ms", "total_ms")]
            kept = ours.get("kept_bytes")
            cells.append("" if kept is None else f"{kept / 1e6:.2f}")
            for peer in peers:
                row = by_impl.get(peer)
                cells.append("" if row is None else f"{row['total_ms'] / ours['total_ms']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def updated(readme: str, rows: list[Row]) -> str:
    """README with its table made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadRows(f"README has no line {BEGIN.strip()} with a line {END.strip()} behind it")
    return before + begin + (table(rows) if rows else "") + end + after


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
