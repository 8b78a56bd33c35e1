# SPDX-License-Identifier: Apache-2.0
"""convert(): a checkpoint in the other layout of experts, byte for byte."""

from __future__ import annotations

from pathlib import Path

from penstock.checkpoint.errors import CheckpointError
from penstock.checkpoint.folder import Checkpoint
from penstock.checkpoint.layouts import SPELLINGS, fuse, has_fused, has_per_expert, split
from penstock.checkpoint.writer import Progress, write_folder
from penstock.errors import invalid

LAYOUTS = ("fused", "per_expert")
SHARD_BYTES = 5_000_000_000


def convert(
    source: str | Path | Checkpoint,
    destination: str | Path,
    *,
    to: str,
    spelling: str = "mlp",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Write the checkpoint `source` as the folder `destination` with its experts laid out anew.

    to: "fused" (3-D tensors, as transformers 5 computes) or "per_expert" (a tensor an expert), the
    latter in the words of `spelling`: "mlp" (gate_proj, up_proj, down_proj) or "mixtral" (w1, w3,
    w2). No element changes: there and back gives the same bytes. Files that are not tensors are
    copied along. shard_bytes: the most bytes of tensors in one file, unless one alone is larger.
    progress: called with the number of bytes written, chunk by chunk.
    Returns the names of the tensors written. CheckpointError (a ValueError) for a checkpoint that
    is malformed, incomplete or already in that layout, and for a destination that exists; raised
    before anything is written, or with everything removed that was.
    """
    for name, value, choices in (("to", to, LAYOUTS), ("spelling", spelling, tuple(SPELLINGS))):
        if value not in choices:
            raise invalid(name, repr(value), "one of " + ", ".join(choices), "Check the spelling")
    if shard_bytes < 1:
        raise invalid("shard_bytes", shard_bytes, "1 or more", "Pass the size of a file")
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    convertible = has_per_expert if to == "fused" else has_fused
    if not convertible(checkpoint.tensors):
        raise CheckpointError(
            str(checkpoint.path), got=f"no experts to write as {to}",
            expected="experts in the other layout", remedy="It may be in that layout already",
        )  # fmt: skip
    targets = fuse(checkpoint) if to == "fused" else split(checkpoint, spelling)
    told = progress if progress is not None else lambda _: None
    write_folder(Path(destination).absolute(), checkpoint, targets, shard_bytes, told)
    return sorted(targets)
