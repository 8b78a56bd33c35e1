# SPDX-License-Identifier: Apache-2.0
"""`penstock bench --device cuda`: the session, then shape after shape, rows kept as they come."""

from __future__ import annotations

import argparse
from typing import Any

from penstock.bench.gpu import report
from penstock.bench.gpu.bench import OURS, Session, bench_forward, bench_shape, profile_shape
from penstock.bench.gpu.ceilings import measure_ceilings
from penstock.bench.gpu.start import measure_start
from penstock.bench.peers.peer import Peer
from penstock.bench.problem import Problem
from penstock.bench.report import machine_facts, write_json
from penstock.bench.shapes import Shape


def run(
    args: argparse.Namespace, problems: list[Problem], peers: list[Peer], console: Any
) -> list[dict[str, Any]]:
    """Every row of the run; prints a table for each shape and writes what was asked for."""
    session = open_session(args, problems[0].threads)
    say(console, [report.session_line(session.facts)])
    rows: list[dict[str, Any]] = []

    def keep(new: list[dict[str, Any]], lines: list[str]) -> None:
        rows.extend(new)
        say(console, ["", *lines])
        if args.json:
            write_json(args.json, rows)

    for problem in problems:
        for num_tokens in args.tokens:
            few = problem._replace(shape=decoding(problem.shape, num_tokens))
            forward_rows = bench_forward(few, peers, session)
            keep(forward_rows, report.forward_lines(forward_rows))
        if args.tokens:
            continue
        shape_rows = bench_shape(problem, peers, session)
        keep(shape_rows, report.shape_lines(shape_rows))
        ran = {row["impl"] for row in shape_rows if "total_ms" in row}
        if args.profile and OURS in ran:
            ours = next(peer for peer in peers if peer.name == OURS)
            row = profile_shape(problem, ours, session)
            keep([row], report.profile_lines(row))
    if not args.tokens:
        say(console, ["", report.KEY])
    if args.png:
        from penstock.bench.gpu.plot import write_png

        write_png(args.png, rows, report.session_line(session.facts))
    return rows


def open_session(args: argparse.Namespace, threads: int) -> Session:
    """Creates the context, measures the ceilings, collects what figures depend on."""
    import torch

    from penstock.info import gpu

    start = measure_start()
    ceilings = measure_ceilings()
    facts = machine_facts(threads) | {
        "gpu": torch.cuda.get_device_name(),
        "driver": gpu()["driver"],
        "cuda": torch.version.cuda,
        "ceilings": ceilings._asdict(),
        "start": start._asdict(),
    }
    if args.commit:
        facts["commit"] = args.commit
    return Session(facts, ceilings, args.repeats, args.load)


def decoding(shape: Shape, num_tokens: int) -> Shape:
    """The shape's weights with another number of tokens."""
    return shape._replace(name=f"{shape.name}/T{num_tokens}", num_tokens=num_tokens)


def say(console: Any, lines: list[str]) -> None:
    """Plain text, never folded, so that it reads the same in a file."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
