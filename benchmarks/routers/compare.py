# SPDX-License-Identifier: Apache-2.0
"""Trains one small model with every router, on the same data and budget, and writes the rows.

    python benchmarks/routers/compare.py RUNS          # half an hour; goes on where it stopped
    python benchmarks/routers/compare.py RUNS --table  # tables and figure of docs, from the rows

RUNS is a folder for the runs of `penstock train`, whose summary and metrics are all that is read.
Every model is judged on the same held-out bytes; token rounding and plain top K both with plain
top K. The rows are committed beside this file, so that the table can be made without training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from penstock import losses
from penstock.train import checkpoint
from penstock.train.data import load_corpus
from penstock.train.trainer import Trainer

ROWS = Path(__file__).with_name("rows.json")
FIGURE = Path(__file__).parents[2] / "docs" / "routers.png"
STEPS = 200
WINDOW = 20  # steps of training loss that the figure takes together
TURNS = 15  # steps of each model that speed is the median of
TILE = 256  # of 512 tokens per expert: the least that SonicMoE's rule allows
SEEDS = range(5)
MODEL = {
    "layers": 2, "hidden-size": 64, "heads": 4, "experts": 16, "top-k": 2,
    "intermediate-size": 64, "sequence": 256, "batch": 16,
}  # fmt: skip
TRAINING = {
    "steps": STEPS, "eval-every": STEPS, "checkpoint-every": STEPS, "threads": 1, "tile": TILE,
}  # fmt: skip
PLAIN = {"router": "topk_softmax_normalized"}
ROUNDED = {"router": "token_rounding"}
UNAIDED = {"aux-coefficient": 0, "z-coefficient": 0}

# Name of the row, its options, and the seeds it is run with.
ROUTERS = {
    "topk_softmax_normalized": (PLAIN, SEEDS),
    "token_rounding NR-f": (ROUNDED, SEEDS),
    "token_rounding DOWN": ({**ROUNDED, "rounding": "DOWN"}, SEEDS),
    "softmax_topk": ({"router": "softmax_topk"}, [0]),
    "topk_softmax": ({"router": "topk_softmax"}, [0]),
    "sigmoid_topk, bias 0.005": ({"router": "sigmoid_topk", "bias-rate": 0.005, **UNAIDED}, [0]),
    "expert_choice": ({"router": "expert_choice", **UNAIDED}, [0]),
    "threshold 0.75": ({"router": "threshold", "threshold": 0.75, **UNAIDED}, [0]),
}


def train(folder: Path, options: dict[str, object]) -> dict:
    """One run of `penstock train`, unless `folder` has a finished one; a row of what it says."""
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "penstock.cli", "train", "--out", str(folder)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["event"] == "train"]
    late = steps[len(steps) // 2 :]
    loads = torch.tensor(summary["loads"])
    return {
        "train_loss": [round(row["loss"], 4) for row in steps],
        "loss": summary["results"][-1]["nats_per_byte"],
        "loads": summary["loads"],
        "violation": max(losses.max_load_violation(layer).item() for layer in loads),
        "padding": statistics.mean(row["padding"] for row in late),
        "train_violation": statistics.mean(row["max_violation"] for row in late),
        "entropy": statistics.mean(row["entropy"] for row in late),
        "drop_rate": statistics.mean(row["drop_rate"] for row in late),
        "without_expert": statistics.mean(row["without_expert"] for row in late),
    }


def speeds(runs: Path) -> dict[str, float]:
    """Tokens per second of every trained model; steps in turns, so that all meet the same load."""
    trainers = {}
    for name, (_, seeds) in ROUTERS.items():
        folder = runs / f"{name.replace(' ', '_')}-{seeds[0]}"
        saved = checkpoint.complete_checkpoints(folder)[-1]
        config = dataclasses.replace(checkpoint.read_config(saved), steps=10 * STEPS)
        corpus = load_corpus(config.data, config.model.sequence)
        trainer = trainers[name] = Trainer(config, corpus)
        checkpoint.load(saved, checkpoint.Training(trainer.model, trainer.optimizer))
        trainer.step = STEPS
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(TURNS):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.train_step()
            times[name].append(time.perf_counter() - began)
    tokens = MODEL["batch"] * MODEL["sequence"]
    return {name: tokens / statistics.median(spent) for name, spent in times.items()}


def run_all(runs: Path) -> dict:
    """Every row, trained where it is not yet, and the speeds; what the tables are made from."""
    rows = []
    for name, (options, seeds) in ROUTERS.items():
        for seed in seeds:
            folder = runs / f"{name.replace(' ', '_')}-{seed}"
            row = train(folder, {**MODEL, **TRAINING, **options, "seed": seed})
            rows.append({"router": name, "seed": seed, **row})
    results = {"rows": rows, "tokens_per_s": speeds(runs)}
    ROWS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def comparison(results: dict) -> str:
    """The table of all routers, means over their seeds."""
    rows, rates = results["rows"], results["tokens_per_s"]
    lines = [
        "| router | seeds | held-out nats/byte | seed 0 | load violation, held-out | in training "
        "| entropy | dropped | without expert | padding | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ROUTERS:
        mine = [row for row in rows if row["router"] == name]

        def mean(key: str, mine: list[dict] = mine) -> float:
            return statistics.mean(row[key] for row in mine)

        lines.append(
            f"| {name} | {len(mine)} | {mean('loss'):.4f} | {mine[0]['loss']:.4f} "
            f"| {mean('violation'):.2f} "
            f"| {mean('train_violation'):.2f} | {mean('entropy'):.2f} | {mean('drop_rate'):.1%} "
            f"| {mean('without_expert'):.1%} | {mean('padding'):.1%} "
            f"| {rates[name]:,.0f} |"
        )
    return "\n".join(lines)


def paired(rows: list[dict]) -> str:
    """Held-out loss of both roundings less that of plain top K, seed by seed."""
    by_run = {(row["router"], row["seed"]): row["loss"] for row in rows}
    lines = []
    for name in ("token_rounding NR-f", "token_rounding DOWN"):
        gaps = [by_run[name, seed] - by_run["topk_softmax_normalized", seed] for seed in SEEDS]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        each = ", ".join(f"{gap:+.4f}" for gap in gaps)
        lines.append(
            f"{name} less plain top K, {len(gaps)} seeds: {statistics.mean(gaps):+.4f} nats/byte, "
            f"standard error {error:.4f} ({each})."
        )
    return "\n\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Training loss of plain top K and of both roundings, means over seeds, smoothed over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name in ("topk_softmax_normalized", "token_rounding NR-f", "token_rounding DOWN"):
        losses_of = [row["train_loss"] for row in results["rows"] if row["router"] == name]
        curve = torch.tensor(losses_of).mean(0)
        smooth = curve.unfold(0, WINDOW, 1).mean(1)
        axes.plot(range(WINDOW, len(curve) + 1), smooth, label=f"{name}, {len(losses_of)} seeds")
    axes.set_xlabel("training step")
    axes.set_ylabel(f"loss (nats per byte), mean of {WINDOW} steps")
    axes.set_ylim(2.1, 2.8)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Train and write the rows, or print the tables of the rows there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = json.loads(ROWS.read_text(encoding="utf-8")) if args.table else run_all(args.runs)
    rows = results["rows"]
    floor = losses.sampling_floor(sum(rows[0]["loads"][0]), len(rows[0]["loads"][0]))
    draw(results, FIGURE)
    print(comparison(results), paired(rows), sep="\n\n")
    print(f"\nLoad violation of a perfect router on as many slots: {floor:.3f}.")


if __name__ == "__main__":
    main()
