# SPDX-License-Identifier: Apache-2.0
"""`penstock convert`: the command line of convert(), with a progress bar on a terminal."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from penstock.checkpoint.convert import LAYOUTS, SHARD_BYTES, convert
from penstock.checkpoint.folder import Checkpoint
from penstock.checkpoint.layouts import SPELLINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `penstock convert`."""
    parser.add_argument("source", help="folder of a safetensors checkpoint, or one file")
    parser.add_argument("destination", help="folder to write; must not exist")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the experts")
    parser.add_argument(
        "--spelling", default="mlp", choices=tuple(SPELLINGS),
        help="names of single experts' projections: gate_proj, ... or w1, ... (default: mlp)",
    )  # fmt: skip
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, metavar="N",
        help=f"bytes of tensors in one file (default: {SHARD_BYTES})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    console = Console()
    checkpoint = Checkpoint(args.source)
    columns = (
        TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=checkpoint.num_bytes)
        names = convert(
            checkpoint,
            args.destination,
            to=args.to,
            spelling=args.spelling,
            shard_bytes=args.shard_bytes,
            progress=lambda num_bytes: bar.advance(task, num_bytes),
        )
    console.print(
        f"{len(checkpoint.tensors)} tensors became {len(names)}, {checkpoint.num_bytes:,} bytes, "
        f"in {escape(str(args.destination))}",
        soft_wrap=True,
        highlight=False,
    )
    return 0
