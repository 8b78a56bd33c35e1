# SPDX-License-Identifier: Apache-2.0
"""Large tensors that the front-end allocates are marked for large pages."""

from pathlib import Path

import pytest
import torch

from penstock._arrays import TorchArrays

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not SMAPS.exists(),
    reason="this kernel has no transparent large pages",
)


def is_advised(address: int) -> bool:
    """Whether the kernel lists the address as memory for which large pages are advised ("hg")."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            inside = begin <= address < end
        if inside and fields[0] == "VmFlags:":
            return "hg" in fields
    return False


@pytest.mark.parametrize("kind", ["empty", "workspace"])
def test_large_memory_is_advised(kind):
    num_bytes = 48 << 20  # more than any allocator keeps for reuse
    like = torch.empty(0)
    if kind == "empty":
        tensor = TorchArrays.empty((num_bytes // 4,), "float32", like)
    else:
        tensor = TorchArrays.workspace(num_bytes, like)
    assert tensor.nbytes == num_bytes
    assert is_advised(tensor.data_ptr() + num_bytes // 2)
