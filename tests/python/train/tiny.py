# SPDX-License-Identifier: Apache-2.0
"""A tiny model, its options and a quiet session, which the tests of `penstock train` share.

Small enough that a step takes milliseconds. Sizes are odd on purpose where the model allows it.
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from penstock import cli
from penstock.train.config import ModelConfig, RunConfig
from penstock.train.data import Corpus, evaluation_windows
from penstock.train.loop import Session
from penstock.train.progress import Display

TINY = ModelConfig(
    layers=2, hidden_size=16, heads=2, experts=5, top_k=2, intermediate_size=6, sequence=12
)
TINY_OPTIONS = [
    "--layers",
    "2",
    "--hidden-size",
    "16",
    "--heads",
    "2",
    "--experts",
    "5",
    "--top-k",
    "2",
    "--intermediate-size",
    "6",
    "--sequence",
    "12",
    "--batch",
    "4",
    "--threads",
    "2",
]


def tiny_config(text_file: Path, **changes: object) -> RunConfig:
    settings = {"data": (str(text_file),), "steps": 12, "batch": 4, "threads": 1}
    settings |= {"eval_every": 5, "checkpoint_every": 4} | changes
    return RunConfig(model=TINY, **settings)


class StopAt:
    """A stop request that comes true once a display has seen a step."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.requested = False


class QuietDisplay(Display):
    """Prints nothing and asks for a stop at the wished step."""

    def __init__(self, stop: StopAt) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.stop = stop

    def step(self, step: int, result: object, tokens_per_s: float) -> None:
        if step == self.stop.step:
            self.stop.requested = True


def quiet_session(corpus: Corpus, stop_at: int | None = None) -> Session:
    stop = StopAt(stop_at)
    windows = evaluation_windows(corpus.held_out, TINY.sequence, 8)
    return Session(corpus, windows, QuietDisplay(stop), stop)


def train_command(text_file: Path, *options: str) -> int:
    """`penstock train` on the tiny model, in this process."""
    return cli.main(["train", "--data", str(text_file), *TINY_OPTIONS, *options])
