# SPDX-License-Identifier: Apache-2.0
"""Reads the header of one safetensors file strictly, and maps its data into memory.

A file is: 8 bytes, the header's length, little-endian; the header, a JSON object of name ->
{dtype, shape, data_offsets}; the data. Everything that the header claims is checked against the
size of the file before a byte of data is touched, so that no claim causes an allocation or a read
past the end. Used by folder.py.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from penstock.checkpoint.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
METADATA = "__metadata__"
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_REMEDY = "Download or write the file again"


class Entry(NamedTuple):
    """One tensor of a file; `start` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """The bytes of its data."""
        return self.end - self.start


class SafetensorsFile:
    """The checked header of a file, and its bytes as a read-only memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                if size < LENGTH_BYTES:
                    self._refuse(0, f"a file of {size} bytes", f"{LENGTH_BYTES} or more")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(
                str(path), got=error.strerror or str(error), expected="a readable file",
                remedy="Check the path and its permissions",
            ) from error  # fmt: skip
        (length,) = struct.unpack("<Q", self._map[:LENGTH_BYTES])
        limit = min(MAX_HEADER_BYTES, size - LENGTH_BYTES)
        if not 2 <= length <= limit:
            self._refuse(0, f"a header of {length} bytes", f"2 to {limit}")
        self._data = LENGTH_BYTES + length
        header = self._parse(self._map[LENGTH_BYTES : self._data])
        self.metadata = self._checked_metadata(header.pop(METADATA, {}))
        self.entries = {name: self._entry(name, value) for name, value in header.items()}
        self._check_cover(size)

    def bytes_of(self, name: str) -> memoryview:
        """The data of one tensor, in place."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.end]

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = parse_json(raw)
        except (ValueError, RecursionError) as error:
            self._refuse(LENGTH_BYTES, f"a header that is not JSON ({error})", "a JSON object")
        if not isinstance(header, dict):
            self._refuse(LENGTH_BYTES, f"a {type(header).__name__}", "a JSON object")
        return header

    def _checked_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            self._refuse(LENGTH_BYTES, f"{METADATA} {metadata!r:.80}", "an object of strings")
        return metadata

    def _entry(self, name: str, value: Any) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            self._refuse(
                LENGTH_BYTES, f"tensor {name!r} as {value!r:.80}", "dtype, shape and data_offsets"
            )
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            self._refuse(LENGTH_BYTES, f"tensor {name!r} of dtype {dtype!r:.40}", "a known dtype")
        if not _naturals(shape):
            self._refuse(LENGTH_BYTES, f"tensor {name!r} of shape {shape!r:.80}", "sizes >= 0")
        if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(
                LENGTH_BYTES, f"tensor {name!r} with offsets {offsets!r:.80}", "[begin, end]"
            )
        needed = math.prod(shape) * BITS[dtype] // 8
        if offsets[1] - offsets[0] != needed:
            self._refuse(
                self._data + offsets[0],
                f"{offsets[1] - offsets[0]} bytes for tensor {name!r}",
                f"{needed}, from its dtype {dtype} and shape {shape!r:.80}",
            )
        return Entry(dtype, tuple(shape), self._data + offsets[0], self._data + offsets[1])

    def _check_cover(self, size: int) -> None:
        """The tensors cover the data exactly: no overlap, no gap, nothing left, nothing missing."""
        position = self._data
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            if entry.start != position:
                kind = "overlapping its neighbour" if entry.start < position else "after a gap"
                self._refuse(
                    entry.start, f"tensor {name!r} {kind}", f"it to begin at byte {position}"
                )
            position = entry.end
        if position != size:
            self._refuse(position, f"a file of {size} bytes", f"{position}, from its header")

    def _refuse(self, offset: int, got: object, expected: object) -> None:
        raise CheckpointError(
            f"{self.path} at byte {offset}", got=got, expected=expected, remedy=_REMEDY
        )


def parse_json(raw: bytes) -> Any:
    """The value that `raw` is; ValueError for what JSON excludes and for a key that repeats."""
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return keys


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
