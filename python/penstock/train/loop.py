# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, metrics, evaluation, checkpoints, and stopping when asked to.

Order within a step: learn, log, evaluate if due, checkpoint if due, so every row up to a
checkpoint's step is on file before the checkpoint is. A first checkpoint is written before the
first step: a run can be resumed from the start, and a folder that cannot be written to is found
out at once. Called by command.py, once for the MoE model and once for the dense comparison.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from penstock.train import checkpoint
from penstock.train.config import RunConfig
from penstock.train.data import Corpus
from penstock.train.errors import TrainError
from penstock.train.metrics import MetricsLog
from penstock.train.progress import Display
from penstock.train.trainer import StepResult, Trainer

SPEED_MEMORY = 0.9  # weight of the past in the running mean of seconds per step


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a flag; the second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass(frozen=True)
class Session:
    """What the phases of one invocation share."""

    corpus: Corpus
    windows: np.ndarray  # held-out windows of the evaluations on the way
    display: Display
    stop: StopRequest


@dataclass
class Clock:
    """Seconds spent on this run in all, earlier invocations included, and the recent speed."""

    elapsed_s: float = 0.0
    step_s: float = 0.0
    _mark: float = dataclasses.field(default_factory=time.perf_counter)

    def add_step(self, seconds: float) -> None:
        """Count a step's time into the running mean."""
        first = self.step_s == 0.0
        share = 0.0 if first else SPEED_MEMORY
        self.step_s = share * self.step_s + (1 - share) * seconds

    def total(self) -> float:
        """Seconds up to now."""
        now = time.perf_counter()
        self.elapsed_s += now - self._mark
        self._mark = now
        return self.elapsed_s


@dataclass(frozen=True)
class Phase:
    """A trained (or stopped) model and the time it took."""

    trainer: Trainer
    folder: Path
    elapsed_s: float
    tokens_per_s: float

    @property
    def complete(self) -> bool:
        """Whether every step has been done."""
        return self.trainer.step >= self.trainer.config.steps


def train(folder: Path, config: RunConfig, session: Session) -> Phase:
    """Trains to config.steps from the newest checkpoint in `folder`, or from nothing."""
    trainer = Trainer(config, session.corpus)
    clock = Clock()
    event = "start"
    saved = checkpoint.complete_checkpoints(folder)
    if saved:
        clock.elapsed_s = _restore(saved[-1], trainer)
        event = "resume"
    else:
        _save(folder, trainer, clock)
    session.display.begin(config, trainer.step)
    try:
        with MetricsLog(folder / "metrics.jsonl") as log:
            log.append(event, trainer.step, tokens_per_step=_tokens_per_step(config))
            while trainer.step < config.steps and not session.stop.requested:
                _one_step(folder, trainer, session, (log, clock))
        _save(folder, trainer, clock)
    finally:
        session.display.end()
    speed = _tokens_per_step(config) / clock.step_s if clock.step_s else 0.0
    return Phase(trainer, folder, clock.total(), speed)


def _one_step(
    folder: Path, trainer: Trainer, session: Session, records: tuple[MetricsLog, Clock]
) -> None:
    log, clock = records
    config = trainer.config
    began = time.perf_counter()
    result = trainer.train_step()
    clock.add_step(time.perf_counter() - began)
    speed = _tokens_per_step(config) / clock.step_s
    log.append("train", trainer.step, **dataclasses.asdict(result), tokens_per_s=round(speed, 1))
    session.display.step(trainer.step, result, speed)
    last = trainer.step == config.steps
    if trainer.step % config.eval_every == 0 or last:
        _evaluate(trainer, session, log, result)
    if trainer.step % config.checkpoint_every == 0:
        _save(folder, trainer, clock)


def _evaluate(trainer: Trainer, session: Session, log: MetricsLog, result: StepResult) -> None:
    evaluation = trainer.evaluate(session.windows)
    idle = evaluation.idle_experts()
    log.append(
        "eval", trainer.step, loss=evaluation.loss, loads=evaluation.loads, idle_experts=idle
    )
    session.display.evaluation(trainer.step, evaluation, result)


def _save(folder: Path, trainer: Trainer, clock: Clock) -> None:
    progress = checkpoint.Progress(trainer.step, trainer.corpus.fingerprint, clock.total())
    training = checkpoint.Training(trainer.model, trainer.optimizer)
    checkpoint.save(folder, trainer.config, training, progress)


def _restore(saved: Path, trainer: Trainer) -> float:
    """Loads a checkpoint into the trainer; returns the seconds spent before it."""
    progress = checkpoint.read_progress(saved)
    if progress.data_fingerprint != trainer.corpus.fingerprint:
        raise TrainError(
            "--data",
            got=f"text with fingerprint {trainer.corpus.fingerprint[:12]}",
            expected=f"{progress.data_fingerprint[:12]}, which the checkpoint was trained on",
            remedy="Restore the files as they were, or start another run with --out.",
        )
    if progress.step > trainer.config.steps:
        raise TrainError(
            "--steps",
            got=trainer.config.steps,
            expected=f"at least {progress.step}, which the checkpoint has done",
            remedy="Pass more --steps.",
        )
    checkpoint.load(saved, checkpoint.Training(trainer.model, trainer.optimizer))
    trainer.step = progress.step
    return progress.elapsed_s


def _tokens_per_step(config: RunConfig) -> int:
    return config.batch * config.model.sequence
