# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning step of an OLMoE-shaped model with our experts and with transformers' own.

    python benchmarks/hf/finetune.py                               # 168 M parameters on the CPU
    python benchmarks/hf/finetune.py --device cuda --compile grouped_mm --json rows.jsonl

One random model, whose experts implementation is switched: every implementation that transformers
registers, and ours, work on the same weights. For each peer the largest batch is found at which the
comparison fits into the device's memory. Compared are, in turn in one process: whole steps (SGD),
one MoE block alone (router and experts, forward and backward, times the number of layers), the
bytes that the blocks keep for backward, and the peak of memory. `Amdahl` is the speed-up of the
step if the blocks' time alone had changed:

    peer's step / (peer's step - peer's blocks + our blocks)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import OURS, Compiled, Implementation, registered
from rich.console import Console
from rich.table import Table
from timing import Effort, device_name, medians_in_turn, synchronize
from torch import Tensor, nn

import penstock
from penstock.testing import kept_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# OLMoE-1B-7B, and a model of its shape that two cores can train.
MODELS: dict[str, dict[str, int]] = {
    "olmoe": {"intermediate_size": 1024},  # the published checkpoint's; the class's default is 2048
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}
BATCHES = {"cuda": (8, 4, 2, 1), "cpu": (1,)}
SEQUENCE = {"cuda": 4096, "cpu": 512}
LEARNING_RATE = 1e-4


class DoesNotRun(Exception):
    """A peer fails at any batch; the text is its row's reason."""


class Run(NamedTuple):
    """One model, its data, and what is asked of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: str
    sequence: int
    effort: Effort


def make_run(args: argparse.Namespace) -> Run:
    """The model with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(**MODELS[args.model], use_cache=False)
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    effort = Effort(args.rounds, args.seconds)
    return Run(model.train(), optimizer, args.device, args.sequence, effort)


def step_of(run: Run, batch: int) -> Callable[[], Any]:
    """One step of training on random tokens."""
    size = (batch, run.sequence)
    tokens = torch.randint(run.model.config.vocab_size, size, device=run.device)

    def step() -> None:
        run.model(input_ids=tokens, labels=tokens).loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

    return step


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The MoE blocks, router and experts each."""
    return [layer.mlp for layer in model.model.layers]


def block_input(run: Run, batch: int) -> Tensor:
    """Hidden states (batch, sequence, d) that want a gradient."""
    size = (batch, run.sequence, run.model.config.hidden_size)
    x = torch.randn(size, device=run.device, dtype=next(run.model.parameters()).dtype)
    return x.requires_grad_()


def block_step_of(run: Run, implementation: Implementation, x: Tensor) -> Callable[[], Any]:
    """Forward and backward of the first block alone, with the gradients of its weights."""
    block = blocks_of(run.model)[0]
    inputs, d_output = [x, *block.parameters()], torch.ones_like(x)
    call = implementation.alone(block)
    return lambda: torch.autograd.grad(call(x), inputs, d_output)


def kept_by_blocks(run: Run, implementation: Implementation, batch: int) -> int:
    """Bytes that all blocks keep for backward, their inputs and weights aside."""
    block, x = blocks_of(run.model)[0], block_input(run, batch)
    with kept_bytes(x, *block.parameters()) as kept:
        output = implementation.alone(block)(x)
    del output
    return kept.total * len(blocks_of(run.model))


def peak_of(step: Callable[[], Any], device: str) -> int | None:
    """The most bytes allocated during a step, weights included; None where nobody counts."""
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated()


def release_memory(run: Run) -> None:
    """Give back what a step has left: gradients, reference cycles, the allocator's free blocks."""
    run.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()


