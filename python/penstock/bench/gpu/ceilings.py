# SPDX-License-Identifier: Apache-2.0
"""What this card reaches today, measured in the same process as everything else.

A card's clock falls with its power and temperature, so a rate means little beside a data sheet; the
ceilings are those of the 8192^3 bf16 product on random data (zeros draw less power and run faster),
of a device copy (bytes read and written), and of reading alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock.bench.gpu.clock import time_in_turn

MATMUL_SIZE = 8192
COPY_BYTES = 1 << 30
ROUNDS = 20


class Ceilings(NamedTuple):
    """Rates that nothing here is expected to beat."""

    matmul_tflops: float
    copy_gbs: float
    read_gbs: float

    @property
    def flop_per_ms(self) -> float:
        """FLOP in a millisecond of the large product."""
        return self.matmul_tflops * 1e9

    @property
    def bytes_per_ms(self) -> float:
        """Bytes in a millisecond of the copy."""
        return self.copy_gbs * 1e6

    def floor_ms(self, flop: float, num_bytes: float) -> float:
        """The least time of a launch that does `flop` and moves `num_bytes`."""
        return max(flop / self.flop_per_ms, num_bytes / self.bytes_per_ms)


def measure_ceilings() -> Ceilings:
    """Measures the three in turn; about half a second."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Any:
        values = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        return values.normal_(generator=generator)

    left, right = random(MATMUL_SIZE, MATMUL_SIZE), random(MATMUL_SIZE, MATMUL_SIZE)
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    times = time_in_turn(
        {
            "matmul": lambda: left @ right,
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
        },
        ROUNDS,
    )
    return Ceilings(
        2 * MATMUL_SIZE**3 / times["matmul"].median * 1e-9,
        2 * COPY_BYTES / times["copy"].median * 1e-6,
        # Reading is never slower than half of a copy; a reduction may be badly tuned.
        max(COPY_BYTES / times["read"].median, COPY_BYTES / times["copy"].median) * 1e-6,
    )
