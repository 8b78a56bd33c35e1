# SPDX-License-Identifier: Apache-2.0
"""penstock.MoE in plain torch operations: unchanged; under autocast, a tape, torch.compile."""

import plain
import pytest
import torch

import penstock
from penstock import functional
from penstock._torch_operations import _COMPILER_READS_CONTEXTS

SIZES = (64, 48, 6, 2)  # d, n, E, K


def make_layer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return penstock.MoE(*SIZES, bias=True, dtype=dtype, **options)


def make_x(dtype=torch.float32, tokens=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, SIZES[0], generator=generator).to(dtype).requires_grad_()


def step(layer, x):
    """The output, gradients of x and all parameters, and the auxiliary losses' graph with them."""
    y = layer(x)
    loss = y.float().square().mean() + 0.01 * layer.stats.total_loss
    return [y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "topk_softmax", "router_options": {"renormalize": True}, "save": "input"},
        {"activation": "swiglu_clamped", "gate_layout": "interleaved"},
        {"shared_intermediate_size": 32, "aux_loss_coef": 1.0, "z_loss_coef": 1.0},
    ],
    ids=str,
)
def test_the_engines_results(options, tolerances):
    layer, x = make_layer(**options), make_x()
    ours, loads = step(layer, x), layer.stats.loads
    with penstock.backend("reference"):
        want = step(layer, x)
    assert torch.equal(loads, layer.stats.loads)
    for one, other in zip(ours, want, strict=True):
        assert plain.relative_l2(one, other) <= 2 * tolerances["end_to_end"]["float32"]


def test_autocast_does_not_reach_inside(tolerances):
    """Logits stay in fp32, products are in the dtype that the module cast to."""
    layer, x = make_layer(), make_x()
    narrow = make_layer(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        logits = functional.router_logits(x, layer.router.weight)
    want = x.double() @ layer.router.weight.double().T
    assert plain.relative_l2(logits, want) <= tolerances["stage"]["float32"]
    narrow.load_state_dict(layer.state_dict())
    same = narrow.experts(x.bfloat16(), layer.stats.routing)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, same)


def test_a_tape_replays():
    layer, x = make_layer(), make_x()
    tape = penstock.RoutingTape()
    with tape.record(layer):
        first = layer(x)
    with tape.replay(layer):
        assert torch.equal(layer(x), first)


needs_contexts = pytest.mark.skipif(
    not _COMPILER_READS_CONTEXTS, reason="this torch's compiler cannot read context variables"
)


@needs_contexts
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_compiled_in_one_graph_and_anew_for_another_choice(save, tolerances):
    layer = make_layer(shared_intermediate_size=16, save=save)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (40, 24, 33):
        x = make_x(tokens=tokens)
        for name in ("torch", ""):
            with penstock.backend(name):
                ours, want = step(compiled, x), step(layer, x)
            for one, other in zip(ours, want, strict=True):
                assert plain.relative_l2(one, other) <= tolerances["end_to_end"]["float32"]


@needs_contexts
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_is_not_compiled_again_for_every_block():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, layer, x = CompileCounter(), make_layer(), make_x()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        for name, threads in (("torch", 0), ("reference", 1), ("reference", 2)):
            with penstock.backend(name, threads=threads):
                compiled(x)
    assert counter.frame_count == 2


@pytest.mark.skipif(_COMPILER_READS_CONTEXTS, reason="this torch compiles it")
@pytest.mark.filterwarnings("ignore")
def test_a_compiler_that_cannot_know_the_choice_ends_in_a_refusal():
    compiled = torch.compile(make_layer(), backend="eager")
    with pytest.raises(penstock.UnsupportedError, match="compile inside the block"):
        compiled(make_x())
