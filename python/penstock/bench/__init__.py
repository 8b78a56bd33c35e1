# SPDX-License-Identifier: Apache-2.0
"""`penstock bench`: verifies one layer, then times it against what torch itself offers.

Called by penstock.cli through add_arguments and run; nothing here is imported before that. The
parts: shapes (which layer), problem (its tensors), peers/ (one adapter an implementation), verify,
measure (time and memory), report (table, JSON rows).
"""

from penstock.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
