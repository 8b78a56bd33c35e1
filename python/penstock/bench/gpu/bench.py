# SPDX-License-Identifier: Apache-2.0
"""The rows of one shape on a GPU: first step, verification, memory, timings in turn, profile.

Called by penstock.bench.command for `--device cuda`. Nothing gets figures unless it was verified;
the yardstick computes no layer, so there is nothing to verify.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from penstock.bench.gpu import clock, launches, yardstick
from penstock.bench.gpu.ceilings import Ceilings
from penstock.bench.gpu.formulas import bytes_of_experts, work_of_launches
from penstock.bench.gpu.memory import measure_memory
from penstock.bench.gpu.report import add_times, as_launch_rows
from penstock.bench.gpu.runs import Eager, Replay, actions_of, eager
from penstock.bench.gpu.skew import with_load
from penstock.bench.peers.peer import Peer
from penstock.bench.problem import Problem, Tensors, make_tensors
from penstock.bench.report import add_ratios, make_row
from penstock.bench.verify import verify

OURS = "penstock"
FORWARD_ONLY = "forward"

Row = dict[str, Any]


class Session(NamedTuple):
    """What holds for every shape of a run."""

    facts: Row  # the card, versions, commit, ceilings, the process's start
    ceilings: Ceilings
    rounds: int
    load: str


class Prepared(NamedTuple):
    """A shape's rows by implementation, and what of it can be timed."""

    tensors: Tensors
    rows: dict[str, Row]
    runs: dict[str, tuple[Peer, Eager]]


def bench_shape(problem: Problem, peers: list[Peer], session: Session) -> list[Row]:
    """One row a peer and one for the yardstick: forward, backward and both, eager and replayed."""
    prepared = _prepare(problem, peers, session)
    actions: dict[str, clock.Action] = {}
    for name, (peer, run) in prepared.runs.items():
        row = prepared.rows[name]
        memory = measure_memory(run.forward, run.backward)
        row |= {**memory._asdict(), "peak_beyond_results": memory.peak_beyond_results}
        if name == OURS:
            row |= memory_by_formula(problem)
        actions |= actions_of(name, run.forward, run.step, peer.why_no_graph)
    reference = yardstick.Yardstick(problem, prepared.tensors)
    prepared.rows[yardstick.NAME] = _new_row(problem, yardstick.NAME, session)
    actions |= actions_of(yardstick.NAME, reference.forward, reference.step, "")
    times = clock.time_in_turn(actions, session.rounds)
    for name, row in prepared.rows.items():
        if any(key.startswith(f"{name}/") for key in times):
            add_times(row, name, times, problem.shape.flops, session.ceilings)
    rows = list(prepared.rows.values())
    add_ratios(rows)
    return rows


def bench_forward(problem: Problem, peers: list[Peer], session: Session) -> list[Row]:
    """Rows of forward alone, nothing kept: decoding, whose bound is reading the weights."""
    prepared = _prepare(problem, peers, session)
    actions: dict[str, clock.Action] = {}
    for name, (peer, run) in prepared.runs.items():
        actions[f"{name}/eager/forward"] = run.infer
        if not peer.why_no_graph:
            actions[f"{name}/graph/forward"] = Replay(run.infer)
    times = clock.time_in_turn(actions, session.rounds) if actions else {}
    element = prepared.tensors.x.element_size()
    touched = experts_touched(problem, prepared.tensors)
    num_bytes = bytes_of_experts(problem.shape, touched, element)
    for name in prepared.runs:
        best = times.get(f"{name}/graph/forward", times[f"{name}/eager/forward"])
        prepared.rows[name] |= {
            "forward_ms": best.median,
            "forward_ms_quartiles": [best.low, best.high],
            "eager_forward_ms": times[f"{name}/eager/forward"].median,
            "experts_touched": touched,
            "bytes_touched": num_bytes,
            "bound_ms": num_bytes / session.ceilings.read_gbs * 1e-6,
        }
    for row in prepared.rows.values():
        row["pass"] = FORWARD_ONLY
    return list(prepared.rows.values())


def profile_shape(problem: Problem, peer: Peer, session: Session) -> Row:
    """Our launches of one step, each with its work by formula and its share of the ceilings."""
    import torch

    tensors = with_load(problem, make_tensors(problem), session.load)
    run = eager(peer, problem, tensors)
    flush = torch.empty(clock.FLUSH_BYTES, dtype=torch.int8, device=problem.device)
    found = launches.profile_step(run.step, flush.zero_)
    work = work_of_launches(problem.shape, tensors.x.element_size())
    rates = launches.rates(found, work, session.ceilings)
    forward, backward = launches.count_passes([launch.name for launch in found])
    row = _new_row(problem, peer.name, session)
    row |= {"pass": "profile", "forward_launches": forward, "backward_launches": backward}
    return row | {"launches": as_launch_rows(rates)}


def _prepare(problem: Problem, peers: list[Peer], session: Session) -> Prepared:
    """Makes the tensors, takes each peer's first step, and verifies it."""
    tensors = with_load(problem, make_tensors(problem), session.load)
    prepared = Prepared(tensors, {}, {})
    for peer in peers:
        row = prepared.rows[peer.name] = _new_row(problem, peer.name, session)
        run = eager(peer, problem, tensors)
        row["first_step_s"], reason = _first_step(peer, problem, run)
        if not reason:
            found = verify(peer, problem, tensors)
            row |= {"verified": not found.problem, "rel_l2": found.rel_l2}
            row["rel_l2_full"] = found.rel_l2_full
            reason = f"wrong: {found.problem}" if found.problem else ""
        if reason:
            row["not_run"] = reason
        else:
            prepared.runs[peer.name] = (peer, run)
    return prepared


def _first_step(peer: Peer, problem: Problem, run: Eager) -> tuple[float, str]:
    """Seconds from asking whether it can run to the end of a step, and why it cannot."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    reason = peer.why_not(problem)
    if not reason:
        run.step()
        torch.cuda.synchronize()
    return time.perf_counter() - began, reason


def memory_by_formula(problem: Problem) -> Row:
    """What we say that we keep, and the larger workspace of the two passes."""
    from penstock import functional

    sizes, settings = problem.shape.sizes, {"dtype": problem.dtype, "save": problem.save}
    passes = ("forward", "backward")
    workspaces = [
        functional.workspace_bytes(
            sizes, which, **settings, order=problem.order, device=problem.device
        )
        for which in passes
    ]
    return {
        "kept_bytes_formula": functional.saved_bytes(sizes, **settings),
        "workspace_bytes_formula": max(workspaces),
    }


def experts_touched(problem: Problem, tensors: Tensors) -> int:
    """Experts that at least one token chooses."""
    logits = tensors.x.detach().float() @ tensors.router_weight.detach().float().t()
    return logits.topk(problem.shape.top_k, dim=-1).indices.unique().numel()


def _new_row(problem: Problem, impl: str, session: Session) -> Row:
    return make_row(problem, impl, session.facts) | {"load": session.load}
