# SPDX-License-Identifier: Apache-2.0
"""The `penstock bench` subcommand: options, and the order of things.

For each shape: verify every peer, time those that passed in turn, measure their memory, print a
table, write rows; on a GPU, gpu/command.py does that. Exit codes: 0, 1 when a verification failed,
2 for options that cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

DEFAULT_SHAPES = {
    "cpu": ("cpu-1", "cpu-2", "cpu-3"),
    "cuda": (
        "1.4B-n256", "7B-n256", "7B-n1024", "30B-n256", "30B-n1024", "120B-n1024", "olmoe",
        "qwen3-next", "small-T",
    ),
}  # fmt: skip
DEFAULT_DTYPES = {"cpu": "fp32", "cuda": "bf16"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
LOADS = ("uniform", "zipf", "hot")
NOT_VERIFIED = 1
UNUSABLE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument(
        "--shape",
        action="append",
        metavar="T,d,n,E,K",
        help="five numbers, or a name (--list shows them); may be repeated; "
        "default: cpu-1 cpu-2 cpu-3, or the published ones on a GPU",
    )
    parser.add_argument("--list", action="store_true", help="list the named shapes and leave")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, *DTYPES.values()], help="default: fp32, or bf16 on a GPU"
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads for everyone (default: all cores)"
    )
    parser.add_argument(
        "--save", choices=("preactivation", "input"), default="preactivation",
        help="what Penstock keeps for backward (default: preactivation)",
    )  # fmt: skip
    parser.add_argument(
        "--order", choices=("fast", "low_memory"), default="fast",
        help="of Penstock's launches (default: fast)",
    )  # fmt: skip
    parser.add_argument("--backend", default="", help="of Penstock (default: the device's first)")
    parser.add_argument(
        "--peers", default="", help="only these, by comma: penstock,torch-loop,torch-grouped, and "
        "on a GPU torch-compiled,sonicmoe,scattermoe,momoe"
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write one row a line")
    parser.add_argument(
        "--commit", default="", help="for the rows, where the sources are not a checkout"
    )
    _add_gpu_arguments(parser)


def _add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on a GPU")
    group.add_argument(
        "--load", choices=LOADS, default="uniform",
        help="how tokens spread over the experts: zipf (1 / rank), hot (all to the same K)",
    )  # fmt: skip
    group.add_argument(
        "--tokens", type=_counts, default=(), metavar="T,...",
        help="forward alone with these numbers of tokens: decoding",
    )  # fmt: skip
    group.add_argument("--profile", action="store_true", help="also time each launch of ours")
    group.add_argument("--png", type=Path, metavar="FILE", help="also draw the ratios to cuBLAS")


def _counts(text: str) -> tuple[int, ...]:
    """Numbers by comma, 1 or more each."""
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise ValueError
    return counts


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    try:
        return _run(args)
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        print(f"penstock bench: error: {error}", file=sys.stderr)
        return UNUSABLE


def _run(args: argparse.Namespace) -> int:
    from penstock.bench.shapes import known_shapes, parse_shape

    if args.list:
        for shape in known_shapes().values():
            print(f"{shape.name:12} {','.join(map(str, shape.sizes))}")
        return 0
    _check(args)
    shapes = [parse_shape(text) for text in args.shape or DEFAULT_SHAPES[args.device]]

    # The memory measurement uses torch's profiler, whose own log lines would fill the screen.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch
    from rich.console import Console

    from penstock.bench.problem import Problem

    peers = _chosen_peers(args.peers, args.device)
    threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    console = Console()
    dtype = args.dtype or DEFAULT_DTYPES[args.device]
    problems = [
        Problem(
            shape,
            DTYPES.get(dtype, dtype),
            args.device,
            args.save,
            args.backend,
            threads,
            args.order,
        )
        for shape in shapes
    ]
    if args.device == "cuda":
        from penstock.bench.gpu.command import run as run_on_gpu

        all_rows = run_on_gpu(args, problems, peers, console)
    else:
        all_rows = _run_on_cpu(args, problems, peers, console)
    failed = [row for row in all_rows if row.get("verified") is False]
    return NOT_VERIFIED if failed else 0


def _run_on_cpu(
    args: argparse.Namespace, problems: list[Any], peers: list[Any], console: Any
) -> list[dict[str, Any]]:
    from penstock.bench.report import write_json

    all_rows: list[dict[str, Any]] = []
    for problem in problems:
        rows = bench_shape(problem, peers, args.repeats, console)
        if args.commit:
            for row in rows:
                row["commit"] = args.commit
        all_rows += rows
        if args.json:
            write_json(args.json, all_rows)
    return all_rows


def bench_shape(problem: Any, peers: list[Any], repeats: int, console: Any) -> list[dict[str, Any]]:
    """Rows of one shape, one a peer, in the peers' order; prints their table."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from penstock.bench import report
    from penstock.bench.measure import measure_memory, time_peers
    from penstock.bench.problem import make_tensors
    from penstock.bench.verify import verify

    facts = report.machine_facts(problem.threads)
    rows = {peer.name: report.make_row(problem, peer.name, facts) for peer in peers}
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{problem.shape.name}: making tensors")
        tensors = make_tensors(problem)
        able, verified = [], {}
        for peer in peers:
            progress.update(task, description=f"{problem.shape.name}: verifying {peer.name}")
            if reason := peer.why_not(problem):
                rows[peer.name]["not_run"] = reason
                continue
            verified[peer.name] = verify(peer, problem, tensors)
            rows[peer.name]["verified"] = not verified[peer.name].problem
            if verified[peer.name].problem:
                rows[peer.name]["not_run"] = f"wrong: {verified[peer.name].problem}"
            else:
                able.append(peer)
        memory = {peer.name: measure_memory(peer, problem, tensors) for peer in able}
        progress.update(task, description=f"{problem.shape.name}: timing")
        times = time_peers(able, problem, tensors, repeats) if able else {}
    for peer in able:
        name = peer.name
        report.add_results(rows[name], problem, verified[name], times[name], memory[name])
        if name == "penstock":
            rows[name] |= _own_facts(problem, tensors)
    result = list(rows.values())
    report.add_ratios(result)
    report.print_table(console, problem, result)
    return result


