# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the engine. An invalid argument is a plain ValueError.

Every message says what was wrong, what was got, what was expected, and what to do about it. The
engine raises before anything is launched or written.
"""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """A valid call that no backend, or not the named one, can run; the reasons are listed."""


class OutOfMemoryError(RuntimeError):
    """An allocation failed; the message carries the bytes. State is unchanged."""


class DeviceError(RuntimeError):
    """The device reported a failure, ours or an earlier one."""


def invalid(what: str, got: object, expected: object, remedy: str) -> ValueError:
    """The ValueError of an argument that the contract excludes, with the four parts."""
    return ValueError(f"{what}: got {got}, expected {expected}. {remedy}")
