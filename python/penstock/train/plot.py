# SPDX-License-Identifier: Apache-2.0
"""train.png: how the loss fell, and who did the work.

Left, loss by step with the unigram and bigram as lines to beat (and the dense model's held-out
curve where it was trained); middle, load violation and entropy of the routers by step; right, each
expert's share of the held-out text by layer, 1 being an equal share. Drawn without a display;
written in one piece. Called by report.py.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from penstock.train.files import write_atomically

SMOOTHED_SHARE = 0.04  # of the run's steps that the smoothed training loss looks back on
LABELLED_CELLS = 160  # more experts than this get colours only
OURS, DENSE, MARK = "#1f5fa8", "#c2571a", "#555555"


@dataclass(frozen=True)
class PlotData:
    """Everything in the picture; losses in nats per byte."""

    train: list[tuple[int, float]]  # (step, loss)
    held_out: list[tuple[int, float]]
    marks: dict[str, float]  # name to nats per byte, drawn as horizontal lines
    loads: list[list[float]]  # (layers, E), 1 is an equal share
    dense_held_out: list[tuple[int, float]] = field(default_factory=list)
    violation: list[tuple[int, float]] = field(
        default_factory=list
    )  # (step, largest load / mean - 1)
    entropy: list[tuple[int, float]] = field(default_factory=list)  # (step, nats)
    title: str = "penstock train"


def draw(data: PlotData, path: Path) -> None:
    """Write the picture of `data` to `path`."""
    figure = Figure(figsize=(17.0, 5.0), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 0.8, 1.0])
    figure.suptitle(data.title, fontsize=12)
    _draw_losses(left, data)
    _draw_router(middle, data)
    _draw_loads(figure, right, data.loads)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "penstock"})
    write_atomically(path, buffer.getvalue())


def _draw_losses(axes: Axes, data: PlotData) -> None:
    steps = np.array([step for step, _ in data.train])
    losses = np.array([loss for _, loss in data.train])
    if len(steps):
        axes.plot(steps, losses, color=OURS, alpha=0.25, linewidth=0.8)
        smooth = _smoothed(losses)
        axes.plot(steps, smooth, color=OURS, linewidth=1.6, label="MoE, training (smoothed)")
    if data.held_out:
        axes.plot(
            *zip(*data.held_out, strict=True),
            color=OURS, marker="o", markersize=5, linestyle="--", markerfacecolor="white",
            label=f"MoE, held-out ({data.held_out[-1][1]:.3f})",
        )  # fmt: skip
    if data.dense_held_out:
        axes.plot(
            *zip(*data.dense_held_out, strict=True),
            color=DENSE, marker="s", markersize=4, linestyle="--", markerfacecolor="white",
            label=f"dense, same active parameters, held-out ({data.dense_held_out[-1][1]:.3f})",
        )  # fmt: skip
    for style, (name, loss) in zip((":", "-."), data.marks.items(), strict=False):
        axes.axhline(loss, color=MARK, linestyle=style, linewidth=1.2, label=f"{name} ({loss:.3f})")
    if data.marks:
        # The first steps are far above; what matters happens below the unigram.
        lowest = min([*data.marks.values(), *losses, *(loss for _, loss in data.held_out)])
        axes.set_ylim(max(0.0, lowest - 0.15), max(data.marks.values()) * 1.12)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Loss")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9)


def _draw_router(axes: Axes, data: PlotData) -> None:
    """How uneven the busiest layer is, and how sure of their experts the tokens are."""
    if not data.violation:
        axes.set_axis_off()
        return
    axes.plot(*zip(*data.violation, strict=True), color=OURS, linewidth=0.9)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("training step")
    axes.set_ylabel("largest load / mean - 1, worst layer", color=OURS)
    axes.set_title("Router: load violation and entropy")
    axes.grid(alpha=0.25)
    other = axes.twinx()
    other.plot(*zip(*data.entropy, strict=True), color=DENSE, linewidth=0.9)
    other.set_ylim(bottom=0.0)
    other.set_ylabel("entropy of a token's softmax (nats)", color=DENSE)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential mean of the steps before, whose early values are not pulled towards zero."""
    memory = 1 - 1 / max(1.0, SMOOTHED_SHARE * len(values))
    result = np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values):
        total = memory * total + value
        weight = memory * weight + 1.0
        result[i] = total / weight
    return result


def _draw_loads(figure: Figure, axes: Axes, loads: list[list[float]]) -> None:
    table = np.array(loads)
    if table.size == 0:
        axes.set_axis_off()
        return
    top = max(2.0, float(table.max()))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)
    image = axes.imshow(table, aspect="auto", cmap="RdBu_r", norm=norm)
    layers, experts = table.shape
    axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    idle = int((table == 0).sum())
    axes.set_title(f"Expert load on held-out text ({idle} of {table.size} experts idle)")
    if table.size <= LABELLED_CELLS:
        for (layer, expert), share in np.ndenumerate(table):
            strong = share < 0.35 or share > 1 + 0.65 * (top - 1)
            axes.text(
                expert, layer, f"{share:.1f}", ha="center", va="center", fontsize=8,
                color="white" if strong else "black",
            )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, location="right", fraction=0.05, pad=0.02)
    bar.set_label("slots received / equal share (1 = balanced)")
