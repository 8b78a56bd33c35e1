# SPDX-License-Identifier: Apache-2.0
"""A picture of a GPU run: each implementation's time over the yardstick's, shape by shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

YARDSTICK = "cublas"


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By implementation and shape: total time over the yardstick's. Empty where it did not run."""
    timed = [row for row in rows if "total_ms" in row]
    yard = {row["shape"]["name"]: row["total_ms"] for row in timed if row["impl"] == YARDSTICK}
    found: dict[str, dict[str, float]] = {}
    for row in timed:
        name = row["shape"]["name"]
        if row["impl"] != YARDSTICK and name in yard:
            found.setdefault(row["impl"], {})[name] = row["total_ms"] / yard[name]
    return found


def write_png(path: Path, rows: list[dict[str, Any]], caption: str) -> None:
    """Bars beside a line at 1, which is the yardstick; ValueError where nothing was timed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_impl = ratios(rows)
    if not by_impl:
        raise ValueError(
            "--png: got no timed row beside the yardstick, expected one. Run more peers or shapes"
        )
    names = list(dict.fromkeys(row["shape"]["name"] for row in rows))
    figure = Figure(figsize=(1.2 + 1.1 * len(names), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(by_impl)
    for index, (impl, values) in enumerate(by_impl.items()):
        places = [names.index(name) + index * width for name in values]
        axes.bar(places, list(values.values()), width, label=impl)
    axes.axhline(1.0, color="black", linewidth=0.8)
    middle = width * (len(by_impl) - 1) / 2
    axes.set_xticks([place + middle for place in range(len(names))], names, rotation=20, ha="right")
    axes.set_ylabel("forward + backward, time over cuBLAS's six products")
    axes.set_title(caption, fontsize=8)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