def _own_facts(problem: Any, tensors: Any) -> dict[str, Any]:
    """The backend that ran, what Penstock says it needs, the workspaces that it allocates."""
    from penstock import backend, chosen_backend, functional
    from penstock.bench.peers import penstock_engine
    from penstock.testing import watch_workspaces

    sizes, settings = problem.shape.sizes, {"dtype": problem.dtype, "save": problem.save}
    with backend(problem.backend, threads=problem.threads):
        chosen = chosen_backend(sizes, dtype=problem.dtype, device=problem.device)
        formula = {
            which: functional.workspace_bytes(
                sizes, which, **settings, order=problem.order, device=problem.device
            )
            for which in ("forward", "backward")
        }
    with watch_workspaces() as log:
        output = penstock_engine.forward(problem, tensors)
        output.backward(tensors.d_output)
    return {
        "backend": chosen,
        "kept_bytes_formula": functional.saved_bytes(sizes, **settings),
        "workspace_bytes": log.peak_bytes,
        "workspace_bytes_formula": max(formula.values()),
    }


def _chosen_peers(text: str, device: str) -> list[Any]:
    from penstock.bench import peers

    if not text:
        return list(peers.ON_GPU if device == "cuda" else peers.ALL)
    by_name = peers.by_name()
    for name in text.split(","):
        if name not in by_name:
            raise ValueError(f"--peers: got {name!r}, expected some of {', '.join(by_name)}")
    return [by_name[name] for name in text.split(",")]


def _check(args: argparse.Namespace) -> None:
    if args.device not in DEFAULT_SHAPES:
        raise ValueError(
            f"--device: got {args.device!r}, expected one of {', '.join(DEFAULT_SHAPES)}. "
            "See `penstock info` for what this machine has"
        )
    if args.device == "cuda":
        _check_gpu(args)
    if args.repeats < 1:
        raise ValueError(f"--repeats: got {args.repeats}, expected 1 or more")
    if args.threads < 0:
        raise ValueError(f"--threads: got {args.threads}, expected 0 (all cores) or more")
    if args.backend == "torch":
        raise ValueError(
            "--backend: got 'torch', expected one of the engine's, whose workspaces and launches "
            "the rows tell of. Torch's products are timed as --peers penstock,torch-grouped"
        )


def _check_gpu(args: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "--device: got 'cuda' where torch sees no GPU, expected cpu. `penstock info` says what "
            "this machine has"
        )
    if args.profile and args.peers and "penstock" not in args.peers.split(","):
        raise ValueError(
            f"--profile: got it with --peers {args.peers}, expected penstock among them. Add it"
        )
