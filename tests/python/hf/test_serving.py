# SPDX-License-Identifier: Apache-2.0
"""Serving a patched model: sizes from one token to a long prefill, the cache, batch invariance."""

import pytest
import torch
from families import relative_error, tiny_model, tokens

import penstock
from penstock.hf import _structure

SIZES = [1, 2, 3, 7, 8, 63, 64, 65, 1000, 8192]


def experts_and_inputs(family, num_tokens, dtype=torch.float32):
    (_, experts), *_ = _structure.find_experts(tiny_model(family))
    experts.to(dtype)
    generator = torch.Generator().manual_seed(5)
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    scores, ids = torch.rand(num_tokens, 8, generator=generator).topk(2)
    return experts, x, ids, scores.to(dtype)


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_prefill_and_decode_sizes(family, num_tokens):
    experts, x, ids, scores = experts_and_inputs(family, num_tokens)
    with torch.no_grad():
        expected = experts(x, ids, scores)
        penstock.hf.patch(experts)
        assert relative_error(experts(x, ids, scores), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_token_does_not_depend_on_its_neighbours(family, dtype):
    experts, x, ids, scores = experts_and_inputs(family, 300, dtype)
    penstock.hf.patch(experts)
    with torch.no_grad():
        together = experts(x, ids, scores)
        for count in (1, 5, 64, 131):
            part = slice(100, 100 + count)
            alone = experts(x[part], ids[part], scores[part])
            assert torch.equal(alone, together[part])
        order = torch.randperm(300, generator=torch.Generator().manual_seed(6))
        shuffled = experts(x[order], ids[order], scores[order])
    assert torch.equal(shuffled, together[order])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_decoding_with_the_cache_is_the_full_forward(family):
    model, ids = tiny_model(family).eval(), tokens(3, (2, 12))
    penstock.hf.patch(model)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        for position in range(7, 12):
            step = model(input_ids=ids[:, position : position + 1], past_key_values=cache)
            cache = step.past_key_values
            assert relative_error(step.logits[:, 0], whole[:, position]) <= 1e-5


def test_no_tokens_at_all():
    experts, x, ids, scores = experts_and_inputs("mixtral", 4)
    penstock.hf.patch(experts)
    empty = experts(x[:0], ids[:0], scores[:0])
    assert empty.shape == (0, x.shape[1])
