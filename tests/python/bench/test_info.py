# SPDX-License-Identifier: Apache-2.0
"""penstock info: complete where everything is there, and of use where something is missing."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys

import pytest

import penstock
from penstock.bench import self_check
from penstock.bench.peers import penstock_engine

# penstock.info is the function, also after this.
info = importlib.import_module("penstock.info")


def printed(capsys, *options: str) -> str:
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args(options)) == 0
    return capsys.readouterr().out


def test_json_and_text_tell_the_same(capsys):
    facts = json.loads(printed(capsys, "--json"))
    text = printed(capsys)
    assert facts["engine"]["version"]
    names = [backend["name"] for backend in facts["engine"]["backends"]]
    assert {"reference", "fast", "cuda"} <= set(names)
    assert all(name in text for name in names)
    for backend in facts["engine"]["backends"]:
        assert backend["available"] or backend["reason"] in text
    assert facts["cpu"]["name"] in text
    assert facts["cpu"]["usable_cores"] >= 1


def test_the_function_gives_what_the_command_prints(capsys):
    told = json.loads(json.dumps(penstock.info()["engine"]))  # tuples become lists
    assert told == json.loads(printed(capsys, "--json"))["engine"]


def test_without_torch_and_rich():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['rich'] = None\n"
        "from penstock.info import as_text, collect; print(as_text(collect()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


def test_a_library_that_cannot_be_loaded_is_a_line_not_a_crash(monkeypatch):
    def missing():
        raise ImportError("penstock's engine: got no file, expected the library")

    monkeypatch.setattr(penstock, "list_backends", missing)
    facts = info.collect()
    assert facts["engine"]["backends"] == []
    assert "cannot be loaded: penstock's engine" in info.as_text(facts)


def test_gpu_from_nvidia_smi(monkeypatch):
    listed = "NVIDIA H200, 9.0, 143771, 570.10\nNVIDIA H200, 9.0, 143771, 570.10\n"

    def smi(*args, **options):
        return subprocess.CompletedProcess(args, 0, stdout=listed)

    monkeypatch.setattr(info.subprocess, "run", smi)
    facts = info.gpu()
    assert [device["name"] for device in facts["devices"]] == ["NVIDIA H200"] * 2
    assert facts["driver"] == "570.10"
    assert "580" in facts["note"]


def test_no_gpu(monkeypatch):
    def absent(*args, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(info.subprocess, "run", absent)
    monkeypatch.setattr(info.Path, "read_text", lambda *a, **k: absent())
    assert info.gpu() == {"devices": [], "driver": None, "note": "no NVIDIA driver found"}


def test_verification_of_every_backend(capsys):
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args(["--verify"])) == 0
    lines = capsys.readouterr().out.split("Verification\n")[1].splitlines()
    facts = json.loads(printed(capsys, "--verify", "--json"))
    assert [entry["right"] for entry in facts["verification"]] == [True] * len(lines)
    usable = {b.name for b in penstock.list_backends() if b.available}
    assert {line.split()[0] for line in lines} == usable
    assert all(" ok " in line for line in lines) and len(lines) % len(self_check.SHAPES) == 0


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_backend_is_found(factor, monkeypatch, capsys):
    """As if the compiler had broken one product."""
    right = penstock_engine.PEER
    wrong = right._replace(forward=lambda *call: right.forward(*call) * factor)
    monkeypatch.setattr(penstock_engine, "PEER", wrong)
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args(["--verify"])) == 1
    assert "WRONG" in capsys.readouterr().out
