# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one JSON object a line, only ever appended to.

Events: "start" and "resume" (step), "train" (step, loss, lr, grad_norm, aux_loss, z_loss,
idle_experts, max_load, entropy, max_violation, drop_rate, without_expert, padding, tokens_per_s),
"eval" (step, loss, loads (layers, E), idle_experts) and "final". Steps lost to a kill are run again
after a resume and append again, so a reader drops what lies past the resumed step, and ignores a
last line cut short.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from penstock.train.errors import disk_error


class MetricsLog:
    """Appends rows, each one flushed to the operating system."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            cut_short = path.exists() and path.stat().st_size > 0 and not _ends_in_newline(path)
            self._file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise disk_error(f"opening {path}", error) from error
        if cut_short:
            self._write("\n")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, event: str, step: int, **values: object) -> None:
        """Add one row."""
        self._write(json.dumps({"event": event, "step": step, **values}) + "\n")

    def _write(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise disk_error(f"writing {self._path}", error) from error


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_metrics(path: Path) -> list[dict]:
    """The rows that count, in order of step: what a run that was never interrupted has."""
    rows: list[dict] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise disk_error(f"reading {path}", error) from error
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by a kill; its step was run again
        if isinstance(row, dict) and "event" in row and isinstance(row.get("step"), int):
            if row["event"] == "resume":
                rows = [r for r in rows if r["step"] <= row["step"] and r["event"] != "final"]
            rows.append(row)
    return rows
