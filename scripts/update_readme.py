# SPDX-License-Identifier: Apache-2.0
"""Writes README's table of speed and memory from committed benchmark rows.

`update_readme.py` rewrites what stands between <!-- bench:begin --> and <!-- bench:end -->;
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
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->\n"
OURS = "penstock"  # any other `impl` is a peer
NEEDED = ("shape", "device", "dtype", "save", "impl", "cpu", "threads", "torch", "commit")
MEASURED = ("forward_ms", "backward_ms", "total_ms", "kept_bytes")

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
            needed = NEEDED if "not_run" in row else NEEDED + MEASURED
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


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, one line for each row of ours, and what it was measured on."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["device"], row["dtype"], row["save"], json.dumps(row["shape"], sort_keys=True))
        groups.setdefault(key, {})[row["impl"]] = row
    peers = sorted({row["impl"] for row in rows} - {OURS})

    head = ["device", "dtype", "save", "T, d, n, E, K", "forward ms", "backward ms", "both ms"]
    head += ["kept MB", *(f"{peer} takes, times ours" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for by_impl in groups.values():
        ours = by_impl.get(OURS)
        if ours is None or "not_run" in ours:
            raise BadRows(f"no {OURS} row that ran beside {', '.join(by_impl)}")
        lines.append(line_of(ours, by_impl, peers))
    shown = [row for by_impl in groups.values() for row in by_impl.values()]
    return "\n".join([*lines, "", caption(shown), ""])


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
