# SPDX-License-Identifier: Apache-2.0
"""Lists of experts, one module each: converted where it is asked for, refused with the reason."""

import copy

import pytest
import torch
from families import relative_error
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import penstock
from penstock.hf import CONVERTERS

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 10, 6, 8, 2


class Mlp(nn.Module):
    """An expert of its own, as models had them before transformers 5."""

    def __init__(self, act_fn=nn.functional.silu, bias=False):
        super().__init__()
        self.w2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)  # down before gate and up: by trying,
        self.w3 = nn.Linear(HIDDEN, INTERMEDIATE, bias=bias)  # not by the order of declaration
        self.w1 = nn.Linear(HIDDEN, INTERMEDIATE, bias=bias)
        self.act_fn = act_fn

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Plain(nn.Module):
    """Without a gate."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.fc2(self.dropout(nn.functional.gelu(self.fc1(x))))


class OldBlock(nn.Module):
    """A router and a loop over a list of experts."""

    def __init__(self, make_expert=Mlp):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(EXPERTS))

    def route(self, x):
        logits = self.gate(x)
        weights, ids = logits.softmax(-1).topk(TOP_K)
        return weights, ids, logits

    def forward(self, x):
        weights, ids, logits = self.route(x)
        output = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens, places = (ids == index).nonzero(as_tuple=True)
            rows = expert(x[tokens]) * weights[tokens, places, None]
            output = output.index_add(0, tokens, rows)
        return output, logits


def old_block(block, experts, x):
    """The converter that a user writes."""
    weights, ids, logits = block.route(x)
    return experts(x, ids, weights), logits


CONVERT = {"OldBlock": old_block}


def block_and_input(make_expert=Mlp, tokens=40):
    torch.manual_seed(0)
    return OldBlock(make_expert), torch.randn(tokens, HIDDEN, requires_grad=True)


def step(block, x):
    """Output and gradients, by name."""
    block.zero_grad()
    output, logits = block(x)
    (output.square().sum() + logits.sum()).backward()
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    grad, x.grad = x.grad, None
    return {"output": output.detach(), "x": grad, **grads}


def agree(got, expected, bound=1e-5):
    assert got.keys() == expected.keys()
    return max(relative_error(got[name], expected[name]) for name in expected) <= bound


@pytest.mark.parametrize(
    ("make_expert", "layout"),
    [
        (Mlp, "swiglu, concatenated, output_major, from a list"),
        (
            lambda: Mlp(nn.functional.relu, True),
            "reglu, concatenated, output_major, bias, from a list",
        ),
        (Plain, "gelu, output_major, bias, from a list"),
    ],
)
def test_a_converted_block_computes_the_same(make_expert, layout):
    block, x = block_and_input(make_expert)
    expected = step(block, x)
    (row,) = penstock.hf.patch(nn.ModuleDict({"mlp": block}), convert=CONVERT).rows
    assert (row.name, row.kind, row.experts, row.detail) == ("mlp", "OldBlock", EXPERTS, layout)
    assert agree(step(block, x), expected)


def test_the_report_says_what_moved_and_parameters_stay_the_same_objects():
    block, x = block_and_input()
    values = {name: value.clone() for name, value in block.state_dict().items()}
    parameters = dict(block.named_parameters())
    report = penstock.hf.patch(nn.ModuleDict({"mlp": block}), convert=CONVERT)
    moved = sum(p.nbytes for p in block.experts.parameters())
    assert report.rows[0].moved == moved and "MiB of weights moved" in repr(report)
    assert all(p is parameters[name] for name, p in block.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in block.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in block.experts.parameters()}
    assert len(storages) == 2  # w1 and w2
    assert penstock.hf.patch(block).rows[0].moved == 0  # converted already
    step(block, x)


def test_nothing_is_drawn_from_the_callers_random_numbers():
    block, _ = block_and_input()
    before = torch.get_rng_state()
    penstock.hf.patch(block, convert=CONVERT)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_are_parts_of_one_tensor():
    block, x = block_and_input()
    penstock.hf.patch(block, convert=CONVERT)
    step(block, x)
    gradients = {e.w1.weight.grad.untyped_storage().data_ptr() for e in block.experts}
    assert len(gradients) == 1


def test_training_goes_on_as_without_conversion_and_unpatch_restores():
    block, x = block_and_input()
    twin = copy.deepcopy(block)
    penstock.hf.patch(block, convert=CONVERT)
    for model in (block, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, x)
            optimizer.step()
    assert agree(dict(block.named_parameters()), dict(twin.named_parameters()))
    assert penstock.hf.unpatch(block) == 1
    twin.load_state_dict(block.state_dict())
    assert torch.equal(block(x)[0], twin(x)[0])


def test_a_single_expert_is_frozen_by_its_own_parameters():
    block, x = block_and_input()
    expected = step(block, x)
    penstock.hf.patch(block, convert=CONVERT)
    block.experts[3].requires_grad_(False)
    frozen = {f"experts.3.{name}.weight" for name in ("w1", "w2", "w3")}
    for parameter in block.experts[3].parameters():
        parameter.grad = None
    got = step(block, x)
    assert agree(got, {name: value for name, value in expected.items() if name not in frozen})


def test_an_optimizer_step_before_backward_is_noticed():
    block, x = block_and_input()
    penstock.hf.patch(block, convert=CONVERT)
    output, _ = block(x)
    with torch.no_grad():
        block.experts[0].w1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda block: block.bfloat16(),
        lambda block: setattr(block.experts[1].w1, "weight", nn.Parameter(torch.ones(6, 10))),
    ],
)
def test_weights_that_lie_elsewhere_are_an_error_until_patched_again(change):
    block, x = block_and_input()
    penstock.hf.patch(block, convert=CONVERT)
    block = change(block) or block
    x = x.detach().to(block.gate.weight.dtype).requires_grad_()
    with pytest.raises(ValueError, match=r"weights of converted experts.*Call patch"):
        block(x)
    assert penstock.hf.patch(block, convert=CONVERT).rows[0].moved > 0
    block(x)


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break():
    block, x = block_and_input()
    penstock.hf.patch(block, convert=CONVERT)
    expected = step(block, x)
    torch._dynamo.reset()
    got = step(torch.compile(block, fullgraph=True, backend="aot_eager"), x)
    assert agree({name.removeprefix("_orig_mod."): value for name, value in got.items()}, expected)


def changed(change):
    """Experts of which the last one was changed."""

    def make():
        block = OldBlock()
        change(block.experts[-1], block)
        return block

    return make


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda expert, _: expert.bfloat16(), "differ in class, shapes, dtypes"),
        (lambda expert, _: setattr(expert, "w1", nn.Identity()), "differ"),
        (lambda expert, block: setattr(expert, "w1", block.experts[0].w1), "share parameters"),
        (lambda _, block: setattr(block, "experts", nn.ModuleList()), "no list of experts"),
        (lambda _, block: setattr(block, "experts", nn.Linear(2, 2)), "no list of experts"),
    ],
)
def test_lists_that_are_no_list_are_refused(change, reason):
    block = changed(change)()
    (row,) = penstock.hf.patch(nn.ModuleDict({"mlp": block}), convert=CONVERT).rows
    assert not row.replaced and reason in row.detail and "forward" not in vars(block)


class Normed(Mlp):
    """A norm of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)


