# SPDX-License-Identifier: Apache-2.0
"""A checkpoint comes back bit for bit, survives a crash at any write, and is refused if damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import quiet_session, tiny_config

from penstock.train import checkpoint, config, loop
from penstock.train.checkpoint import Progress, Training
from penstock.train.data import Corpus
from penstock.train.errors import TrainError
from penstock.train.metrics import read_metrics
from penstock.train.trainer import Trainer


def trained(text_file: Path, corpus: Corpus, steps: int) -> Trainer:
    trainer = Trainer(tiny_config(text_file), corpus)
    for _ in range(steps):
        trainer.train_step()
    return trainer


def save(run: Path, trainer: Trainer) -> Path:
    progress = Progress(trainer.step, trainer.corpus.fingerprint, 1.5)
    return checkpoint.save(
        run, trainer.config, Training(trainer.model, trainer.optimizer), progress
    )


def saved_bytes(folder: Path) -> tuple[bytes, bytes]:
    return (folder / checkpoint.MODEL).read_bytes(), (folder / checkpoint.OPTIMIZER).read_bytes()


def rows(run: Path) -> list[dict]:
    """What must not depend on interruptions: everything but speed and the resume marks."""
    kept = [r for r in read_metrics(run / "metrics.jsonl") if r["event"] in ("train", "eval")]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in kept]


def test_round_trip_continues_with_the_same_bits(
    text_file: Path, corpus: Corpus, tmp_path: Path
) -> None:
    trainer = trained(text_file, corpus, 3)
    folder = save(tmp_path, trainer)
    assert checkpoint.read_config(folder) == trainer.config
    assert checkpoint.read_progress(folder) == Progress(3, corpus.fingerprint, 1.5)
    expected = [trainer.train_step() for _ in range(3)]
    drawn = torch.rand(2)

    other = Trainer(tiny_config(text_file), corpus)
    checkpoint.load(folder, Training(other.model, other.optimizer))
    other.step = 3
    assert [other.train_step() for _ in range(3)] == expected
    assert torch.equal(torch.rand(2), drawn)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("stop_at", [1, 6, 10])
def test_resumed_run_ends_in_the_same_bits(
    text_file: Path, corpus: Corpus, tmp_path: Path, stop_at: int
) -> None:
    settings = tiny_config(text_file)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    assert loop.train(whole, settings, quiet_session(corpus)).complete
    assert not loop.train(halves, settings, quiet_session(corpus, stop_at)).complete
    torch.manual_seed(99)  # whatever happens in between must not matter
    assert loop.train(halves, settings, quiet_session(corpus)).complete
    last = [checkpoint.complete_checkpoints(run)[-1] for run in (whole, halves)]
    assert last[0].name == last[1].name == "step-00000012"
    assert saved_bytes(last[0]) == saved_bytes(last[1])
    assert rows(whole) == rows(halves)
    assert len(rows(whole)) == 12 + 3


class Crash(BaseException):
    """Stands for the end of the process: nothing gets to tidy up."""


def count_down(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Callable:
    """Makes the at-th step towards the disk fail; returns how many were taken."""
    taken = [0]

    def wrap(function: Callable) -> Callable:
        def failing(*args: object, **kwargs: object) -> object:
            taken[0] += 1
            if taken[0] == at:
                raise error
            return function(*args, **kwargs)

        return failing

    monkeypatch.setattr(checkpoint, "sync", wrap(checkpoint.sync))
    monkeypatch.setattr(os, "rename", wrap(os.rename))
    monkeypatch.setattr(shutil, "rmtree", wrap(shutil.rmtree))
    monkeypatch.setattr(safetensors.torch, "save_file", wrap(safetensors.torch.save_file))
    return lambda: taken[0]


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")])
def test_failure_at_any_write_leaves_a_complete_checkpoint(
    text_file: Path, corpus: Corpus, tmp_path: Path, error: BaseException
) -> None:
    trainer = trained(text_file, corpus, 1)
    save(tmp_path, trainer)
    trainer.train_step()
    before = save(tmp_path, trainer)
    content = saved_bytes(before)
    trainer.train_step()
    at = 0
    while True:
        at += 1
        run = tmp_path / f"run{at}"
        shutil.copytree(tmp_path / "checkpoints", run / "checkpoints")
        with pytest.MonkeyPatch.context() as patch:
            taken = count_down(patch, at, error)
            try:
                save(run, trainer)
            except (Crash, TrainError) as raised:
                assert isinstance(raised, Crash) or "No space left" in str(raised)
            if taken() < at:
                break
        newest = checkpoint.complete_checkpoints(run)[-1]
        step = checkpoint.read_progress(newest).step
        assert step in (2, 3)
        assert saved_bytes(run / "checkpoints" / before.name) == content
        assert checkpoint.read_progress(save(run, trainer)).step == 3  # a later save succeeds
    assert at >= 9, "every step towards the disk was failed once"


def test_only_the_newest_are_kept(text_file: Path, corpus: Corpus, tmp_path: Path) -> None:
    loop.train(tmp_path, tiny_config(text_file, checkpoint_every=3), quiet_session(corpus))
    names = [path.name for path in checkpoint.complete_checkpoints(tmp_path)]
    assert names == ["step-00000009", "step-00000012"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names


def damage(folder: Path, how: str) -> None:
    model, state = folder / checkpoint.MODEL, folder / checkpoint.STATE
    if how == "truncated":
        model.write_bytes(model.read_bytes()[:-7])
    elif how == "flipped":
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(content)
    elif how == "missing":
        (folder / checkpoint.OPTIMIZER).unlink()
    elif how == "unreadable state":
        state.write_text("{")
    elif how == "odd state":
        state.write_text(json.dumps({"format": 1, "step": "x"}))
    elif how == "state is a list":
        state.write_text("[1]")
    elif how == "not utf-8":
        state.write_bytes(b"\xff\xfe")


HOW = (
    "truncated", "flipped", "missing", "unreadable state", "odd state", "state is a list",
    "not utf-8",
)  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_damage_is_named(text_file: Path, corpus: Corpus, tmp_path: Path, how: str) -> None:
    folder = save(tmp_path, trained(text_file, corpus, 1))
    damage(folder, how)
    with pytest.raises(TrainError, match=str(folder)) as caught:
        checkpoint.read_config(folder)
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


def test_tensors_of_another_shape_are_named(
    text_file: Path, corpus: Corpus, tmp_path: Path
) -> None:
    folder = save(tmp_path, trained(text_file, corpus, 1))
    wider = config.with_options(tiny_config(text_file), {"hidden_size": 32})
    other = Trainer(wider, corpus)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(TrainError, match=r"tensor .*16.*expected .*32"):
        checkpoint.load(folder, Training(other.model, other.optimizer))
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, before[name]), name
