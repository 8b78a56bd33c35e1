# SPDX-License-Identifier: Apache-2.0
"""What reaches the terminal is harmless, and what reads metrics.jsonl copes with kills."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from penstock.train.config import RunConfig
from penstock.train.metrics import MetricsLog, read_metrics
from penstock.train.progress import Display, printable
from penstock.train.trainer import Evaluation, StepResult

RESULT = StepResult(
    loss=2.5,
    lr=1e-3,
    grad_norm=1.0,
    aux_loss=1.1,
    z_loss=2.0,
    idle_experts=0,
    max_load=1.5,
    entropy=1.0,
    max_violation=0.5,
    drop_rate=0.0,
    without_expert=0.0,
    padding=0.0,
)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable(b"a\x1b[31m\tb\n\x00\x07") == "a·[31m\tb\n··"
    assert printable("é".encode() + b"\xff") == "é\ufffd"


def test_markup_in_text_is_printed_as_it_is() -> None:
    out = io.StringIO()
    Display(Console(file=out, width=200)).line("[red]x[/red] [/nothing]")
    assert out.getvalue() == "[red]x[/red] [/nothing]\n"


def test_terminal_shows_a_live_bar_and_files_get_lines() -> None:
    screens = {}
    for live in (True, False):
        out = io.StringIO()
        display = Display(Console(file=out, force_terminal=live, width=140))
        display.begin(RunConfig(steps=80), 0)
        for step in range(1, 81):
            display.step(step, RESULT, 1234.0)
        display.evaluation(80, Evaluation(loss=2.0, loads=[[3, 0, 1]]), RESULT)
        display.end()
        screens[live] = out.getvalue()
    assert "\x1b" in screens[True] and "80/80" in screens[True] and "ETA" in screens[True]
    assert "\x1b" not in screens[False] and screens[False].count("\n") == 42
    for screen in screens.values():
        assert "2.500" in screen and "1,234 tokens/s" in screen
        assert "expert load 0.00 to 2.25 of an equal share  idle 1 of 3" in screen


def test_steps_run_again_after_a_kill_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("start", 0)
        for step in range(1, 6):
            log.append("train", step, loss=float(step))
    with open(path, "a") as file:
        file.write('{"event": "train", "st')
    with MetricsLog(path) as log:
        log.append("resume", 3)
        log.append("train", 4, loss=4.0)
    rows = [r for r in read_metrics(path) if r["event"] == "train"]
    assert [(r["step"], r["loss"]) for r in rows] == [(s, float(s)) for s in range(1, 5)]
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4 and len(lines) == 9
