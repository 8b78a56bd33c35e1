# SPDX-License-Identifier: Apache-2.0
"""Training a patched model: checkpointing, compilation, autocast, sharding, frozen weights."""

import pytest
import torch
import torch.distributed as dist
from families import relative_error, tiny_model, tokens
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
from penstock.hf import _structure

NUM_STEPS = 3
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def patched(family="qwen3_moe", seed=0):
    model = tiny_model(family, seed)
    penstock.hf.patch(model)
    return model.train()


def grads(model, ids):
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def experts_of(model):
    return [module for _, module in _structure.find_experts(model)]


class Calls(TorchDispatchMode):
    """The engine's operators as they are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "penstock":
            self.calls.append((function._schema.name.removeprefix("penstock::"), args))
        return function(*args, **(kwargs or {}))

    def of(self, name):
        return [args for called, args in self.calls if called == name]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # new name
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_gives_the_same_bits(family):
    model, ids = patched(family), tokens()
    expected = grads(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Calls() as record:
        got = grads(model, ids)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert len(record.of("experts")) == 4  # two layers, each computed again for backward


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["patch", "registry"])
def test_compiled_without_a_graph_break(how):
    ids = tokens()
    eager = patched("mixtral")
    expected = grads(eager, ids)
    model = tiny_model("mixtral").train()
    if how == "patch":
        penstock.hf.patch(model)
    else:
        penstock.hf.register()
        model.set_experts_implementation("penstock")
        if TORCH < (2, 15):  # it cannot look at a module while it traces: see docs/hf.md
            model(input_ids=ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    assert max(relative_error(got[name], expected[name]) for name in expected) <= 1e-5


def test_autocast_computes_in_its_dtype():
    model, ids = tiny_model("mixtral"), tokens()
    exact = model(input_ids=ids).logits
    (experts, *_) = experts_of(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = relative_error(model(input_ids=ids).logits, exact)
        penstock.hf.patch(model)
        ours = relative_error(model(input_ids=ids).logits, exact)
        x = torch.randn(3, experts.down_proj.shape[1])
        with Calls() as record:
            y = experts(x, torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
    assert ours <= 1.1 * theirs
    assert y.dtype == x.dtype == torch.float32
    (arguments,) = record.of("experts")
    assert arguments[0].dtype == arguments[2].dtype == torch.bfloat16
    loss = grads(model, ids)
    assert all(grad.dtype == torch.float32 for grad in loss.values())


def test_frozen_experts_get_no_gradient_work():
    model, ids = patched(), tokens()
    for experts in experts_of(model):
        experts.gate_up_proj.requires_grad_(False)
        experts.down_proj.requires_grad_(False)
    with Calls() as record:
        got = grads(model, ids)
    assert not any("experts." in name for name in got)
    # The last pass over a graph, which may write over what was kept.
    wanted = [arguments[17] for arguments in record.of("experts_backward_over_h")]
    assert wanted == [[True, True] + 6 * [False]] * 2  # x and the scores, no weight


def test_single_experts_are_frozen_by_name_or_pattern():
    ids = tokens()
    expected = grads(patched(), ids)
    model = tiny_model("qwen3_moe").train()
    names = {"*": [0], "model.layers.1.mlp.experts": [3, 5]}
    report = penstock.hf.patch(model, frozen=names)
    assert [row.detail[-8:] for row in report.rows] == ["1 frozen", "3 frozen"]
    assert model.state_dict().keys() == tiny_model("qwen3_moe").state_dict().keys()
    got = grads(model, ids)
    for layer, frozen in enumerate(([0], [0, 3, 5])):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        trained = [expert for expert in range(8) if expert not in frozen]
        assert not got[name][frozen].any()
        assert torch.equal(got[name][trained], expected[name][trained])
    penstock.hf.patch(model)  # the latest call's hold
    assert all(torch.equal(grad, expected[name]) for name, grad in grads(model, ids).items())


def test_frozen_slices_of_a_main_grad_keep_their_bits():
    model = tiny_model("qwen3_moe")
    penstock.hf.patch(model, frozen={"*": [2]})
    for experts in experts_of(model):
        for parameter in experts.parameters():
            parameter.main_grad = torch.full_like(parameter, 7.0)
    grads(model, tokens())
    for experts in experts_of(model):
        assert all((p.main_grad[2] == 7).all() for p in experts.parameters())
        assert not any((p.main_grad == 7).all() for p in experts.parameters())


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"*.expert": [0]}, "matches no experts module.*such as 'model.layers.0.mlp.experts'"),
        ({"*": [0, 8]}, r"frozen\['\*'\]: got 8, expected ids in \[0, 8\)"),
        ({"*": [-1]}, r"got -1, expected ids"),
    ],
)
def test_frozen_experts_that_are_not_there_are_an_error(frozen, message):
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match=message):
        penstock.hf.patch(model, frozen=frozen)
    assert penstock.hf.unpatch(model) == 0


def test_main_grads_accumulate_in_fp32():
    """Micro-batches add up in the parameters' fp32 main_grad; autograd keeps nothing for them."""
    model = patched().bfloat16()
    fused = [p for experts in experts_of(model) for p in experts.parameters()]
    batches = [tokens(seed) for seed in range(3)]
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in fused]
    for ids in batches:
        grads(model, ids)
        for total, parameter in zip(expected, fused, strict=True):
            total += parameter.grad.float()
    for parameter in fused:
        parameter.grad, parameter.main_grad = None, torch.zeros_like(parameter, dtype=torch.float32)
    for ids in batches:
        grads(model, ids)
    assert all(parameter.grad is None for parameter in fused)
    for total, parameter in zip(expected, fused, strict=True):
        assert relative_error(parameter.main_grad, total) < 3e-3  # .grad was rounded to bf16


def test_experts_keep_less_than_half_of_what_grouped_mm_keeps():
    x = torch.randn(64, 48, requires_grad=True)
    ids = torch.rand(64, 8).topk(2).indices
    scores = torch.rand(64, 2, requires_grad=True)
    kept = []
    for ours in (False, True):
        model = tiny_model("olmoe")
        model.config._experts_implementation = "grouped_mm"
        (experts, *_) = experts_of(model)
        if ours:
            penstock.hf.patch(experts)
        with penstock.testing.kept_bytes(x, *experts.parameters()) as measured:
            experts(x, ids, scores)
        kept.append(measured.total)
    assert kept[1] <= 0.5 * kept[0]


def losses_of(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def sharded_losses(rank, folder):
    """One of two processes: half of each batch, parameters sharded over both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = patched()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = experts_of(model)[0].down_proj.to_local()
    assert sharded.shape[0] == 4  # of 8 experts
    halves = [tokens(step)[rank : rank + 1] for step in range(NUM_STEPS)]
    losses = torch.stack(losses_of(model, halves))
    dist.all_reduce(losses)
    if rank == 0:
        torch.save(losses / 2, folder / "losses")


def test_fully_sharded_on_two_ranks_gives_the_losses_of_one_process(tmp_path):
    on_ranks(sharded_losses, 2, tmp_path)
    expected = losses_of(patched(), [tokens(step) for step in range(NUM_STEPS)])
    sharded = torch.load(tmp_path / "losses")
    torch.testing.assert_close(sharded, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert expected[-1] != expected[0]
