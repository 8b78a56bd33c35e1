# SPDX-License-Identifier: Apache-2.0
"""`penstock train`: options, the run's folder, and the order of the phases.

Needs neither torch nor any other package to print its help; they are imported when it runs.
Everything that can be wrong with options, data or a checkpoint is found before anything is
written. Called by penstock.cli.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from penstock.train import config as configs
from penstock.train.config import RunConfig
from penstock.train.errors import TrainError, disk_error

DESCRIPTION = "Train a byte-level Mixture-of-Experts language model."
EVALUATION_WINDOWS = 128
INTERRUPTED = 130  # the shell's code for a program stopped by Ctrl-C
DENSE_FOLDER = "dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; one that is not given is absent, --out and --resume are None."""
    # An option that was not given must be told apart from one given with its default's value.
    parser.argument_default = argparse.SUPPRESS
    run, model = RunConfig(), configs.ModelConfig()
    group = parser.add_argument_group("run")
    group.add_argument(
        "--data", nargs="+", metavar="PATH",
        help="files or folders to learn from (default: the Python standard library's source)",
    )  # fmt: skip
    group.add_argument(
        "--out", metavar="DIR", default=None,
        help="a new or empty folder for the run (default: runs/<next number>)",
    )  # fmt: skip
    group.add_argument(
        "--resume", metavar="DIR", default=None, help="go on with the run in this folder"
    )
    group.add_argument(
        "--compare-dense", action="store_true", default=argparse.SUPPRESS,
        help="also train a dense model of the same active parameters for the same steps",
    )  # fmt: skip
    _number(group, "--steps", run.steps)
    _number(group, "--batch", run.batch, "windows per step")
    _number(group, "--lr", run.lr, "peak learning rate")
    _number(group, "--weight-decay", run.weight_decay)
    _number(group, "--clip", run.clip, "largest norm of the gradient")
    _number(group, "--aux-coefficient", run.aux_coefficient, "weight of the load-balancing loss")
    _number(group, "--z-coefficient", run.z_coefficient, "weight of the router's z-loss")
    _number(group, "--seed", run.seed)
    _number(group, "--eval-every", run.eval_every, "steps between evaluations")
    _number(group, "--checkpoint-every", run.checkpoint_every, "steps between checkpoints")
    _choice(group, "--device", run.device, configs.DEVICES, "auto: the GPU where it can be used")
    _choice(
        group, "--dtype", run.dtype, configs.DTYPES,
        "of products (auto: bf16 on a GPU, fp32 on a CPU); weights stay fp32",
    )  # fmt: skip
    _number(group, "--threads", run.threads, "CPU threads, 0 for all cores")
    group = parser.add_argument_group("model")
    _number(group, "--layers", model.layers)
    _number(group, "--hidden-size", model.hidden_size)
    _number(group, "--heads", model.heads)
    _number(group, "--experts", model.experts, "per layer")
    _number(group, "--top-k", model.top_k, "experts per byte")
    _number(group, "--intermediate-size", model.intermediate_size, "width of one expert")
    _number(group, "--sequence", model.sequence, "bytes per window")
    _choice(group, "--router", model.router, configs.ROUTERS)
    _choice(group, "--save", model.save, configs.SAVE_POLICIES, "what forward keeps for backward")


def _number(group: argparse._ArgumentGroup, name: str, default: float, about: str = "") -> None:
    text = f"{about} (default: {default})" if about else f"(default: {default})"
    group.add_argument(name, type=type(default), metavar="N", help=text)


def _choice(
    group: argparse._ArgumentGroup,
    name: str,
    default: str,
    choices: tuple[str, ...],
    about: str = "",
) -> None:
    group.add_argument(name, choices=choices, help=f"{about} (default: {default})".lstrip())


def _option_names() -> list[str]:
    names = {f.name for f in dataclasses.fields(RunConfig)} - {"model"}
    return sorted(names | (configs.MODEL_FIELDS - {"feed_forward"}))


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on training. Raises TrainError for what the user can put right."""
    options = {name: getattr(args, name) for name in _option_names() if hasattr(args, name)}
    if "data" in options:
        options["data"] = tuple(str(Path(path).absolute()) for path in options["data"])
    if args.resume is not None:
        return _resume(Path(args.resume), args.out, options)
    return _start(args.out, configs.with_options(RunConfig(), options))


def _start(out: str | None, config: RunConfig) -> int:
    corpus = _prepare(config)
    folder = _new_folder(out)
    return _train(folder, config, corpus)


def _resume(folder: Path, out: str | None, options: dict) -> int:
    from penstock.train import checkpoint

    if out is not None:
        raise TrainError(
            "--out",
            got=f"{out} together with --resume",
            expected="one of the two",
            remedy="A resumed run goes on in its own folder; leave --out out.",
        )
    saved = checkpoint.complete_checkpoints(folder)
    if not saved:
        raise TrainError(
            "--resume",
            got=f"{folder}, which holds no checkpoint",
            expected="the folder of a run (the one with checkpoints/ in it)",
            remedy="Check the path, or start a run without --resume.",
        )
    config = configs.resumed(checkpoint.read_config(saved[-1]), options)
    return _train(folder, config, _prepare(config))


def _prepare(config: RunConfig):
    """Checks what needs more than the options themselves: the device and the text."""
    from penstock.train.data import load_corpus
    from penstock.train.placement import resolve_placement

    resolve_placement(config)
    return load_corpus(config.data, config.model.sequence)


def _new_folder(out: str | None) -> Path:
    """Makes the run's folder; never one that already holds something."""
    try:
        if out is None:
            return _next_number(Path("runs"))
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise TrainError(
                "--out",
                got=f"{folder}, which is not empty",
                expected="a new or empty folder",
                remedy=f"Pass another folder, or go on with this run: --resume {folder}",
            )
        return folder
    except OSError as error:
        raise disk_error("making the run's folder", error) from error


def _next_number(parent: Path) -> Path:
    parent.mkdir(exist_ok=True)
    taken = [int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        try:
            folder = parent / f"{number:04d}"
            folder.mkdir()
            return folder
        except FileExistsError:  # another run took it just now
            number += 1


def _train(folder: Path, config: RunConfig, corpus) -> int:
    from rich.console import Console

    from penstock.train import loop, report
    from penstock.train.data import evaluation_windows
    from penstock.train.files import locked, write_atomically
    from penstock.train.placement import resolve_placement
    from penstock.train.progress import Display

    display = Display(Console())
    display.line(
        f"{corpus.num_files} files, {len(corpus.train):,} bytes to learn from, "
        f"{len(corpus.held_out):,} held out ({corpus.split}). Run: {folder}"
    )
    display.line(f"On {resolve_placement(config)}")
    windows = evaluation_windows(corpus.held_out, config.model.sequence, EVALUATION_WINDOWS)
    with locked(folder), loop.StopRequest() as stop:
        settings = json.dumps(config.to_json(), indent=2) + "\n"
        write_atomically(folder / "config.json", settings.encode())
        session = loop.Session(corpus, windows, display, stop)
        ours = loop.train(folder, config, session)
        dense = None
        if config.compare_dense and ours.complete:
            display.line("Now the dense model of the same active parameters, for the same steps")
            dense_folder = folder / DENSE_FOLDER
            dense_config = dataclasses.replace(config, model=config.model.as_dense())
            dense = loop.train(dense_folder, dense_config, session)
        if not ours.complete or (dense is not None and not dense.complete):
            display.line(f"Stopped and saved. Go on with: penstock train --resume {folder}")
            return INTERRUPTED
        report.finish(ours, dense, session)
        display.line(report.files_written(folder))
    return os.EX_OK
