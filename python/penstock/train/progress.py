# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere.

Text that does not come from this program (paths, sampled bytes) is never read as rich markup and
never carries control characters to the terminal. Used by loop.py and command.py.
"""

from __future__ import annotations

from penstock.train.config import RunConfig
from penstock.train.trainer import Evaluation, StepResult
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_LINES = 40  # about so many lines in a whole run when there is no terminal


class Display:
    """Lines and a bar; `begin` and `end` bracket one phase of training."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._bar: Progress | None = None
        self._task = None
        self._every = 1
        self._steps = 0
        self._tokens_per_step = 0

    def line(self, text: str) -> None:
        """A line above the bar; soft-wrapped so that paths stay whole."""
        self.console.print(Text(text), soft_wrap=True, highlight=False)

    def begin(self, config: RunConfig, step: int) -> None:
        """A phase starts (or goes on) at `step`."""
        self._steps = config.steps
        self._every = max(1, config.steps // PLAIN_LINES)
        self._tokens_per_step = config.batch * config.model.sequence
        if not self._live:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} nats/byte"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
        )
        name = "MoE" if config.model.feed_forward == "moe" else "dense"
        self._task = self._bar.add_task(
            name, total=config.steps, completed=step, loss="   - ", speed="-"
        )
        self._bar.start()

    def step(self, step: int, result: StepResult, tokens_per_s: float) -> None:
        """A step was done: the bar moves, or once in a while a line appears."""
        if self._bar is not None:
            speed = f"{tokens_per_s:,.0f}"
            self._bar.update(self._task, completed=step, loss=f"{result.loss:.3f}", speed=speed)
        elif step % self._every == 0 or step == 1:
            left = round((self._steps - step) * self._tokens_per_step / tokens_per_s)
            self.line(
                f"step {step:>6}/{self._steps}  loss {result.loss:.4f}  "
                f"{tokens_per_s:>8,.0f} tokens/s  ETA {left // 60}:{left % 60:02d}"
            )

    def evaluation(self, step: int, evaluation: Evaluation, result: StepResult) -> None:
        """A line with the held-out loss and how evenly the experts are used."""
        text = f"step {step:>6}/{self._steps}  held-out {evaluation.loss:.4f} nats/byte"
        if evaluation.loads:
            shares = [share for layer in evaluation.relative_loads() for share in layer]
            text += (
                f"  expert load {min(shares):.2f} to {max(shares):.2f} of an equal share"
                f"  idle {evaluation.idle_experts()} of {len(shares)}"
                f"  aux {result.aux_loss:.3f}"
            )
        self.line(text)

    def end(self) -> None:
        """The phase is over, complete or not."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def printable(raw: bytes) -> str:
    """Bytes as text that cannot steer a terminal: control characters become a middle dot."""
    text = raw.decode("utf-8", errors="replace")
    return "".join(c if c in "\n\t" or c.isprintable() else "·" for c in text)