class Dropping(Plain):
    """With dropout between the Linears."""

    def __init__(self):
        super().__init__()
        self.dropout.p = 0.1


@pytest.mark.parametrize(
    ("make_expert", "reason"),
    [
        (lambda: Mlp(torch.tanh), "none of the engine's activations"),
        (Normed, "parameters besides those of plain Linears"),
        (Dropping, "drop out activations"),
    ],
)
def test_experts_that_the_engine_has_not_are_refused(make_expert, reason):
    block, _ = block_and_input(make_expert)
    (row,) = penstock.hf.patch(nn.ModuleDict({"mlp": block}), convert=CONVERT).rows
    assert not row.replaced and reason in row.detail and "forward" not in vars(block)


def test_a_list_is_left_alone_where_nobody_asks():
    block, _ = block_and_input()
    (row,) = penstock.hf.patch(nn.ModuleDict({"mlp": block})).refused
    assert row.name == "mlp.experts" and "convert" in row.detail


def switch_model():
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=97, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=8, expert_capacity=6,
        dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).eval()


def test_switch_transformers_with_tokens_past_the_capacity(tmp_path):
    model = switch_model()
    ids = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(0))

    def run():
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": output.logits.detach(), **grads}

    expected = run()
    report = penstock.hf.patch(model, convert=CONVERTERS)
    assert len(report.replaced) == 2 and not report.refused
    assert "relu, output_major, from a list" in report.rows[0].detail
    got = run()
    idle = {name for name in got.keys() - expected.keys() if not got[name].any()}
    assert agree({name: got[name] for name in got.keys() - idle}, expected)
    model.save_pretrained(tmp_path)
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    loaded, saved = again.state_dict(), model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
