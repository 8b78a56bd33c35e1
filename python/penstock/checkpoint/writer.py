# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint folder so that it is either there complete or not there at all.

Everything goes into a folder with another name beside the destination, is flushed to the disk, and
takes its name in one rename. The same targets always give the same bytes. Used by convert.py.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock.checkpoint.errors import CheckpointError
from penstock.checkpoint.folder import INDEX, SINGLE, Checkpoint
from penstock.checkpoint.layouts import Target
from penstock.checkpoint.safetensors_file import BITS, METADATA

CHUNK = 16 << 20
ALIGNMENT = 8  # of the data, so that a map of the file can be used as numbers

Progress = Callable[[int], None]


def write_folder(
    destination: Path,
    checkpoint: Checkpoint,
    targets: dict[str, Target],
    shard_bytes: int,
    progress: Progress,
) -> None:
    """Write the targets, taken from the checkpoint, as `destination`, which must not exist yet.

    progress is told the number of bytes after each chunk. Other files beside the checkpoint's
    tensors (configuration, tokenizer) are copied along.
    """
    if destination.exists():
        raise CheckpointError(
            str(destination), got="something of that name", expected="a name not taken",
            remedy="Remove it or choose another destination",
        )  # fmt: skip
    try:
        partial = Path(
            tempfile.mkdtemp(prefix=f".partial-{destination.name}-", dir=destination.parent)
        )
    except OSError as error:
        raise _disk_error(destination, error) from error
    try:
        _fill(partial, checkpoint, targets, shard_bytes, progress)
        os.rename(partial, destination)
        _sync(destination.parent)
    except OSError as error:
        raise _disk_error(destination, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(
    folder: Path,
    checkpoint: Checkpoint,
    targets: dict[str, Target],
    shard_bytes: int,
    progress: Progress,
) -> None:
    os.chmod(folder, 0o755)  # mkdtemp's is private
    shards = list(_shards(targets, shard_bytes))
    width = len(shards)
    files = (
        [SINGLE]
        if width == 1
        else [f"model-{i:05d}-of-{width:05d}.safetensors" for i in range(1, width + 1)]
    )
    for name, shard in zip(files, shards, strict=True):
        _write_shard(folder / name, checkpoint, shard, progress)
    if width > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(target.num_bytes for target in targets.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write_synced(folder / INDEX, json.dumps(index, indent=2).encode())
    for path in _companions(checkpoint):
        _write_synced(folder / path.name, path.read_bytes())
    _sync(folder)


def _shards(targets: dict[str, Target], shard_bytes: int) -> Iterator[dict[str, Target]]:
    """Targets in order of name, as many in a shard as fit; at least one, and one shard at least."""
    shard: dict[str, Target] = {}
    size = 0
    for name, target in sorted(targets.items()):
        if shard and size + target.num_bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = target
        size += target.num_bytes
    yield shard


def _write_shard(
    path: Path, checkpoint: Checkpoint, shard: dict[str, Target], progress: Progress
) -> None:
    # Wide elements first: then every tensor is aligned to its own element size.
    ordered = sorted(shard.items(), key=lambda item: (-BITS[item[1].dtype], item[0]))
    header: dict[str, object] = {METADATA: checkpoint.metadata} if checkpoint.metadata else {}
    position = 0
    for name, target in ordered:
        end = position + target.num_bytes
        header[name] = {
            "dtype": target.dtype, "shape": target.shape, "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, target in ordered:
            for piece in target.pieces:
                data = checkpoint.bytes_of(piece.source)[piece.start : piece.end]
                for start in range(0, len(data), CHUNK):
                    progress(file.write(data[start : start + CHUNK]))
        file.flush()
        os.fsync(file.fileno())


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """The files that make a folder of tensors a model: all but tensors and their index."""
    if not checkpoint.path.is_dir():
        return []
    return [
        path
        for path in sorted(checkpoint.path.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX
    ]


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(destination: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"writing {destination}", got=error.strerror or str(error), expected="a complete folder",
        remedy="Nothing was left behind; check space and permissions",
    )  # fmt: skip
