# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in the grouped products, against experts with merged weights."""

import plain
import pytest
import torch
from adapted import SHAPE, frozen, leaves, make_adapters, merged, routed, run

import penstock
from penstock import functional, lora

RANKS = [(1, 1), (16, 16), (0, 5), (7, 0), (256, 3), (40, 33)]  # beyond d and n too


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "relu_squared"])
@pytest.mark.parametrize("ranks", RANKS)
def test_results_and_gradients_are_those_of_merged_weights(ranks, activation, save):
    weights = frozen(plain.make_weights(SHAPE, activation))
    adapters = make_adapters(ranks, activation)
    x, (scores, ids) = plain.make_x(SHAPE), routed()
    output = run(x, weights, scores, ids, adapters, activation=activation, save=save)
    expected = plain.experts(x, merged(weights, adapters), scores, ids, activation=activation)
    inputs = leaves([x, scores], adapters)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    got = torch.autograd.grad(output.square().sum(), inputs)
    for ours, theirs in zip((output, *got), (expected, *wanted), strict=True):
        assert plain.relative_l2(ours, theirs) <= 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [(16, 16), (1, 0), (256, 256)])
def test_narrow_dtypes_keep_the_contract(dtype, ranks, tolerances, cpu_backend):
    storage = getattr(torch, dtype)
    weights = frozen(plain.make_weights(SHAPE, dtype=storage))
    adapters = make_adapters(ranks, dtype=storage)
    x, (scores, ids) = plain.make_x(SHAPE, dtype=storage), routed(dtype=torch.float32)
    wide = {name: weight.double() for name, weight in weights.items()}
    expected = plain.experts(x.double(), merged(wide, adapters), scores.double(), ids)
    inputs = leaves([x, scores], adapters)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    with penstock.backend(cpu_backend):
        output = run(x, weights, scores, ids, adapters)
        got = torch.autograd.grad(output.sum(), inputs)
    assert plain.relative_l2(output, expected) <= tolerances["end_to_end"][dtype]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        # A gradient passes through one more rounded product than the whole layer's output.
        assert plain.relative_l2(ours, theirs) <= 2 * tolerances["end_to_end"][dtype]


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("order", ["output_major", "input_major"])
def test_layouts_and_orders(layout, order, cpu_backend):
    weights = frozen(plain.make_weights(SHAPE, dtype=torch.float32))
    adapters = make_adapters((5, 4), dtype=torch.float32)
    x, (scores, ids) = plain.make_x(SHAPE, dtype=torch.float32), routed(dtype=torch.float32)
    expected = plain.experts(x, merged(weights, adapters), scores, ids, layout=layout)
    wanted = torch.autograd.grad(expected.sum(), leaves([x], adapters))
    if order == "input_major":
        weights["w1"] = weights["w1"].transpose(1, 2).contiguous()
        weights["w2"] = weights["w2"].transpose(1, 2).contiguous()
    with penstock.backend(cpu_backend):
        output = run(x, weights, scores, ids, adapters, gate_layout=layout, weight_order=order)
        got = torch.autograd.grad(output.sum(), leaves([x], adapters))
    for ours, theirs in zip((output, *got), (expected, *wanted), strict=True):
        assert plain.relative_l2(ours, theirs) <= 5e-6


def test_adapters_on_some_experts():
    weights = frozen(plain.make_weights(SHAPE))
    chosen = torch.tensor([4, 1])
    some = lora.Adapters(*(f.detach()[:2].requires_grad_() for f in make_adapters((3, 2))))
    x, (scores, ids) = plain.make_x(SHAPE), routed()
    everywhere = lora.on_experts(some, chosen, SHAPE[3])
    output = run(x, weights, scores, ids, everywhere)
    expected = {name: weight.clone() for name, weight in weights.items()}
    with torch.no_grad():
        for place, expert in enumerate(chosen.tolist()):
            expected["w1"][expert] += some.up_b[place] @ some.up_a[place]
            expected["w2"][expert] += some.down_b[place] @ some.down_a[place]
    assert plain.relative_l2(output, plain.experts(x, expected, scores, ids)) <= 1e-12
    output.sum().backward()
    assert all(factor.grad.shape[0] == 2 and factor.grad.any() for factor in some)


