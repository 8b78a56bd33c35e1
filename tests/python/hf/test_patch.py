# SPDX-License-Identifier: Apache-2.0
"""patch, unpatch and the registry: what is found, refused, kept and restored."""

import copy
import pickle

import pytest
import torch
from families import relative_error, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import penstock
from penstock.hf import _structure

AUXILIARY = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"]


def experts_of(model):
    return [module for _, module in _structure.find_experts(model)]


class FusedExperts(nn.Module):
    """The shape of a transformers 5 experts module, with everything open to change."""

    def __init__(self, act_fn=nn.functional.silu, **attributes):
        super().__init__()
        self.has_bias = self.is_transposed = False
        self.act_fn = act_fn
        self.gate_up_proj = nn.Parameter(torch.randn(8, 12, 10))
        self.down_proj = nn.Parameter(torch.randn(8, 10, 6))
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def test_report_says_what_was_done_and_how():
    model = tiny_model("gpt_oss")
    report = penstock.hf.patch(model)
    assert [row.name for row in report.replaced] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    assert report.replaced[0].experts == 8 and not report.refused
    assert "swiglu_clamped, interleaved, input_major, bias" in repr(report)
    assert "2 of 2 replaced, no weights copied" in repr(report)


def test_nothing_of_the_model_changes_but_the_computation():
    model = tiny_model("qwen3_moe")
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    penstock.hf.patch(model)
    model(input_ids=tokens())
    after = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(after[n][0] is before[n][0] and after[n][1] == before[n][1] for n in before)
    assert classes == [type(module) for module in model.modules()]


def test_unpatch_restores_the_bits():
    model, ids = tiny_model("mixtral"), tokens()
    expected = model(input_ids=ids).logits
    penstock.hf.patch(model)
    penstock.hf.patch(model)
    assert not torch.equal(model(input_ids=ids).logits, expected)
    assert penstock.hf.unpatch(model) == 2
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert penstock.hf.unpatch(model) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_patched_model_computes_with_its_own_weights(duplicate):
    model, ids = tiny_model("mixtral"), tokens()
    penstock.hf.patch(model)
    twin = duplicate(model)
    expected = model(input_ids=ids).logits
    assert torch.equal(twin(input_ids=ids).logits, expected)
    with torch.no_grad():
        for module in experts_of(twin):
            module.down_proj.zero_()
    assert not torch.equal(twin(input_ids=ids).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", AUXILIARY)
def test_auxiliary_outputs_are_preserved(family):
    model, ids = tiny_model(family), tokens()
    settings = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    expected = model(**settings)
    penstock.hf.patch(model)
    output = model(**settings)
    assert relative_error(output.aux_loss, expected.aux_loss) <= 1e-5
    assert len(output.router_logits) == len(expected.router_logits) == 2
    for ours, theirs in zip(output.router_logits, expected.router_logits, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_ids_past_the_experts_are_skipped(family):
    """transformers marks slots of experts that live elsewhere with id E."""
    (experts, *_) = experts_of(tiny_model(family))
    num_experts, hidden = experts.down_proj.shape[:2]
    x = torch.randn(5, hidden, requires_grad=True)
    ids = torch.tensor([[0, num_experts], [num_experts, num_experts], [3, 1], [7, 2], [8, 4]])
    scores = torch.rand(5, 2, requires_grad=True)
    here = ids < num_experts  # their own code, with a score of 0 where there is nothing to do
    expected = experts(x, ids.where(here, 0), scores.where(here, 0))
    wanted = torch.autograd.grad(expected.square().sum(), (x, scores))
    penstock.hf.patch(experts)
    output = experts(x, ids, scores)
    grads = torch.autograd.grad(output.square().sum(), (x, scores))
    for ours, theirs in zip((output, *grads), (expected, *wanted), strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    assert not output[1].any() and not grads[1][ids >= num_experts].any()


def test_registry_gives_the_bits_of_patch(tmp_path):
    model, ids = tiny_model("qwen2_moe"), tokens()
    model.save_pretrained(tmp_path)
    penstock.hf.register()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="penstock", attn_implementation="eager"
    )
    by_name = loaded(input_ids=ids).logits
    penstock.hf.patch(model)
    assert torch.equal(by_name, model(input_ids=ids).logits)
    assert loaded.config._experts_implementation == "penstock"


def test_registry_refuses_what_it_cannot_compute():
    experts = FusedExperts(act_fn=torch.tanh)
    ids, scores = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(penstock.UnsupportedError, match="activation is none of the engine's"):
        penstock.hf._registry.experts_forward(experts, torch.randn(3, 10), ids, scores)


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (FusedExperts(act_fn=torch.tanh), "activation"),
        (FusedExperts(act_fn=lambda x: nn.functional.silu(1.1 * x)), "activation"),
        (FusedExperts(act_fn=lambda x: nn.functional.silu(x).clamp(max=7.0)), "activation"),
        (FusedExperts(has_post_expert_norm=True), "normalises"),
        (FusedExperts(has_bias=True), "no parameter gate_up_proj_bias"),
        (FusedExperts(has_gate=False), "no parameter up_proj"),
    ],
)
def test_refusals_give_the_reason_and_leave_the_module(experts, reason):
    model = nn.ModuleDict({"good": FusedExperts(), "bad": experts})
    report = penstock.hf.patch(model)
    assert [row.name for row in report.replaced] == ["good"]
    (row,) = report.refused
    assert row.name == "bad" and reason in row.detail
    assert "forward" not in vars(experts)


def test_other_layouts_are_refused():
    fp8 = FusedExperts()
    fp8.down_proj = nn.Parameter(fp8.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    bare = FusedExperts()
    del bare.is_transposed
    model = nn.ModuleDict(
        {"fp8": fp8, "bare": bare, "experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}
    )
    reasons = {row.name: row.detail for row in penstock.hf.patch(model).refused}
    assert "quantised (float8_e4m3fn)" in reasons["fp8"]
    assert "interface of transformers 5" in reasons["bare"]
    assert "list of modules" in reasons["experts"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.functional.silu, "swiglu"),
        (nn.GELU(), "geglu"),
        (nn.ReLU(), "reglu"),
        (lambda x: nn.functional.silu(x.float()).to(x.dtype), "swiglu"),
    ],
)
def test_gates_are_recognised_by_what_they_compute(function, name):
    layout = _structure.read_layout(FusedExperts(act_fn=function))
    assert (layout.gate.activation, layout.gate.gate_layout) == (name, "concatenated")


def test_a_dense_model_is_an_error():
    with pytest.raises(ValueError, match="without experts"):
        penstock.hf.patch(nn.Linear(4, 4))
