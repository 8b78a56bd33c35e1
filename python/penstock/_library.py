# SPDX-License-Identifier: Apache-2.0
"""Finds and loads libpenstock_ffi.so, once, at the first call that needs it.

It is looked for in the package's own lib folder and nowhere else, so that one installation never
runs another's code. PENSTOCK_LIBRARY_DIR names another folder: for development, with a build tree.
Importing penstock loads neither this library, nor tvm-ffi, nor torch.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from penstock import errors

ENVIRONMENT_VARIABLE = "PENSTOCK_LIBRARY_DIR"
_LIBRARY = "libpenstock_ffi.so"

_lock = threading.Lock()
_module: Any = None


def library_path() -> Path:
    """Where libpenstock_ffi.so is expected to be."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    return (Path(folder) if folder else Path(__file__).parent / "lib") / _LIBRARY


def library() -> Any:
    """The loaded module: one attribute for each function that src/ffi exports."""
    global _module
    if _module is None:
        with _lock:
            if _module is None:
                _module = _load(library_path())
    return _module


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ImportError(
            f"penstock's engine: got no file {path}, expected the library that the build installs "
            f"there. Install the package with pip, or set {ENVIRONMENT_VARIABLE} to the folder of "
            f"{_LIBRARY} in a build tree."
        )
    tvm_ffi = import_tvm_ffi()
    for error in (errors.UnsupportedError, errors.OutOfMemoryError, errors.DeviceError):
        tvm_ffi.register_error(f"penstock.{error.__name__}", error)
    # tvm-ffi's module is kept for the life of the process: results may point into the library.
    # libpenstock.so is found through the RPATH of libpenstock_ffi.so ($ORIGIN).
    return tvm_ffi.load_module(str(path))


def import_tvm_ffi() -> Any:
    """Import tvm_ffi without its optional just-in-time build.

    For torch < 2.10, tvm_ffi compiles a small extension at import time, which needs a compiler and
    half a minute; torch's own DLPack export does the same job for a few microseconds a call. A
    program that wants the extension imports tvm_ffi before its first call of penstock.
    """
    name = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    before = os.environ.get(name)
    os.environ[name] = "1" if before is None else before
    try:
        import tvm_ffi
    finally:
        if before is None:
            os.environ.pop(name, None)
    return tvm_ffi