@pytest.mark.parametrize("order", ["output_major", "input_major"])
def test_merge_and_unmerge(order):
    weights = frozen(plain.make_weights(SHAPE))
    adapters = make_adapters((4, 3))
    w1, w2 = (weights[name].clone() for name in ("w1", "w2"))
    if order == "input_major":
        w1, w2 = (w.transpose(1, 2).contiguous() for w in (w1, w2))
    before = w1.clone(), w2.clone()
    x, (scores, ids) = plain.make_x(SHAPE), routed()
    settings = {"b1": weights["b1"], "b2": weights["b2"], "weight_order": order}
    adapted = lora.adapted_experts(x, w1, w2, scores, ids, adapters=adapters, **settings)
    lora.merge_(w1, w2, adapters, weight_order=order)
    plainly = functional.moe_experts(x, w1, w2, scores, ids, **settings)
    assert plain.relative_l2(adapted, plainly) <= 1e-12
    lora.unmerge_(w1, w2, adapters, weight_order=order)
    assert plain.relative_l2(w1, before[0]) <= 1e-14
    assert plain.relative_l2(w2, before[1]) <= 1e-14


def test_the_same_bits_whatever_the_threads_policy_and_run(cpu_backend):
    shape = (200, 64, 48, 6, 2)
    weights = frozen(plain.make_weights(shape, dtype=torch.bfloat16))
    adapters = make_adapters((16, 8), dtype=torch.bfloat16, shape=shape)
    x = plain.make_x(shape, dtype=torch.bfloat16)
    scores, ids = routed(shape, torch.float32)
    results = []
    for threads, save in ((1, "preactivation"), (2, "preactivation"), (3, "input")):
        with penstock.backend(cpu_backend, threads=threads):
            output = run(x, weights, scores, ids, adapters, save=save)
            inputs = leaves([x, scores], adapters)
            results.append((output, *torch.autograd.grad(output.sum(), inputs)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_weight_is_copied_and_only_thin_rows_are_kept():
    shape = (16, 128, 96, 8, 2)
    weights = frozen(plain.make_weights(shape, dtype=torch.float32, bias=False))
    adapters = make_adapters((4, 4), dtype=torch.float32, shape=shape)
    x = plain.make_x(shape, dtype=torch.float32)
    scores, ids = routed(shape, torch.float32)
    with penstock.testing.watch_workspaces() as plainly:
        output = functional.moe_experts(x, weights["w1"], weights["w2"], scores, ids)
        output.sum().backward(retain_graph=True)  # preserves H, as adapted passes do
    with (
        penstock.testing.kept_bytes(x, *weights.values(), *adapters) as kept,
        penstock.testing.watch_workspaces() as adapted,
    ):
        run(x, weights, scores, ids, adapters).sum().backward()
    thin_rows = ids.numel() * (4 + 4) * 4  # U1 and U2
    plain_bytes = functional.saved_bytes(shape, dtype="float32", router=None)
    assert kept.total == plain_bytes + thin_rows
    gradient_rows = ids.numel() * (4 + 2 * 4) * 4  # V1, V2 and S U2, aligned to 64 bytes
    assert adapted.peak_bytes <= plainly.peak_bytes + gradient_rows + 3 * 64


def case(**changes):
    weights = frozen(plain.make_weights(SHAPE))
    adapters = make_adapters((3, 2))._replace(**changes)
    return plain.make_x(SHAPE), weights, *routed(), adapters


def test_mistakes_are_named():
    x, weights, scores, ids, adapters = case()
    weights["w2"].requires_grad_()
    with pytest.raises(ValueError, match="gradient of w2"):
        run(x, weights, scores, ids, adapters)
    with pytest.raises(ValueError, match="both or neither"):
        run(*case(up_b=None))
    with pytest.raises(ValueError, match=r"adapters.up_a: got torch.float32"):
        run(*case(up_a=torch.zeros(6, 3, 24)))
    with pytest.raises(ValueError, match=r"adapters.up_b"):
        run(*case(up_b=torch.zeros(6, 40, 4, dtype=torch.float64)))
    with pytest.raises(ValueError, match="an adapter on one projection"):
        run(x, frozen(weights), scores, ids, lora.Adapters())


def test_second_order_is_a_clear_error():
    x, weights, scores, ids, adapters = case()
    output = run(x, weights, scores, ids, adapters)
    (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        dx.sum().backward()


def test_no_tokens():
    shape = (0, *SHAPE[1:])
    weights, adapters = frozen(plain.make_weights(SHAPE)), make_adapters((3, 2))
    x = plain.make_x(shape)
    scores, ids = torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.long)
    output = run(x, weights, scores, ids, adapters)
    output.sum().backward()
    assert output.shape == (0, SHAPE[1]) and not adapters.up_a.grad.any()
