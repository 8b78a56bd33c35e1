# SPDX-License-Identifier: Apache-2.0
"""The operators in torch.library's eyes: opcheck, torch.compile, torch.func's limits."""

import shutil

import plain
import pytest
import torch

import penstock
from penstock import _torch_ops as ops
from penstock import _torch_routing as routing_ops
from penstock import functional, routers
from penstock._context import CallContext
from penstock._engine import Config

SHAPE = (6, 8, 5, 4, 2)
CONTEXT = CallContext().pack()


def packed(config):
    return config.pack(), config.clamp


def experts_arguments(*, save="preactivation", bias=True, dtype=torch.float64):
    weights = plain.make_weights(SHAPE, bias=bias, dtype=dtype)
    routing = functional.route(plain.make_logits(SHAPE, idle=(1,)), SHAPE[4])
    scores = routing.scores.detach().to(dtype if dtype == torch.float64 else torch.float32)
    plan = functional.plan(routing, SHAPE[3])
    biases = (weights.get("b1"), None, weights.get("b2"))
    return (
        plain.make_x(SHAPE, dtype=dtype), scores.requires_grad_(), weights["w1"], None,
        weights["w2"], *biases, None, *plan, *packed(Config(save=save)), CONTEXT,
    )  # fmt: skip


def detached(arguments):
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck_router_logits():
    arguments = (plain.make_x(SHAPE), plain.make_logits((4, 0, 0, 8, 0)), CONTEXT)
    torch.library.opcheck(ops.router_logits, arguments)
    x, weight, _ = detached(arguments)
    dlogits = torch.ones(SHAPE[0], SHAPE[3], dtype=x.dtype)
    for wanted in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(ops.router_logits_backward, (dlogits, x, weight, wanted, CONTEXT))


@pytest.mark.parametrize("router", routers.NAMES)
@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck_route(router):
    logits = plain.make_logits(SHAPE)
    options = {"tile": 2} if router == "token_rounding" else {}
    routing = functional.route(logits.detach(), SHAPE[4], router=router, **options)
    spec = routing.router
    settings = (spec.pack(), spec.numbers(), CONTEXT)
    slots = 0 if spec.fixed_top_k() else len(routing.ids)
    torch.library.opcheck(routing_ops.route, (logits, None, None, slots, *settings))
    scores, ids = routing.topk() if spec.fixed_top_k() else (routing.scores, routing.ids)
    torch.library.opcheck(routing_ops.replay, (logits, ids, routing.token_offsets, *settings))
    d_scores = torch.ones_like(scores)
    saved = (logits.detach(), scores, ids, routing.token_offsets)
    torch.library.opcheck(routing_ops.route_backward, (d_scores, *saved, SHAPE[3], *settings))


@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck_plan():
    ids = torch.tensor([0, 3, 2, 3, 1, 0], dtype=torch.int32)
    torch.library.opcheck(ops.plan, (ids, None, 3, 4, CONTEXT))
    offsets = torch.tensor([0, 1, 5, 6], dtype=torch.int32)
    torch.library.opcheck(ops.plan, (ids, offsets, 3, 4, CONTEXT))


@pytest.mark.parametrize("save", ["preactivation", "input", "nothing"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck_experts(save, bias):
    arguments = experts_arguments(save=save, bias=bias)
    if save == "nothing":
        arguments = detached(arguments)
    torch.library.opcheck(ops.experts, arguments)


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_opcheck_experts_backward(save):
    arguments = detached(experts_arguments(save=save))
    *tensors, top_k, config, clamp, context = arguments
    output, h = ops.experts(*arguments)
    kept = h if save == "preactivation" else None
    given = [tensors[i] is not None for i in range(8)]
    for wanted in (given, [False] * 4 + given[4:]):
        torch.library.opcheck(
            ops.experts_backward,
            (torch.ones_like(output), *tensors, kept, wanted, top_k, config, clamp, context),
        )
    if save == "preactivation":
        over = Config(kept_h="overwritten").pack()
        torch.library.opcheck(
            ops.experts_backward_over_h,
            (torch.ones_like(output), *tensors, h, given, top_k, over, clamp, context),
        )


def layer_and_input(**keywords):
    torch.manual_seed(0)
    layer = penstock.MoE(16, 8, 4, 2, **keywords)
    return layer, torch.randn(2, 5, 16)


def gradients(layer, run, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y.square().sum() + layer.stats.aux_loss + layer.stats.z_loss).backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler"),
    ),
]


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compile_without_graph_breaks(compiler, save):
    layer, x = layer_and_input(save=save, bias=True, shared_intermediate_size=4)
    want = gradients(layer, layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for got in (gradients(layer, compiled, x), gradients(layer, compiled, x)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want[0], rtol=1e-5, atol=1e-6)


ROUTER_OPTIONS = {"token_rounding": {"tile": 4}, "sigmoid_topk": {"groups": (2, 1), "scale": 2.0}}


@pytest.mark.parametrize("router", routers.NAMES)
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compile_every_router_without_graph_breaks(router):
    layer, _ = layer_and_input(router=router, router_options=ROUTER_OPTIONS.get(router))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (10, 33):
        x = torch.randn(tokens, 16)
        for a, b in zip(gradients(layer, compiled, x), gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if layer.router.load is not None:  # each of the four calls counted once
        assert layer.router.load.sum() == 2 * (10 + 33) * layer.top_k


@pytest.mark.filterwarnings("ignore")
def test_compile_with_changing_numbers_of_tokens():
    layer, _ = layer_and_input()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 33):
        x = torch.randn(tokens, 16)
        for a, b in zip(gradients(layer, compiled, x), gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_obeys_the_context_in_which_it_runs():
    layer, x = layer_and_input()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    with penstock.backend("no such backend"), pytest.raises(ValueError, match="no such backend"):
        compiled(x)


def test_fake_tensors_need_no_engine():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = penstock.MoE(16, 8, 4, 2)
        y = layer(torch.randn(3, 16))
        assert y.shape == (3, 16)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
@pytest.mark.filterwarnings("ignore")
def test_torch_func_is_a_clear_error(transform):
    layer, x = layer_and_input()
    calls = {
        "vmap": lambda: torch.func.vmap(layer)(x),
        "grad": lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        "jvp": lambda: torch.func.jvp(layer, (x,), (torch.ones_like(x),)),
    }
    with pytest.raises(NotImplementedError, match="torch.func"):
        calls[transform]()


@pytest.mark.filterwarnings("ignore")
def test_forward_mode_is_an_error():
    layer, x = layer_and_input()
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
