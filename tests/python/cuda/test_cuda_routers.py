# SPDX-License-Identifier: Apache-2.0
"""Routers on the GPU through torch: who goes where is the CPU's, and a replay has the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock import functional, routers

CASES = json.loads(
    (Path(__file__).resolve().parents[2] / "cases" / "routers.json").read_text(encoding="utf-8")
)["routers"]
TOKENS, EXPERTS, TOP_K = 700, 48, 4


def options_of(case: dict, device: str) -> dict:
    options = dict(case["options"])
    if "bias" in options:
        generator = torch.Generator().manual_seed(options["bias"])
        options["bias"] = 0.3 * torch.randn(EXPERTS, generator=generator).to(device)
    return options


def logits_of(kind: str) -> torch.Tensor:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5))
    return logits if kind == "random" else (4 * logits).round() / 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['router']}-{case['options']}")
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_choices_are_the_cpus_and_a_replay_repeats_them(case: dict, kind: str) -> None:
    on_cpu = functional.route(
        logits_of(kind), TOP_K, router=case["router"], **options_of(case, "cpu")
    )
    logits = logits_of(kind).cuda().requires_grad_()
    routing = functional.route(logits, TOP_K, router=case["router"], **options_of(case, "cuda"))
    assert torch.equal(routing.ids.cpu(), on_cpu.ids)
    torch.testing.assert_close(routing.scores.detach().cpu(), on_cpu.scores, rtol=1e-5, atol=1e-7)
    plans = [functional.plan(r, EXPERTS) for r in (routing, replace(routing, plan=None))]
    rows = int(plans[0].expert_offsets[-1])
    for name, carried, built in zip(plans[0]._fields, *plans, strict=True):
        if isinstance(built, torch.Tensor):
            end = rows if name.startswith("row_to") else None  # rows past the last are not written
            assert torch.equal(carried[:end], built[:end]), name
        else:
            assert carried == built, name
    replayed = routers.replay(logits, routing.detach())
    assert torch.equal(replayed.scores, routing.scores)
    dscores = torch.linspace(-1, 1, len(routing.scores), device="cuda")
    gradients = [torch.autograd.grad(r.scores, logits, dscores)[0] for r in (routing, replayed)]
    assert torch.equal(*gradients)
