# SPDX-License-Identifier: Apache-2.0
"""The end of a run: the table of held-out losses, a sample, summary.json and the picture.

Every figure in the table is over the same held-out bytes, in nats per byte. Called by command.py
once training is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from penstock.train.baselines import bigram_loss, unigram_loss
from penstock.train.data import evaluation_windows
from penstock.train.files import write_atomically
from penstock.train.loop import Phase, Session
from penstock.train.metrics import MetricsLog, read_metrics
from penstock.train.plot import PlotData, draw
from penstock.train.progress import printable
from penstock.train.sample import PROMPT, sample
from penstock.train.trainer import Evaluation

FINAL_WINDOWS = 512


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    nats_per_byte: float
    parameters: int
    active_parameters: int


def finish(ours: Phase, dense: Phase | None, session: Session) -> None:
    """Judges, prints, draws, samples; writes summary.json, train.png and sample.txt."""
    sequence = ours.trainer.config.model.sequence
    windows = evaluation_windows(session.corpus.held_out, sequence, FINAL_WINDOWS)
    session.display.line(f"Scoring {windows[:, 1:].size:,} held-out bytes")
    evaluation = ours.trainer.evaluate(windows)
    results = [
        Result("unigram (add-one)", unigram_loss(session.corpus.train, windows), 256, 256),
        Result("bigram (add-one)", bigram_loss(session.corpus.train, windows), 65536, 256),
    ]
    if dense is not None:
        loss = dense.trainer.evaluate(windows).loss
        name = "dense, same active parameters, same steps"
        results.append(Result(name, loss, *dense.trainer.model.num_parameters()))
    model = ours.trainer.model
    results.append(Result("MoE (ours)", evaluation.loss, *model.num_parameters()))
    _record(ours, results, evaluation)
    text = sample(ours.trainer)
    write_atomically(ours.folder / "sample.txt", text)
    _picture(ours, dense, results, evaluation)
    session.display.line(f"\nA sample after {PROMPT!r}:\n{printable(text)}\n")
    session.display.console.print(_table(results))
    session.display.line(
        f"MoE: {ours.trainer.step} steps in {ours.elapsed_s:.0f} s"
        + (f", {ours.tokens_per_s:,.0f} tokens/s" if ours.tokens_per_s else "")
        + f"; {evaluation.idle_experts()} idle experts on held-out text"
    )


def _record(ours: Phase, results: list[Result], evaluation: Evaluation) -> None:
    rows = [dataclasses.asdict(result) for result in results]
    document = {
        "steps": ours.trainer.step,
        "seconds": round(ours.elapsed_s, 3),
        "tokens_per_s": round(ours.tokens_per_s, 1),
        "loads": evaluation.loads,
        "idle_experts": evaluation.idle_experts(),
        "results": rows,
    }
    write_atomically(ours.folder / "summary.json", (json.dumps(document, indent=2) + "\n").encode())
    with MetricsLog(ours.folder / "metrics.jsonl") as log:
        log.append("final", ours.trainer.step, loss=evaluation.loss, results=rows)


def _picture(
    ours: Phase, dense: Phase | None, results: list[Result], evaluation: Evaluation
) -> None:
    rows = read_metrics(ours.folder / "metrics.jsonl")
    dense_rows = read_metrics(dense.folder / "metrics.jsonl") if dense is not None else []
    config = ours.trainer.config.model
    total, active = ours.trainer.model.num_parameters()
    title = (
        f"Byte-level MoE language model: {config.layers} layers, {config.experts} experts, "
        f"top {config.top_k}; {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active"
    )
    data = PlotData(
        train=_curve(rows, "train"),
        held_out=_with_final(_curve(rows, "eval"), results[-1]),
        dense_held_out=_with_final(_curve(dense_rows, "eval"), results[-2]),
        marks={result.name: result.nats_per_byte for result in results[:2]},
        loads=evaluation.relative_loads(),
        violation=_curve(rows, "train", "max_violation"),
        entropy=_curve(rows, "train", "entropy"),
        title=title,
    )
    draw(data, ours.folder / "train.png")


def _curve(rows: list[dict], event: str, name: str = "loss") -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row["event"] == event and name in row]


def _with_final(curve: list[tuple[int, float]], result: Result) -> list[tuple[int, float]]:
    """The last point over all the bytes that the table is about, not the few of the way there."""
    return [*curve[:-1], (curve[-1][0], result.nats_per_byte)] if curve else []


def _table(results: list[Result]) -> Table:
    table = Table(title="Held-out loss")
    table.add_column("model")
    for heading in ("nats/byte", "bits/byte", "parameters", "active"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.nats_per_byte:.4f}",
            f"{result.nats_per_byte / math.log(2):.4f}",
            f"{result.parameters:,}",
            f"{result.active_parameters:,}",
        )
    return table


def files_written(folder: Path) -> str:
    """The closing line: what is where."""
    names = ("checkpoints/", "metrics.jsonl", "summary.json", "sample.txt", "train.png")
    return f"Wrote {', '.join(names)} in {folder}"
