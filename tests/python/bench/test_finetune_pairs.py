# SPDX-License-Identifier: Apache-2.0
"""benchmarks/hf/finetune.py, whose models need a GPU: the batch of a comparison, on the CPU.

A stand-in for a model runs out of memory above a number of sequences that its implementation
sets, separately for a first step, for what comes after it and for a block alone.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "hf"
NEVER = 100
HIDDEN = 4


@pytest.fixture(scope="module")
def finetune():
    """The script as a module; it imports its neighbours by name."""
    sys.path.insert(0, str(FOLDER))
    import finetune

    yield finetune
    sys.path.remove(str(FOLDER))


class Layer(nn.Module):
    """What stands for a decoder layer: its MoE block."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))


class Model(nn.Module):
    """One layer over an embedding; asks the active implementation whether a batch fits."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=8, hidden_size=HIDDEN)
        self.embedding = nn.Embedding(8, HIDDEN)
        self.model = SimpleNamespace(layers=[Layer()])
        self.active = None

    def forward(self, input_ids, labels):
        activations = self.embedding(input_ids)
        self.active.check_step(activations)
        return SimpleNamespace(loss=self.model.layers[0].mlp(activations).sum())


class Stub:
    """An implementation whose first step, later steps and blocks alone fit up to some batch."""

    def __init__(self, name, first=NEVER, later=NEVER, block=NEVER, error=None):
        self.name, self.first, self.later, self.block = name, first, later, block
        self.error = error
        self.batches: list[int] = []  # of the steps so far
        self.held: list[weakref.ref] = []  # to the activations of steps that failed

    @contextmanager
    def active(self, model):
        model.active = self
        yield

    def alone(self, block):
        def call(x):
            self.check(x, self.block)
            return block(x)

        return call

    def check_step(self, activations):
        if self.error is not None:
            raise self.error
        batch = activations.shape[0]
        limit = self.later if batch in self.batches else self.first
        self.batches.append(batch)
        self.check(activations, limit)

    def check(self, activations, limit):
        if activations.shape[0] > limit:
            self.held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("Tried to allocate 6.14 GiB\nand a second line")


@pytest.fixture
def run(finetune):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return finetune.Run(model, optimizer, "cpu", 3, finetune.Effort(1, 1.0))


@pytest.mark.parametrize(
    ("peer", "ours", "batch"),
    [
        ({}, {}, 8),
        ({"first": 4}, {}, 4),
        ({"later": 4}, {}, 4),
        ({"block": 2}, {}, 2),
        ({}, {"first": 4}, 4),
        ({"first": 4}, {"later": 1}, 1),
    ],
    ids=["fits", "first-step", "timed-step", "block", "ours", "ours-timed"],
)
def test_whatever_runs_out_of_memory_sends_the_pair_on(finetune, run, peer, ours, batch):
    rows = finetune.compare(run, Stub("peer", **peer), Stub("ours", **ours), (8, 4, 2, 1))
    assert [(row["impl"], row["batch"]) for row in rows] == [("peer", batch), ("ours", batch)]
    assert rows[1]["step_speedup"] == rows[0]["step_ms"] / rows[1]["step_ms"]
    assert rows[0]["first_step_s"] > 0


def test_nothing_of_a_batch_that_failed_stays_alive(finetune, run):
    peer = Stub("peer", later=4, block=2)
    alive = []
    release = finetune.release_memory

    def release_and_look(of):
        release(of)
        alive.append(sum(held() is not None for held in peer.held))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "release_memory", release_and_look)
        gc.disable()  # what a pair leaves is given back by release_memory, not by chance
        try:
            finetune.compare(run, peer, Stub("ours"), (8, 4, 2))
        finally:
            gc.enable()
    assert len(peer.held) == 2  # a timed step at 8, a block alone at 4
    assert alive[-1] == 0
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_peer_that_fits_nowhere_is_a_row_with_the_reason(finetune, run):
    rows = finetune.compare(run, Stub("peer", first=0), Stub("ours"), (2, 1))
    reason = "OutOfMemoryError: Tried to allocate 6.14 GiB"
    assert rows == [{"impl": "peer", "batch": 0, "not_run": reason}]


def test_another_error_of_a_first_step_is_not_tried_again(finetune, run):
    peer = Stub("peer", error=ImportError("no such package"))
    rows = finetune.compare(run, peer, Stub("ours"), (8, 4))
    assert rows == [{"impl": "peer", "batch": 0, "not_run": "ImportError: no such package"}]


def test_rows_are_on_disk_before_the_next_peer_runs(finetune, run, monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(finetune, "registered", lambda: ["first", "second"])
    monkeypatch.setattr(finetune, "make_run", lambda args: run)
    monkeypatch.setattr(finetune, "OURS", "ours")
    monkeypatch.setattr(finetune.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--json", str(path)])

    def implementation(name):
        if name == "second":
            raise KeyboardInterrupt
        return Stub(name)

    monkeypatch.setattr(finetune, "Implementation", implementation)
    with pytest.raises(KeyboardInterrupt):
        finetune.main()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["impl"] for row in rows] == ["first", "ours"]
