# SPDX-License-Identifier: Apache-2.0
"""torch.compile on the GPU (fullgraph, and mode="reduce-overhead", which makes CUDA graphs), and
the operators in torch.library.opcheck's eyes.
"""

from __future__ import annotations

import pytest
import torch
from gpu_layer import make_inputs

import penstock
from penstock import _torch_ops as ops
from penstock import functional
from penstock._context import CallContext
from penstock._engine import Config

SHAPE = (24, 16, 8, 4, 2)
CONTEXT = CallContext().pack()

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles and checks


def make_module(**keywords):
    torch.manual_seed(0)
    return penstock.MoE(64, 48, 8, 2, bias=True, device="cuda", dtype=torch.bfloat16, **keywords)


def gradients(layer, run, x):
    """Output and gradients of a step with the layer's losses."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = run(x)
    (y.float().square().mean() + layer.stats.aux_loss + layer.stats.z_loss).backward()
    return [y.detach().clone(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_without_graph_breaks(mode) -> None:
    layer = make_module()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for seed in range(6):  # reduce-overhead records at the second call and replays from the third
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(3, 30, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        want = gradients(layer, layer, x)
        torch.compiler.cudagraph_mark_step_begin()
        got = gradients(layer, compiled, x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
        assert torch.equal(got[0], want[0]), "the experts' output has other bits when compiled"


def test_compile_with_changing_numbers_of_tokens() -> None:
    layer = make_module()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (17, 40, 130):
        x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


def experts_arguments(save: str):
    """Arguments of the operator `experts`, and whether each of the first eight is there."""
    inputs = make_inputs(SHAPE, "bfloat16", bias=True)
    with torch.no_grad():
        logits = functional.router_logits(inputs["x"], inputs["router_weight"])
        routing = functional.route(logits, SHAPE[4])
        plan = functional.plan(routing, SHAPE[3])
    config = Config(save=save)
    return (
        inputs["x"], routing.scores.requires_grad_(), inputs["w1"], None, inputs["w2"],
        inputs["b1"], None, inputs["b2"], None, *plan, config.pack(), config.clamp, CONTEXT,
    )  # fmt: skip


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_opcheck_experts(save) -> None:
    arguments = experts_arguments(save)
    torch.library.opcheck(ops.experts, arguments)
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    *tensors, top_k, config, clamp, context = plain
    output, h = ops.experts(*plain)
    kept = h if save == "preactivation" else None
    wanted = [tensor is not None for tensor in tensors[:8]]
    torch.library.opcheck(
        ops.experts_backward,
        (torch.ones_like(output), *tensors, kept, wanted, top_k, config, clamp, context),
    )


def test_opcheck_router_and_plan() -> None:
    inputs = make_inputs(SHAPE, "bfloat16")
    torch.library.opcheck(ops.router_logits, (inputs["x"], inputs["router_weight"], CONTEXT))
    logits = torch.randn(SHAPE[0], SHAPE[3], device="cuda")
    ids = functional.route(logits, SHAPE[4]).ids
    torch.library.opcheck(ops.plan, (ids, None, SHAPE[0], SHAPE[3], CONTEXT))
