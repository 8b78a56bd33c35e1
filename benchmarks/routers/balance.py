# SPDX-License-Identifier: Apache-2.0
"""How evenly the bias of sigmoid_topk balances held-out text of the training text's distribution.

    python benchmarks/routers/balance.py RUNS   # minutes a seed; goes on where it stopped

`penstock train` holds out whole files, and a file is about one thing: what it asks of the experts
differs from the average of the others. Here the standard library is cut into pieces of 4096 bytes
first, and pieces are held out by hash, so that held-out text is drawn as training text is. No
held-out byte is trained on, and all of them are judged. The model is that of compare.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from compare import MODEL, UNAIDED, train

from penstock import losses
from penstock.train import checkpoint
from penstock.train.data import evaluation_windows, load_corpus
from penstock.train.trainer import Trainer

PIECE = 4096
SEEDS = range(2)
STEPS = 600
BATCH = 64  # the sign of a load's error is the surer the more tokens a step counts
LEARNING_RATE = 0.001  # the bias follows the router, whose last steps must not outrun it
RATE = 0.01  # falls with the learning rate, to a tenth
ROWS = Path(__file__).with_name("balance.json")
OPTIONS = {
    **MODEL, **UNAIDED, "router": "sigmoid_topk", "bias-rate": RATE, "steps": STEPS, "batch": BATCH,
    "lr": LEARNING_RATE, "eval-every": STEPS, "checkpoint-every": STEPS, "threads": 1,
}  # fmt: skip


def cut(text: bytes, folder: Path) -> Path:
    """`text` as one file for each PIECE bytes of it below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(text), PIECE):
        path = folder / f"{start // PIECE:06d}"
        path.write_bytes(text[start : start + PIECE])
    return folder


def held_out_loads(folder: Path) -> torch.Tensor:
    """How many slots every expert of every layer of a finished run gets on all held-out text."""
    saved = checkpoint.complete_checkpoints(folder)[-1]
    config = checkpoint.read_config(saved)
    corpus = load_corpus(config.data, config.model.sequence)
    trainer = Trainer(config, corpus)
    checkpoint.load(saved, checkpoint.Training(trainer.model, trainer.optimizer))
    windows = evaluation_windows(corpus.held_out, config.model.sequence, len(corpus.held_out))
    return torch.tensor(trainer.evaluate(windows).loads)


def main() -> None:
    """Train with every seed, and print and write the load violation of every layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs.absolute()
    corpus = load_corpus((), MODEL["sequence"])
    pieces = cut(corpus.train.tobytes() + corpus.held_out.tobytes(), runs / "pieces")
    rows = []
    for seed in SEEDS:
        folder = runs / f"balance-{seed}"
        loss = train(folder, {**OPTIONS, "data": pieces, "seed": seed})["loss"]
        loads = held_out_loads(folder)
        violations = [losses.max_load_violation(layer).item() for layer in loads]
        rows.append({"seed": seed, "loss": loss, "violation": violations})
        tokens = int(loads[0].sum()) // MODEL["top-k"]
        print(f"seed {seed}: {tokens:,} held-out bytes, violation of each layer", violations)
    floor = losses.sampling_floor(int(loads[0].sum()), MODEL["experts"])
    worst = statistics.mean(max(row["violation"]) for row in rows)
    print(f"worst layer, mean of {len(rows)} seeds: {worst:.3f}; by chance {floor:.3f}")
    stated = {"rate": RATE, "lr": LEARNING_RATE, "steps": STEPS, "batch": BATCH}
    results = {**stated, "tokens": tokens, "floor": floor, "rows": rows}
    ROWS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
