# SPDX-License-Identifier: Apache-2.0
"""`penstock train` on the GPU: the same command, a loss that falls, a run that goes on."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

from penstock import cli
from penstock.train.config import ModelConfig, RunConfig
from penstock.train.data import load_corpus
from penstock.train.metrics import read_metrics
from penstock.train.trainer import Trainer

OPTIONS = ["--layers", "2", "--hidden-size", "64", "--experts", "8", "--intermediate-size", "32",
           "--sequence", "64", "--batch", "8"]  # fmt: skip
MODEL = ModelConfig(2, 64, 4, 8, 2, 32, 64)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "argparse.txt"
    path.write_text(inspect.getsource(argparse)[:60000], encoding="utf-8")
    return path


def test_the_unchanged_command_uses_the_gpu_and_goes_on(text_file, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    command = ["train", "--data", str(text_file), "--out", str(run), *OPTIONS]
    assert cli.main([*command, "--steps", "40", "--eval-every", "20"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert cli.main(["train", "--resume", str(run), "--steps", "60"]) == 0
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert len(losses) == 60 and losses[-1] < 0.8 * losses[0]
    assert json.loads((run / "config.json").read_text())["device"] == "auto"


def test_the_gpu_learns_what_the_cpu_learns(text_file) -> None:
    """bf16 against fp32: not the same bits, but the same curve."""
    corpus = load_corpus((str(text_file),), MODEL.sequence)
    curves = []
    for device in ("cuda", "cpu"):
        config = RunConfig(MODEL, (str(text_file),), steps=30, batch=8, device=device)
        trainer = Trainer(config, corpus)
        assert trainer.device.type == device
        curves.append([trainer.train_step().loss for _ in range(30)])
    assert curves[0][0] == pytest.approx(curves[1][0], rel=0.01)
    assert curves[0][-1] == pytest.approx(curves[1][-1], rel=0.05)


def test_two_runs_on_the_gpu_have_the_same_first_losses(text_file) -> None:
    """Our layers are deterministic; torch's own backward of the embedding adds in any order."""
    corpus = load_corpus((str(text_file),), MODEL.sequence)
    config = RunConfig(MODEL, (str(text_file),), steps=30, batch=8, device="cuda")
    first, second = (Trainer(config, corpus).train_step() for _ in range(2))
    assert first.loss == second.loss and first.aux_loss == second.aux_loss
