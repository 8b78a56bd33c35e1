# SPDX-License-Identifier: Apache-2.0
"""Every family: a patched model against transformers' own eager computation of the same model.

fp32: logits, every gradient, greedy generation. bf16: our error against an fp32 run, with the
experts replayed from it, beside transformers' own. The bars are those of docs/hf.md, whose support
matrix lists exactly the families tested here.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from families import BF16_FAMILIES, FAMILIES, relative_error, tiny_model, tokens
from replay import RecordChoices, ReplayChoices

import penstock

MATRIX = Path(__file__).resolve().parents[3] / "docs" / "hf.md"
FP32_BAR = 1e-5
BF16_FACTOR = 1.1
SEEDS = 10
# qwen3_next has gradients of four elements each, whose errors need more runs to average out.
MORE_SEEDS = {"qwen3_next": 40}


def logits_and_grads(model, ids):
    """Logits of one training step and the gradient of every parameter."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_and_gradients(family):
    # Seed 1: with seed 0 the gradient of qwen3_next's A_log nearly cancels, and transformers' own
    # error against float64 is 2e-5 there.
    model, ids = tiny_model(family, seed=1), tokens(1)
    logits, grads = logits_and_grads(model, ids)
    report = penstock.hf.patch(model)
    assert report.replaced and not report.refused
    ours, our_grads = logits_and_grads(model, ids)
    assert relative_error(ours, logits) <= FP32_BAR
    assert our_grads.keys() == grads.keys()
    errors = {name: relative_error(our_grads[name], grads[name]) for name in grads}
    assert max(errors.values()) <= FP32_BAR, max(errors.items(), key=lambda item: item[1])
    assert any("experts" in name and grad.any() for name, grad in our_grads.items())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_same_in_plain_torch(family):
    """penstock.backend("torch") under a patched model: pairs of layouts, biases, other routers."""
    model, ids = tiny_model(family, seed=1), tokens(1)
    logits, grads = logits_and_grads(model, ids)
    penstock.hf.patch(model)
    with penstock.backend("torch", threads=0):
        ours, our_grads = logits_and_grads(model, ids)
    assert relative_error(ours, logits) <= FP32_BAR
    assert our_grads.keys() == grads.keys()
    errors = {name: relative_error(our_grads[name], grads[name]) for name in grads}
    assert max(errors.values()) <= FP32_BAR, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(family):
    model, ids = tiny_model(family, seed=2), tokens(2, (2, 9))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0  # padding on the left, as batched prompts have
    settings = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False}
    expected = model.generate(ids, **settings)
    penstock.hf.patch(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert expected.shape == (2, 9 + 32)


@pytest.mark.parametrize("family", BF16_FAMILIES)
def test_bf16_error_is_that_of_transformers(family):
    errors = defaultdict(lambda: [0.0, 0.0])  # of ours and of transformers', summed over seeds
    for seed in range(MORE_SEEDS.get(family, SEEDS)):
        model, ids = tiny_model(family, seed), tokens(seed)
        with torch.no_grad():  # numbers that both dtypes hold, so that only arithmetic differs
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        with RecordChoices() as record:
            expected = logits_and_grads(model, ids)
        model.bfloat16()
        with ReplayChoices(record.choices) as replay:
            theirs = logits_and_grads(model, ids)
        assert record.choices and not replay.left
        penstock.hf.patch(model)
        with ReplayChoices(record.choices):
            ours = logits_and_grads(model, ids)
        for which, (logits, grads) in enumerate((ours, theirs)):
            errors["logits"][which] += relative_error(logits, expected[0])
            for name, grad in grads.items():
                errors[name][which] += relative_error(grad, expected[1][name])
    too_large = {
        name: our_error / their_error
        for name, (our_error, their_error) in errors.items()
        if our_error > BF16_FACTOR * their_error
    }
    assert not too_large


def matrix_row(family):
    """The family's row of the support matrix, from what patch() does to it."""
    (how,) = {row.detail for row in penstock.hf.patch(tiny_model(family)).replaced}
    bf16 = "yes" if family in BF16_FAMILIES else "no"
    return f"| `{family}` | {bf16} | {how} |"


def test_the_support_matrix_is_what_is_tested():
    documented = re.findall(r"^\| `\w+` \| (?:yes|no) \|.*$", MATRIX.read_text(), re.MULTILINE)
    here = [row for row in documented if row.split("`")[1] in FAMILIES]
    assert here == [matrix_row(family) for family in FAMILIES]
