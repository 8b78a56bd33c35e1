# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a folder per saved step that appears complete or not at all.

checkpoints/step-00000150/ holds model.safetensors, optimizer.safetensors (AdamW's moments and
torch's random state), config.json, and state.json with the step, the data's fingerprint and the
size and SHA-256 of the other files. The folder is filled under a temporary name, flushed, renamed;
only then may the oldest of the KEPT ones go. Training data needs no position: windows are a
function of seed and step. A damaged checkpoint is an error that names it, never skipped silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from penstock.train import config as configs
from penstock.train.config import RunConfig
from penstock.train.errors import TrainError, disk_error
from penstock.train.files import PARTIAL, sync
from torch import nn

FORMAT = 1
KEPT = 2
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
CONFIG = "config.json"
STATE = "state.json"
RNG = "rng.torch"


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and on what."""

    step: int
    data_fingerprint: str
    elapsed_s: float


@dataclass(frozen=True)
class Training:
    """What a checkpoint saves and restores, as live objects."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def folder_of(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def complete_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    try:
        found = [p for p in folder_of(run).iterdir() if p.name.startswith("step-") and p.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(f"listing {folder_of(run)}", error) from error
    return sorted(found)


def save(run: Path, config: RunConfig, training: Training, progress: Progress) -> Path:
    """Writes the checkpoint of progress.step and returns its folder; an existing one is kept."""
    final = folder_of(run) / f"step-{progress.step:08d}"
    partial = folder_of(run) / (PARTIAL + final.name)
    try:
        if final.is_dir():
            return final
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        _fill(partial, config, training, progress)
        os.rename(partial, final)
        sync(final.parent)
        for old in complete_checkpoints(run)[:-KEPT]:
            shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(f"writing the checkpoint {final}", error) from error
    except safetensors.SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(f"writing the checkpoint {final}", OSError(str(error))) from error
    return final


def _fill(folder: Path, config: RunConfig, training: Training, progress: Progress) -> None:
    weights = {k: v.detach().cpu().contiguous() for k, v in training.model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / MODEL)
    safetensors.torch.save_file(_optimizer_tensors(training), folder / OPTIMIZER)
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (MODEL, OPTIMIZER, CONFIG)
    }
    state = {
        "format": FORMAT,
        "step": progress.step,
        "data_fingerprint": progress.data_fingerprint,
        "elapsed_s": progress.elapsed_s,
        "files": files,
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    for name in (MODEL, OPTIMIZER, CONFIG, STATE):
        sync(folder / name)
    sync(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _parameter_names(training: Training) -> list[str]:
    """Names of the optimiser's parameters in its own order."""
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    return [names[p] for group in training.optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(training: Training) -> dict[str, torch.Tensor]:
    tensors = {RNG: torch.get_rng_state()}
    names = _parameter_names(training)
    for index, entries in training.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            tensors[f"{names[index]}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def read_config(checkpoint: Path) -> RunConfig:
    """The configuration a checkpoint was trained with, after its files proved undamaged."""
    read_progress(checkpoint)
    return configs.from_json(_read_json(checkpoint / CONFIG), str(checkpoint / CONFIG))


def read_progress(checkpoint: Path) -> Progress:
    """Reads state.json and checks every file against it."""
    state = _read_json(checkpoint / STATE)
    try:
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}")
        progress = Progress(
            step=int(state["step"]),
            data_fingerprint=str(state["data_fingerprint"]),
            elapsed_s=float(state["elapsed_s"]),
        )
        files = {
            name: (state["files"][name]["bytes"], state["files"][name]["sha256"])
            for name in (MODEL, OPTIMIZER, CONFIG)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(checkpoint / STATE, f"an unexpected content ({error!r})") from error
    for name, (size, digest) in files.items():
        path = checkpoint / name
        try:
            actual = path.stat().st_size
            same = actual == size and _sha256(path) == digest
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        if not same:
            raise _damaged(path, f"{actual} bytes that differ from the {size} bytes written")
    return progress


def load(checkpoint: Path, training: Training) -> None:
    """Restores model, optimiser and torch's random state; refuses any tensor of another shape."""
    weights = _read_tensors(checkpoint / MODEL)
    _check_shapes(checkpoint / MODEL, weights, training.model.state_dict())
    moments = _read_tensors(checkpoint / OPTIMIZER)
    parameters = dict(training.model.named_parameters())
    expected = {f"{n}.{k}": p for n, p in parameters.items() for k in ("exp_avg", "exp_avg_sq")}
    expected |= {f"{n}.step": torch.zeros(()) for n in parameters}
    rng = moments.pop(RNG, None)
    if rng is None or rng.dtype != torch.uint8 or rng.shape != torch.get_rng_state().shape:
        raise _damaged(checkpoint / OPTIMIZER, f"no usable tensor {RNG}")
    if moments or _has_stepped(checkpoint):
        _check_shapes(checkpoint / OPTIMIZER, moments, expected)
    training.model.load_state_dict(weights)
    document = training.optimizer.state_dict()
    document["state"] = {
        index: {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(_parameter_names(training))
        if f"{name}.step" in moments
    }
    training.optimizer.load_state_dict(document)
    torch.set_rng_state(rng)


def _has_stepped(checkpoint: Path) -> bool:
    return read_progress(checkpoint).step > 0


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"no readable JSON ({error})") from error
    if not isinstance(document, dict):
        raise _damaged(path, f"a JSON {type(document).__name__}")
    return document


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _check_shapes(path: Path, got: dict, expected: dict) -> None:
    for name in sorted(set(got) | set(expected)):
        have = f"{tuple(got[name].shape)} {got[name].dtype}" if name in got else "nothing"
        want = f"{tuple(expected[name].shape)} {expected[name].dtype}" if name in expected else ""
        if have != want:
            raise TrainError(
                f"{path}: tensor {name}",
                got=have,
                expected=want or "no such tensor",
                remedy="The checkpoint is of another shape; resume it with its own config.json.",
            )


def _damaged(path: Path, got: str) -> TrainError:
    return TrainError(
        str(path),
        got=got,
        expected="a complete, unchanged checkpoint",
        remedy=f"Move {path.parent.name} out of its folder; --resume then takes the one before.",
    )
