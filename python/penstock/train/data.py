# SPDX-License-Identifier: Apache-2.0
"""The bytes a run learns from and the bytes it is judged on.

Invariants: the same files give the same bytes, order and split on every machine; no byte of a
held-out file (or of the held-out tail) is ever trained on, and a file that occurs twice counts
once, so a copy cannot straddle the split. Which windows a step sees is a pure function of the
seed and the step, so a resumed run needs no stored position. Called by the loop and the tests.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from penstock.train.errors import TrainError, disk_error

HELD_OUT_FRACTION = 0.05
MIN_FILES_FOR_FILE_SPLIT = 32
MAX_BYTES = 4 << 30  # all of it is held in memory
SEPARATOR = b"\0"  # between files; does not occur in text
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
# Left out of the default text: what Debian packages apart from the library, and other packages.
STDLIB_SKIPPED = SKIPPED_FOLDERS | {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Both sides of the split as flat uint8 arrays, and where they came from."""

    train: np.ndarray
    held_out: np.ndarray
    num_files: int
    split: str  # how the held-out side was chosen, for people
    fingerprint: str  # sha256 of both sides


def stdlib_path() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(paths: tuple[str, ...], sequence: int) -> Corpus:
    """Reads `paths` (none: the Python standard library) and splits them."""
    if paths:
        files = [f for path in paths for f in _files_under(Path(path), SKIPPED_FOLDERS, "")]
    else:
        files = _files_under(stdlib_path(), STDLIB_SKIPPED, ".py")
    documents = _read_distinct(files)
    total = sum(len(d) for d in documents)
    needed = 8 * (sequence + 1)
    if total < needed:
        raise TrainError(
            "--data",
            got=f"{total} bytes in {len(files)} file(s)",
            expected=f"at least {needed} bytes (8 windows of --sequence {sequence})",
            remedy="Pass more text or a smaller --sequence.",
        )
    train, held_out, split = _split(documents, max(int(total * HELD_OUT_FRACTION), sequence + 1))
    digest = hashlib.sha256(train)
    digest.update(b"|")
    digest.update(held_out)
    return Corpus(
        train=np.frombuffer(train, dtype=np.uint8),
        held_out=np.frombuffer(held_out, dtype=np.uint8),
        num_files=len(documents),
        split=split,
        fingerprint=digest.hexdigest(),
    )


def _files_under(root: Path, skipped: frozenset[str], suffix: str) -> list[Path]:
    """A file itself, or a folder's regular files in the order of their relative paths."""
    try:
        mode = root.stat().st_mode
    except OSError as error:
        raise TrainError(
            "--data",
            got=f"{root} ({error.strerror})",
            expected="a file or folder that can be read",
            remedy="Check the path.",
        ) from error
    if stat.S_ISREG(mode):
        return [root]
    if not stat.S_ISDIR(mode):
        raise TrainError(
            "--data",
            got=f"{root}, which is neither",
            expected="a regular file or a folder",
            remedy="Check the path.",
        )
    found = []

    def refuse(error: OSError) -> None:
        raise disk_error("--data: listing a folder", error)

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith(".")]
        for name in names:
            path = Path(folder, name)
            hidden = name.startswith(".")
            if not hidden and name.endswith(suffix) and stat.S_ISREG(path.lstat().st_mode):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _read_distinct(files: list[Path]) -> list[bytes]:
    seen: set[bytes] = set()
    documents = []
    total = 0
    for path in files:
        try:
            total += path.stat().st_size
            if total > MAX_BYTES:
                raise TrainError(
                    "--data",
                    got=f"more than {MAX_BYTES} bytes",
                    expected="an amount that fits in memory",
                    remedy="Pass fewer files.",
                )
            content = path.read_bytes()
        except OSError as error:
            raise disk_error(f"--data: reading {path}", error) from error
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            documents.append(content)
    return documents


def _split(documents: list[bytes], wanted: int) -> tuple[bytes, bytes, str]:
    """(train, held-out, how): whole files by hash where there are many, else the tail."""
    if len(documents) >= MIN_FILES_FOR_FILE_SPLIT:
        held = _choose_by_hash(documents, wanted)
        if held is not None:
            train = SEPARATOR.join(d for i, d in enumerate(documents) if i not in held)
            held_out = SEPARATOR.join(documents[i] for i in sorted(held))
            return train, held_out, f"{len(held)} of {len(documents)} files held out by hash"
    joined = SEPARATOR.join(documents)
    return joined[:-wanted], joined[-wanted:], "the last bytes held out"


def _choose_by_hash(documents: list[bytes], wanted: int) -> set[int] | None:
    """Files in the order of their hash until `wanted` bytes are held out; none if sizes forbid."""
    order = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i]).digest())
    held: set[int] = set()
    size = 0
    for index in order:
        if size >= wanted:
            return held
        if size + len(documents[index]) <= 2 * wanted:
            held.add(index)
            size += len(documents[index])
    return None


def training_windows(text: np.ndarray, config: tuple[int, int, int], step: int) -> np.ndarray:
    """(batch, sequence + 1) int64 windows of one step; config is (seed, batch, sequence)."""
    seed, batch, sequence = config
    # The raw stream of a counter-based generator is stable across NumPy versions.
    draws = np.random.Philox(key=seed, counter=[0, 0, 0, step]).random_raw(batch)
    starts = (draws % np.uint64(len(text) - sequence)).astype(np.int64)
    return text[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)


def evaluation_windows(text: np.ndarray, sequence: int, most: int) -> np.ndarray:
    """At most `most` disjoint windows, (windows, sequence + 1), spread evenly over the text."""
    available = (len(text) - 1) // sequence
    count = min(most, available)
    starts = (np.arange(count) * available // count) * sequence
    return text[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)
