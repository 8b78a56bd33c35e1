# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: one safetensors file, or a folder of shards with their index.

Opening it checks every header and the index: each tensor is in exactly one shard, each shard that
the index names is there, and no shard holds a tensor that the index does not name. Used by
convert.py and load.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from penstock.checkpoint.errors import CheckpointError, some_of
from penstock.checkpoint.safetensors_file import Entry, SafetensorsFile, parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 30


class Source(NamedTuple):
    """Where one tensor of a checkpoint is."""

    file: SafetensorsFile
    entry: Entry


class Checkpoint:
    """The tensors of a checkpoint by name; their data is mapped, not read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = [SafetensorsFile(file) for file in _shards(self.path)]
        self.tensors: dict[str, Source] = {}
        for file in self.files:
            twice = self.tensors.keys() & file.entries.keys()
            if twice:
                raise CheckpointError(
                    str(file.path), got=f"{some_of(twice)}, which another shard holds too",
                    expected="every tensor in one shard", remedy="Remove the wrong shard",
                )  # fmt: skip
            self.tensors.update((name, Source(file, entry)) for name, entry in file.entries.items())
        index = self.path / INDEX
        if self.path.is_dir() and index.is_file():
            self._check_index(index)

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors' data."""
        return sum(source.entry.num_bytes for source in self.tensors.values())

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that the files carry beside the tensors."""
        merged: dict[str, str] = {}
        for file in self.files:
            merged.update(file.metadata)
        return merged

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of one tensor."""
        return self.tensors[name].entry

    def bytes_of(self, name: str) -> memoryview:
        """The data of one tensor, in place."""
        return self.tensors[name].file.bytes_of(name)

    def _check_index(self, index: Path) -> None:
        claimed = _weight_map(index)
        held = {name: source.file.path.name for name, source in self.tensors.items()}
        if claimed == held:
            return
        wrong = {name for name, _ in claimed.items() ^ held.items()}
        raise CheckpointError(
            str(index), got=f"another place than the shards say for {some_of(wrong)}",
            expected="every tensor named once, with the shard that holds it",
            remedy="Download the missing files, or write the index again",
        )  # fmt: skip


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                str(path), got=f"no shard {some_of(missing)}",
                expected="every shard that the index names", remedy="Download the missing files",
            )  # fmt: skip
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    raise CheckpointError(
        str(path), got=f"neither {INDEX} nor {SINGLE}", expected="one of them",
        remedy="Name the folder of a safetensors checkpoint, or one .safetensors file",
    )  # fmt: skip


def _weight_map(index: Path) -> dict[str, str]:
    """name -> shard of an index; a shard is a plain name in the index's own folder."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        got: Any = f"{index.stat().st_size} bytes"
    else:
        try:
            content = parse_json(index.read_bytes())
        except (ValueError, RecursionError) as error:
            content, got = None, f"no JSON ({error})"
        else:
            got = f"{content!r:.80}"
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if isinstance(weight_map, dict) and all(_plain_name(n) for n in weight_map.values()):
            return weight_map
    raise CheckpointError(
        str(index), got=got, expected="an object with a weight_map of names of files beside it",
        remedy="Download or write the index again",
    )  # fmt: skip


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
