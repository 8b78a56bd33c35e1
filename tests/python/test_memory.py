# SPDX-License-Identifier: Apache-2.0
"""What is kept for backward and what a call borrows, measured against the formulas."""

from concurrent.futures import ThreadPoolExecutor

import plain
import pytest
import torch

import penstock
from penstock import functional

SHAPES = [(12, 16, 8, 4, 2), (33, 24, 20, 6, 3), (1, 8, 8, 5, 1), (64, 8, 4, 3, 3)]
DTYPES = ["float32", "bfloat16", "float64"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("router", plain.ROUTERS)
def test_kept_bytes_of_a_layer(shape, dtype, save, router):
    T, d, n, E, K = shape
    layer = penstock.MoE(d, n, E, K, dtype=getattr(torch, dtype), save=save, router=router)
    x = torch.randn(T, d, dtype=getattr(torch, dtype), requires_grad=True)
    with penstock.testing.kept_bytes(x, *layer.parameters()) as kept:
        layer(x)
    formula = functional.saved_bytes(shape, dtype=dtype, save=save, router=router)
    assert kept.total == formula
    element = {"float32": 4, "bfloat16": 2, "float64": 8}[dtype]
    wide = 8 if dtype == "float64" else 4
    slots = T * K
    by_hand = slots * (wide + 4) + 3 * 4 * slots + 4 * E + 4 * (E + 1)
    by_hand += 2 * n * slots * element if save == "preactivation" else 0
    by_hand += T * E * wide if router != "softmax_topk" else 0
    assert formula == by_hand


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_kept_bytes_of_the_experts_alone(save):
    shape = SHAPES[1]
    weights, x = plain.make_weights(shape), plain.make_x(shape)
    scores, ids = functional.route(plain.make_logits(shape).detach(), shape[4]).topk()
    with penstock.testing.kept_bytes(x, *weights.values()) as kept:
        functional.moe_experts(x, weights["w1"], weights["w2"], scores, ids, save=save)
    assert kept.total == functional.saved_bytes(shape, dtype="float64", save=save, router=None)


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workspace_is_what_the_query_says(save, dtype, cpu_backend):
    shape = SHAPES[1]
    torch_dtype = getattr(torch, dtype)
    weights, x = (
        plain.make_weights(shape, dtype=torch_dtype),
        plain.make_x(shape, dtype=torch_dtype),
    )
    routing = functional.route(plain.make_logits(shape, dtype=torch.float32), shape[4])
    plan = functional.plan(routing, shape[3])
    with penstock.backend(cpu_backend, threads=2):
        query = lambda which: functional.workspace_bytes(shape, which, dtype=dtype, save=save)  # noqa: E731
        with penstock.testing.watch_workspaces() as log:
            output = functional.moe_experts(
                x, weights["w1"], weights["w2"], routing, plan=plan, save=save
            )
        assert log.sizes == [query("forward")]
        with penstock.testing.watch_workspaces() as log:
            torch.autograd.grad(output, [x, *list(weights.values())[:2]], torch.ones_like(output))
        assert log.sizes == [query("backward")]


def test_watchers_nest_and_see_only_their_block():
    layer, x = penstock.MoE(8, 4, 3, 1), torch.randn(5, 8)
    with penstock.testing.watch_workspaces() as outer:
        layer(x)
        before = len(outer.sizes)
        with penstock.testing.watch_workspaces() as inner:
            layer(x)
    layer(x)
    assert len(inner.sizes) == before and len(outer.sizes) == 2 * before
    assert outer.peak_bytes == max(outer.sizes)


def test_watchers_see_other_threads():
    """As they must: autograd runs the backward passes of a GPU's tensors in its own thread."""
    layer, x = penstock.MoE(8, 4, 3, 1), torch.randn(5, 8)
    with penstock.testing.watch_workspaces() as here:
        layer(x)
    with ThreadPoolExecutor(1) as pool, penstock.testing.watch_workspaces() as log:
        pool.submit(layer, x).result()
    assert log.sizes == here.sizes != []


def test_a_watcher_that_ends_before_a_younger_one_leaves_it_watching():
    layer, x = penstock.MoE(8, 4, 3, 1), torch.randn(5, 8)
    older, younger = penstock.testing.watch_workspaces(), penstock.testing.watch_workspaces()
    older_log, younger_log = older.__enter__(), younger.__enter__()
    older.__exit__(None, None, None)
    layer(x)
    younger.__exit__(None, None, None)
    assert not older_log.sizes and younger_log.sizes


def test_torch_sees_the_workspace():
    """An independent witness: the largest allocation that torch's profiler records in a forward
    pass without gradients is the workspace, or the output where that is larger.
    """
    shape = (256, 32, 64, 4, 2)
    weights = plain.make_weights(shape, dtype=torch.float32, bias=False)
    x = plain.make_x(shape, dtype=torch.float32)
    routing = functional.route(plain.make_logits(shape, dtype=torch.float32), shape[4])
    plan = functional.plan(routing, shape[3])
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        functional.moe_experts(x, weights["w1"], weights["w2"], routing, plan=plan)
    sizes = [e.cpu_memory_usage for e in profiler.events() if e.name == "aten::empty"]
    sizes += [e.cpu_memory_usage for e in profiler.events() if e.name == "aten::new_empty"]
    assert functional.workspace_bytes(shape, save="nothing") in sizes
