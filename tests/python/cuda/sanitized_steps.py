# SPDX-License-Identifier: Apache-2.0
"""A program for compute-sanitizer: one step of each layer of tests/cases/sanitize.json, checked.

Every step goes through router, plan and experts, forward and backward, and is compared with float64
where the ids are the caller's. Run by scripts/gpu_check.sh sanitize, which turns torch's caching
allocator off so that each tensor is an allocation of its own. Prints a line a layer.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "cases")]

import numpy as np  # noqa: E402
from case_layer import declared, make_layer  # noqa: E402
from doors import CudaDoor, check_statement  # noqa: E402
from gpu_layer import make_inputs, step  # noqa: E402


def layer_of(entry: dict):
    """The layer that an entry declares."""
    layer = make_layer(
        entry["shape"], entry["dtype"], activation=entry["activation"], bias=entry["bias"]
    ).with_(save=entry["save"])
    ids = layer.ids.copy()
    if entry["ids"] == "skipped":
        ids[::3] = -1
        ids[1, 0] = entry["shape"][3] + 7
    if entry["ids"] == "one_expert":
        ids[:] = -1
        ids[:, 0] = 1
    return layer.with_(ids=np.ascontiguousarray(ids))


def main() -> None:
    """Runs every declared layer; an AssertionError says what is wrong."""
    for entry in declared("sanitize")["layers"]:
        check_statement(CudaDoor, layer_of(entry))
        step(make_inputs(entry["shape"], entry["dtype"], bias=True), entry["shape"][4])
        print("sanitized step", entry["shape"], entry["dtype"], entry["ids"], flush=True)


if __name__ == "__main__":
    main()
