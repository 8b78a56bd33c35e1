# SPDX-License-Identifier: Apache-2.0
"""Converting checkpoints: every byte in its place, there and back, or nothing at all."""

import json
import os

import models
import pytest
import torch

from penstock.checkpoint import CheckpointError, convert
from penstock.cli import main

MANY_FILES = 700  # bytes of a shard, which makes some dozens of them


@pytest.mark.parametrize("spelling", ["mlp", "mixtral"])
@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("shard_bytes", [1, MANY_FILES, 10**9])
def test_fused_and_back(tmp_path, spelling, shards, shard_bytes):
    tensors = models.per_expert(spelling)
    source = models.write(tmp_path / "source", tensors, shards)
    convert(source, tmp_path / "fused", to="fused", shard_bytes=shard_bytes)
    expected = models.fused_by_hand(tensors, spelling)
    assert models.read(tmp_path / "fused") == {n: models.bits(t) for n, t in expected.items()}
    convert(tmp_path / "fused", tmp_path / "back", to="per_expert", spelling=spelling)
    assert models.read(tmp_path / "back") == models.read(source)
    assert (tmp_path / "back" / "config.json").read_bytes() == b'{"model_type": "made up"}'


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_layouts_and_dtypes(tmp_path, gate, bias, dtype):
    tensors = models.per_expert(gate=gate, bias=bias, dtype=dtype)
    source = models.write(tmp_path / "source", tensors, 2)
    convert(source, tmp_path / "fused", to="fused")
    expected = models.fused_by_hand(tensors)
    assert models.read(tmp_path / "fused") == {n: models.bits(t) for n, t in expected.items()}
    convert(tmp_path / "fused", tmp_path / "back", to="per_expert")
    assert models.read(tmp_path / "back") == models.read(source)


def test_files_come_back_byte_for_byte(tmp_path):
    """The same tensors in the same shards are the same files, whatever way they came."""
    models.write(tmp_path / "source", models.per_expert(), 3)
    settings = {"to": "fused", "shard_bytes": MANY_FILES}
    convert(tmp_path / "source", tmp_path / "first", **settings)
    convert(tmp_path / "first", tmp_path / "apart", to="per_expert")
    convert(tmp_path / "apart", tmp_path / "again", **settings)
    assert models.snapshot(tmp_path / "again") == models.snapshot(tmp_path / "first")
    index = json.loads((tmp_path / "first" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3


def test_progress_adds_up(tmp_path):
    tensors = models.per_expert()
    source = models.write(tmp_path / "source", tensors)
    told = []
    names = convert(source, tmp_path / "fused", to="fused", progress=told.append)
    assert sum(told) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert names == sorted(models.fused_by_hand(tensors))


def broken(change):
    """A checkpoint's tensors after `change`."""
    tensors = models.per_expert(layers=1)
    change(tensors)
    return tensors


EXPERT = "model.layers.0.mlp.experts"
HOSTILE = {
    "missing expert": (lambda t: [t.pop(f"{EXPERT}.3.{w}.weight") for w in models.WORDS["mlp"]],
                       "gate weight of expert 3"),
    "missing projection": (lambda t: t.pop(f"{EXPERT}.7.up_proj.weight"), "up weight of expert 7"),
    "extra expert": (lambda t: t.update({f"{EXPERT}.9.up_proj.weight": torch.zeros(4, 6)}),
                     "of expert 8"),
    "absurd expert": (lambda t: t.update({f"{EXPERT}.{10**15}.up_proj.weight": torch.zeros(4, 6)}),
                      "of expert 8"),
    "mapped twice": (lambda t: t.update({f"{EXPERT}.1.w3.weight": torch.zeros(4, 6)}),
                     "experts.1.w3.weight"),
    "both layouts": (lambda t: t.update({f"{EXPERT}.down_proj": torch.zeros(8, 6, 4)}),
                     "experts.down_proj beside"),
    "other shape": (lambda t: t.update({f"{EXPERT}.2.up_proj.weight": torch.zeros(5, 6)}),
                    "experts.2.up_proj.weight of F32"),
    "quantised": (lambda t: t.update({f"{EXPERT}.0.up_proj.weight_scale_inv": torch.ones(1)}),
                  "weight_scale_inv"),
    "no down projection": (
        lambda t: [t.pop(f"{EXPERT}.{e}.down_proj.weight") for e in range(8)], "gate, up"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_incomplete_experts_are_refused_by_name(tmp_path, case):
    change, named = HOSTILE[case]
    source = models.write(tmp_path / "source", broken(change), 2)
    before = models.snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        convert(source, tmp_path / "out", to="fused")
    assert models.snapshot(tmp_path) == before


def test_gpt_oss_order_is_not_split(tmp_path):
    tensors = {
        f"{EXPERT}.gate_up_proj": torch.zeros(8, 6, 8),
        f"{EXPERT}.down_proj": torch.zeros(8, 4, 6),
    }
    source = models.write(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"expected \(E, 2n, d\)"):
        convert(source, tmp_path / "out", to="per_expert")


def test_what_is_there_stays(tmp_path):
    source = models.write(tmp_path / "source", models.per_expert())
    (tmp_path / "out").mkdir()
    before = models.snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="a name not taken"):
        convert(source, tmp_path / "out", to="fused")
    with pytest.raises(CheckpointError, match="no experts to write as per_expert"):
        convert(source, tmp_path / "other", to="per_expert")
    with pytest.raises(ValueError, match="to: got 'fussed'"):
        convert(source, tmp_path / "other", to="fussed")
    assert models.snapshot(tmp_path) == before


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, fails_at):
    source = models.write(tmp_path / "source", models.per_expert(), 2)
    before = models.snapshot(tmp_path)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="No space left on device"):
        convert(source, tmp_path / "out", to="fused", shard_bytes=MANY_FILES)
    assert models.snapshot(tmp_path) == before


def test_an_interruption_leaves_nothing(tmp_path):
    source = models.write(tmp_path / "source", models.per_expert())
    before = models.snapshot(tmp_path)

    def interrupt(num_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to="fused", progress=interrupt)
    assert models.snapshot(tmp_path) == before


def test_the_program(tmp_path, capsys):
    source = models.write(tmp_path / "source", models.per_expert())
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "fused"]
    assert main(arguments) == 0
    assert "53 tensors became 9" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "a name not taken" in capsys.readouterr().err
