# SPDX-License-Identifier: Apache-2.0
"""`penstock train` as its user meets it: files, exit codes, messages, Ctrl-C and kill -9."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from tiny import TINY_OPTIONS, train_command

from penstock import cli
from penstock.train import checkpoint
from penstock.train.command import rounding_advice
from penstock.train.config import ModelConfig, RunConfig
from penstock.train.metrics import read_metrics

# Runs the program but kills it, as kill -9 does, when the named function is about to be called
# for the N-th time: python -c KILLED_AT target N arguments...
KILLED_AT = """
import importlib, os, signal, sys
target, count = sys.argv[1], int(sys.argv[2])
module, _, path = target.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real, calls = getattr(owner, name), [0]
def killed(*args, **kwargs):
    calls[0] += 1
    if calls[0] == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, killed)
from penstock import cli
sys.exit(cli.main(sys.argv[3:]))
"""


def last_step(run: Path) -> int:
    return checkpoint.read_progress(checkpoint.complete_checkpoints(run)[-1]).step


def weights(run: Path) -> bytes:
    return (checkpoint.complete_checkpoints(run)[-1] / checkpoint.MODEL).read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with the dense comparison."""
    run = tmp_path_factory.mktemp("runs") / "done"
    options = ["--steps", "23", "--eval-every", "10", "--checkpoint-every", "10"]
    assert train_command(text_file, "--out", str(run), "--compare-dense", *options) == 0
    return run


def test_a_run_writes_what_it_promises(finished: Path) -> None:
    names = {entry.name for entry in finished.iterdir()} - {".lock"}
    assert names == {
        "checkpoints", "config.json", "dense", "metrics.jsonl", "sample.txt", "summary.json",
        "train.png",
    }  # fmt: skip
    assert last_step(finished) == last_step(finished / "dense") == 23
    rows = read_metrics(finished / "metrics.jsonl")
    assert [r["step"] for r in rows if r["event"] == "train"] == list(range(1, 24))
    evaluations = [r for r in rows if r["event"] == "eval"]
    assert [r["step"] for r in evaluations] == [10, 20, 23]
    for row in evaluations:
        assert np.array(row["loads"]).shape == (2, 5)
        assert row["idle_experts"] == int((np.array(row["loads"]) == 0).sum())
    summary = json.loads((finished / "summary.json").read_text())
    names = [row["name"].split(" ")[0].rstrip(",") for row in summary["results"]]
    assert names == ["unigram", "bigram", "dense", "MoE"]
    assert all(1 < row["nats_per_byte"] < 6 for row in summary["results"])


