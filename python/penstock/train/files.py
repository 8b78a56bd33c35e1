# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash at any instant leaves either the old content or the new.

Content goes to a temporary name in the same folder, is flushed to the disk, and takes its final
name in one rename. The temporary names start with ".partial-" and are never read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from penstock.train.errors import TrainError, disk_error

PARTIAL = ".partial-"


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, all of it or nothing."""
    partial = path.with_name(PARTIAL + path.name)
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise disk_error(f"writing {path}", error) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that two processes cannot train into it at once."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(f"locking {folder}", error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainError(
                "the run's folder",
                got=f"{folder}, in use by another process",
                expected="a folder that nobody trains into",
                remedy="Wait for the other process or start another run with --out.",
            ) from error
        yield
    finally:
        os.close(descriptor)
