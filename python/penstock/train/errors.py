# SPDX-License-Identifier: Apache-2.0
"""The one exception of the training program.

Raised for everything a user can put right: a bad path, an option out of range, a checkpoint of
another shape, a full disk. The command line turns it into one line on stderr and exit code 2;
whoever raises it has not overwritten anything.
"""

from __future__ import annotations


class TrainError(Exception):
    """A message of one line that says what was wrong, what was got, expected, and what to do."""

    def __init__(self, what: str, *, got: object, expected: str, remedy: str) -> None:
        super().__init__(f"{what}: got {got}, expected {expected}. {remedy}")


def disk_error(action: str, error: OSError) -> TrainError:
    """A TrainError for an operation that the file system refused."""
    reason = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    return TrainError(
        action,
        got=f"'{reason}'{where}",
        expected="the operation to succeed",
        remedy="Nothing that was complete before is lost; check space and permissions.",
    )