def test_picture_is_a_real_picture(finished: Path) -> None:
    path = finished / "train.png"
    assert path.read_bytes().startswith(b"\x89PNG") and 20_000 < path.stat().st_size < 200_000
    pixels = image.imread(path)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
    colours = np.unique((pixels[..., :3] * 15).astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 50  # curves, heat map and text, not an empty frame


def test_messages_name_the_four_figures(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert train_command(text_file, "--out", out, "--steps", "4", "--compare-dense") == 0
    text = capsys.readouterr().out
    for word in ("unigram", "bigram", "dense", "MoE (ours)", "nats/byte", "tokens/s", "ETA"):
        assert word in text, word
    for word in ("expert load", "idle", "held-out", "A sample after"):
        assert word in text, word
    assert "\x1b" not in text


def test_default_folders_are_numbered(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train_command(text_file, "--steps", "1") == 0
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == ["0001", "0002"]


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "penstock.cli", "train", "--data", str(text_file)]
    command += [*TINY_OPTIONS, "--out", str(run), "--steps", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"penstock train --resume {run}" in out and err == ""
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["event"] == "train"]
    assert last_step(run) == steps[-1] == len(steps)
    assert cli.main(["train", "--resume", str(run), "--steps", str(steps[-1] + 2)]) == 0
    assert last_step(run) == steps[-1] + 2


@pytest.mark.parametrize(
    ("target", "count", "done", "kept"),
    [
        ("penstock.train.trainer:Trainer.train_step", 19, 18, 10),
        ("penstock.train.checkpoint:os.rename", 3, 20, 10),
    ],
    ids=["between steps", "inside a checkpoint"],
)
def test_killed_run_loses_at_most_one_interval(
    text_file: Path, tmp_path: Path, finished: Path, target: str, count: int, done: int, kept: int
) -> None:
    run = tmp_path / "run"
    options = ["--out", str(run), "--steps", "23", "--eval-every", "10", "--checkpoint-every", "10"]
    command = [sys.executable, "-c", KILLED_AT, target, str(count), "train", "--data"]
    command += [str(text_file), *TINY_OPTIONS, *options]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = (run / "metrics.jsonl").read_bytes()
    rows = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in rows if r["event"] == "train"] == list(range(1, done + 1))
    assert last_step(run) == kept
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "tra')  # a line that the kill cut short
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert (run / "metrics.jsonl").read_bytes().startswith(before)  # nothing written is lost
    assert weights(run) == weights(finished)
    ours, whole = (
        [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl")
         if r["event"] in ("train", "eval")]
        for folder in (run, finished)
    )  # fmt: skip
    assert ours == whole
    assert not list((run / "checkpoints").glob(".partial-*"))


def test_resuming_a_complete_run_changes_nothing(finished: Path) -> None:
    checkpoints = contents(finished / "checkpoints")
    kept = {n: (finished / n).read_bytes() for n in ("train.png", "sample.txt")}
    assert cli.main(["train", "--resume", str(finished)]) == 0
    assert contents(finished / "checkpoints") == checkpoints
    assert {n: (finished / n).read_bytes() for n in kept} == kept


def test_interrupted_comparison_goes_on_with_the_dense_model(
    text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_command(text_file, "--out", str(run), "--steps", "4") == 0
    assert cli.main(["train", "--resume", str(run), "--compare-dense"]) == 0
    assert last_step(run / "dense") == 4
    assert len(json.loads((run / "summary.json").read_text())["results"]) == 4


def refused(
    capsys: pytest.CaptureFixture[str], *arguments: str, saying: str, code: int = 2
) -> None:
    """The command ends with exit code 2 and one line on stderr."""
    capsys.readouterr()
    assert cli.main(["train", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("penstock train: error: ") and error.count("\n") == 1, error
    assert saying in error, error


BAD_OPTIONS = [
    (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--steps", "0"], "--steps: got 0"),
    (["--top-k", "17"], "--top-k: got 17, expected 1 to 16"),
    (["--hidden-size", "130"], "--hidden-size: got 130"),
    (["--lr", "nan"], "--lr: got nan"),
    (["--seed", "-1"], "--seed: got -1"),
    (["--threads", "-2"], "--threads: got -2"),
    (["--resume", "/nowhere/at/all"], "holds no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "saying"), BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    saying: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments, saying=saying)
    assert not list(tmp_path.iterdir())


def test_missing_gpu_is_refused(capsys: pytest.CaptureFixture[str], text_file: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    refused(capsys, "--data", str(text_file), "--device", "cuda", saying="torch sees no GPU")


def test_empty_and_short_data_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, short = tmp_path / "empty", tmp_path / "short.txt"
    empty.mkdir()
    short.write_text("hello")
    out = tmp_path / "out"
    refused(capsys, "--data", str(empty), "--out", str(out), saying="got 0 bytes in 0 file(s)")
    refused(capsys, "--data", str(short), "--out", str(out), saying="got 5 bytes in 1 file(s)")
    assert not out.exists()


def test_a_used_folder_is_never_overwritten(
    text_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    refused(
        capsys, "--data", str(text_file), *TINY_OPTIONS, "--out", str(finished), saying="--resume"
    )
    assert contents(finished) == before
    file = tmp_path / "file"
    file.write_text("precious")
    refused(capsys, "--data", str(text_file), "--out", str(file), saying="File exists")
    assert file.read_text() == "precious"


def test_checkpoint_of_another_shape_is_refused(
    text_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    resume = ["--resume", str(finished)]
    refused(capsys, *resume, "--hidden-size", "64", saying="--hidden-size: got 64, expected 16")
    refused(capsys, *resume, "--seed", "5", saying="--seed: got 5, expected 0")
    refused(capsys, *resume, "--steps", "7", saying="--steps: got 7, expected at least 23")
    refused(capsys, *resume, "--out", str(tmp_path / "x"), saying="leave --out out")
    other = tmp_path / "other.txt"
    other.write_text("x" * 5000)
    refused(capsys, *resume, "--data", str(other), saying="--data: got")
    for name, content in before.items():
        if name != "config.json":
            assert contents(finished)[name] == content, name


def test_changed_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("abcdefgh" * 200)
    assert train_command(text, "--out", str(run), "--steps", "2") == 0
    text.write_text("abcdefgi" * 200)
    refused(capsys, "--resume", str(run), saying="--data: got text with fingerprint")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 9}', '{"format": 1, "steps": 3}'])
def test_unreadable_configuration_is_refused(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = tmp_path / "run"
    assert train_command(text_file, "--out", str(run), "--steps", "1") == 0
    newest = checkpoint.complete_checkpoints(run)[-1]
    (newest / "config.json").write_text(content)
    refused(capsys, "--resume", str(run), saying=str(newest))


def test_a_folder_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from penstock.train.files import locked

    with locked(finished):
        refused(capsys, "--resume", str(finished), saying="in use by another process")


def test_full_disk_ends_with_one_line(
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, real, calls = tmp_path / "run", os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 16:  # inside the second checkpoint
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    data = ["--data", str(text_file), *TINY_OPTIONS, "--out", str(run)]
    refused(capsys, *data, "--steps", "9", "--checkpoint-every", "3", saying="No space left")
    monkeypatch.undo()
    assert last_step(run) in (0, 3)
    assert cli.main(["train", "--resume", str(run)]) == 0


def test_wrong_types_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--steps", "x"], ["--router", "oracle"], ["--no-such-option"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", *arguments])
        assert caught.value.code == 2
        assert "penstock train: error:" in capsys.readouterr().err


def test_program_without_a_subcommand_says_how_to_use_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, code in ((["--help"], 0), ([], 2), (["--no-such-option"], 2)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == code
        printed = capsys.readouterr()
        assert "usage: penstock" in (printed.err if code else printed.out)


def test_program_as_installed_returns_the_exit_code() -> None:
    command = [sys.executable, "-m", "penstock.cli", "train", "--data", "/nowhere/at/all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("penstock train: error: --data: got /nowhere/at/all")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules.update(torch=None, safetensors=None, rich=None)\n"
        "from penstock import cli\ncli.main(['train', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "--compare-dense" in done.stdout


def test_rounding_to_tiles_too_large_is_pointed_out() -> None:
    model = ModelConfig(router="token_rounding", tile=256, experts=16, top_k=2, sequence=256)
    assert rounding_advice(RunConfig(model=model, batch=16)) == ""  # 512 bytes per expert
    advice = rounding_advice(RunConfig(model=model, batch=15))
    assert "tiles of 256 with 480 bytes per expert" in advice and "512" in advice
    plain = dataclasses.replace(model, router="softmax_topk")
    assert rounding_advice(RunConfig(model=plain, batch=1)) == ""