def first_step(run: Run, implementation: Implementation, batch: int) -> None:
    """One step, to see whether it runs; DoesNotRun where anything but memory is the cause."""
    try:
        with implementation.active(run.model):
            step_of(run, batch)()
            synchronize(run.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever keeps a peer from running is its row's reason
        raise DoesNotRun(reason_of(error)) from None
    finally:
        release_memory(run)


def reason_of(error: Exception) -> str:
    """An error's type and first line, without its frames, which hold tensors."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def measure(run: Run, implementation: Implementation, batch: int) -> dict[str, Any]:
    """Kept bytes and peak of one implementation."""
    with implementation.active(run.model):
        peak = peak_of(step_of(run, batch), run.device)
        return {"kept_bytes": kept_by_blocks(run, implementation, batch), "peak_bytes": peak}


def times_in_turn(
    run: Run, compared: list[Implementation], batch: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step and of all blocks, by implementation."""

    def under(implementation: Implementation, action: Callable[[], Any]) -> Callable[[], Any]:
        def activated() -> Any:
            with implementation.active(run.model):
                return action()

        return activated

    step, x = step_of(run, batch), block_input(run, batch)
    actions = {f"{i.name}/step": under(i, step) for i in compared}
    actions |= {f"{i.name}/block": under(i, block_step_of(run, i, x)) for i in compared}
    times = medians_in_turn(actions, run.device, run.effort)
    layers = len(blocks_of(run.model))
    return {
        i.name: {
            "step_ms": times[f"{i.name}/step"],
            "blocks_ms": times[f"{i.name}/block"] * layers,
        }
        for i in compared
    }


def compare(
    run: Run, peer: Implementation, ours: Implementation, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """The peer's row and ours at the largest batch at which everything that is measured runs.

    A step that fitted once may not fit while it is timed beside others, so whatever runs out of
    memory sends the pair to the next batch. Where the peer cannot run, its row alone, batch 0.
    """
    began = time.perf_counter()
    reason = ""
    for batch in batches:
        try:
            first_step(run, peer, batch)
            spent = time.perf_counter() - began
            row, own = rows_of_pair(run, peer, ours, batch)
            return [row | {"first_step_s": spent}, own]
        except torch.OutOfMemoryError as error:
            reason = reason_of(error)
        except DoesNotRun as error:
            reason = str(error)
            break
        finally:
            release_memory(run)
    return [{"impl": peer.name, "batch": 0, "not_run": reason}]


def rows_of_pair(
    run: Run, peer: Implementation, ours: Implementation, batch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Memory, times and their ratios of the peer and of ours at one batch."""
    row: dict[str, Any] = {"impl": peer.name, "batch": batch}
    own: dict[str, Any] = {"impl": ours.name, "batch": batch, "peer": peer.name}
    for implementation, figures in ((peer, row), (ours, own)):
        figures |= measure(run, implementation, batch)
        release_memory(run)
    times = times_in_turn(run, [peer, ours], batch)
    row |= times[peer.name]
    own |= times[ours.name]
    amdahl = row["step_ms"] / (row["step_ms"] - row["blocks_ms"] + own["blocks_ms"])
    own |= {
        "step_speedup": row["step_ms"] / own["step_ms"],
        "blocks_speedup": row["blocks_ms"] / own["blocks_ms"],
        "amdahl_speedup": amdahl,
        "share_of_amdahl": row["step_ms"] / own["step_ms"] / amdahl,
        "kept_ratio": own["kept_bytes"] / row["kept_bytes"],
    }
    if row["peak_bytes"]:
        own["peak_ratio"] = own["peak_bytes"] / row["peak_bytes"]
    return row, own


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows of what ran, for people: figures, and how many times less than the peer's."""
    table = Table(title=title)
    columns = "experts, batch, step ms, x, MoE ms, x, of Amdahl, kept MiB, ratio, peak GiB, ratio"
    for name in columns.split(", "):
        table.add_column(name, justify="left" if name == "experts" else "right", no_wrap=True)

    def cell(row: dict[str, Any], key: str, form: str, unit: float = 1.0) -> str:
        return format(row[key] / unit, form) if row.get(key) is not None else ""

    for row in rows:
        if "not_run" in row:
            continue
        table.add_row(
            row["impl"],
            str(row["batch"]),
            cell(row, "step_ms", ".0f"),
            cell(row, "step_speedup", ".2f"),
            cell(row, "blocks_ms", ".0f"),
            cell(row, "blocks_speedup", ".2f"),
            cell(row, "share_of_amdahl", ".2f"),
            cell(row, "kept_bytes", ".0f", 2**20),
            cell(row, "kept_ratio", ".2f"),
            cell(row, "peak_bytes", ".1f", 2**30),
            cell(row, "peak_ratio", ".2f"),
            end_section="peer" in row,
        )
    return table


def parse_arguments() -> argparse.Namespace:
    """The command line, defaults by device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), help="olmoe on a GPU, else small")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, else float32")
    parser.add_argument("--sequence", type=int, help="tokens of one sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one peer's rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", help="comma-separated; all that transformers registers")
    parser.add_argument(
        "--compile", default="", help="peers to run compiled as well, comma-separated"
    )
    parser.add_argument("--memory", type=int, default=8, help="GiB that may be used on the CPU")
    parser.add_argument("--json", type=Path, help="add the rows to this file, one object a line")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.model = args.model or ("olmoe" if on_gpu else "small")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.sequence = args.sequence or SEQUENCE[args.device]
    return args


def compared(run: Run, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of every peer, each as soon as it is measured."""
    known = registered()
    batches = BATCHES[args.device]
    for name in args.peers.split(",") if args.peers else known:
        found = compare(run, Implementation(name), Implementation(OURS), batches)
        yield found
        if name in args.compile.split(",") and found[0]["batch"]:
            no_larger = [batch for batch in batches if batch <= found[0]["batch"]]
            yield compare(run, Compiled(name), Compiled(OURS), no_larger)


def report(found: list[dict[str, Any]], console: Console) -> None:
    """One line a row, while the next peer is measured."""
    for row in found:
        if "not_run" in row:
            said = f"does not run: {row['not_run']}"
        else:
            times = f"step {row['step_ms']:.0f} ms, MoE {row['blocks_ms']:.0f} ms"
            said = f"batch {row['batch']}: {times}"
        console.print(f"{row['impl']}: {said}", markup=False)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file, one object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Compare with every peer, write its rows when they are there, print the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cpu":  # a peer that wants too much is to fail, not the machine
        resource.setrlimit(resource.RLIMIT_DATA, (args.memory << 30,) * 2)
    run = make_run(args)
    facts = {
        "device": device_name(args.device),
        "model": args.model,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "dtype": args.dtype,
        "sequence": args.sequence,
    }
    console = Console(width=110)
    rows = []
    with penstock.backend(threads=args.threads):
        for found in compared(run, args):
            rows += found
            report(found, console)
            if args.json is not None:
                append_rows(args.json, [facts | row for row in found])
    title = ", ".join(f"{value:,}" if isinstance(value, int) else value for value in facts.values())
    console.print(table_of(rows, title))


if __name__ == "__main__":
    main()
