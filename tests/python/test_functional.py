# SPDX-License-Identifier: Apache-2.0
"""functional.* on torch tensors against the layer stated in plain torch."""

import itertools

import penstock
import plain
import pytest
import torch
from penstock import functional

SHAPE = (33, 24, 20, 6, 2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def both(shape, activation="swiglu", *, layout="concatenated", dtype=torch.float64, **keywords):
    """Results and gradients of ours, and of plain torch in float64 from the same rounded inputs."""
    weights = plain.make_weights(shape, activation, dtype=dtype)
    x = plain.make_x(shape, dtype=dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    logits = plain.make_logits(shape, dtype=accumulator)
    scores, ids = (t.detach() for t in functional.route(logits, shape[4]).topk())
    scores.requires_grad_()
    ours = functional.moe_experts(
        x, weights["w1"], weights["w2"], scores, ids, b1=weights["b1"], b2=weights["b2"],
        activation=activation, gate_layout=layout, **keywords,
    )  # fmt: skip
    inputs = [x, scores, *weights.values()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = plain.experts(
        wide[0], dict(zip(weights, wide[2:], strict=True)), wide[1], ids,
        activation=activation, layout=layout,
    )  # fmt: skip
    d_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    got = torch.autograd.grad(ours, inputs, d_output)
    want = torch.autograd.grad(expected, wide, d_output.double())
    return [ours, *got], [expected, *want]


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_float64(activation, layout, save, tolerances):
    for got, want in zip(*both(SHAPE, activation, layout=layout, save=save), strict=True):
        assert plain.relative_l2(got, want) <= tolerances["end_to_end"]["float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_storage_dtypes(dtype, activation, cpu_backend, tolerances):
    with penstock.backend(cpu_backend):
        results = both(SHAPE, activation, dtype=DTYPES[dtype])
    for got, want in zip(*results, strict=True):
        assert plain.relative_l2(got, want) <= tolerances["end_to_end"][dtype]


@pytest.mark.parametrize("router", plain.ROUTERS)
def test_routers(router):
    logits = plain.make_logits(SHAPE)
    ours = functional.route(logits, SHAPE[4], router=router)
    scores, ids = plain.route(logits, SHAPE[4], router)
    assert torch.equal(ours.topk()[1], ids.int())
    torch.testing.assert_close(ours.topk()[0], scores, rtol=1e-13, atol=1e-13)
    d_scores = torch.randn(scores.shape, dtype=scores.dtype)
    got = torch.autograd.grad(ours.topk()[0], logits, d_scores)[0]
    want = torch.autograd.grad(scores, logits, d_scores)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_renormalize_names_the_router():
    logits = plain.make_logits(SHAPE)
    one = functional.route(logits, 2, router="topk_softmax", renormalize=True)
    other = functional.route(logits, 2, router="topk_softmax_normalized")
    assert torch.equal(one.scores, other.scores)
    with pytest.raises(ValueError, match="renormalize"):
        functional.route(logits, 2, renormalize=True)


def test_router_logits(cpu_backend):
    x = plain.make_x(SHAPE, dtype=torch.float32)
    weight = plain.make_logits((6, 0, 0, 24, 0), dtype=torch.float32)
    with penstock.backend(cpu_backend):
        logits = functional.router_logits(x, weight)
        alone = torch.cat([functional.router_logits(row, weight) for row in x.split(1)])
    assert plain.relative_l2(logits, x.double() @ weight.double().T) < 2e-6
    assert torch.equal(logits, alone)


def test_plan_sorts_slots_by_expert():
    ids = torch.tensor([[2, 0], [0, -1], [5, 2], [0, 2]], dtype=torch.int32)
    plan = functional.plan(functional.Routing.from_topk(torch.ones(4, 2), ids), 3)
    assert plan.expert_counts.tolist() == [3, 0, 3]
    assert plan.expert_offsets.tolist() == [0, 3, 3, 6]
    assert plan.row_to_slot[:6].tolist() == [1, 2, 6, 0, 5, 7]
    assert plan.row_to_token[:6].tolist() == [0, 1, 3, 0, 2, 3]
    assert plan.slot_to_row.tolist() == [3, 0, 1, -1, -1, 4, 2, 5]


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_differing_numbers_of_experts_per_token(id_dtype):
    shape = (4, 8, 5, 3, 2)
    weights, x = plain.make_weights(shape), plain.make_x(shape)
    scores = torch.tensor([0.5, 0.25, 1.0, -2.0, 0.125], dtype=torch.float64).requires_grad_()
    offsets = torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)  # token 1 has none
    ids = torch.tensor([0, 2, 1, 7, 2], dtype=id_dtype)
    routing = functional.Routing(scores, ids, 4, token_offsets=offsets)
    ours = functional.moe_experts(x, weights["w1"], weights["w2"], routing, b1=weights["b1"],
                                  b2=weights["b2"])  # fmt: skip
    index = torch.tensor([[0, 1], [0, 0], [2, 3], [4, 4]])
    padded = torch.tensor([[0, 2], [-1, -1], [1, 7], [2, -1]])
    expected = plain.experts(x, weights, scores[index], padded)
    inputs = [x, scores, *weights.values()]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="topk"):
        routing.topk()


def test_small_integers_are_exact(cpu_backend):
    generator = torch.Generator().manual_seed(0)

    def integers(*size, low=-3, high=4):
        return torch.randint(low, high, size, generator=generator).double()

    T, d, n, E, K = 40, 32, 24, 5, 2
    wide = [integers(T, d), integers(E, n, d), integers(E, d, n), integers(T, K, low=1, high=3)]
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]).int()
    narrow = [t.float().requires_grad_() for t in wide]
    wide = [t.requires_grad_() for t in wide]
    with penstock.backend(cpu_backend):
        x, w1, w2, scores = narrow
        ours = functional.moe_experts(x, w1, w2, scores, ids, activation="relu")
        got = torch.autograd.grad(ours.sum(), narrow)
    x, w1, w2, scores = wide
    expected = plain.experts(x, {"w1": w1, "w2": w2}, scores, ids, activation="relu")
    want = torch.autograd.grad(expected.sum(), wide)
    assert torch.equal(ours.double(), expected)
    assert all(torch.equal(a.double(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again_and_with_any_number_of_threads(dtype, cpu_backend):
    runs = []
    for threads, _ in itertools.product((1, 2, 5), range(2)):
        with penstock.backend(cpu_backend, threads=threads):
            runs.append(both((129, 48, 40, 6, 2), dtype=DTYPES[dtype])[0])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_token_does_not_depend_on_the_others(cpu_backend):
    weights = plain.make_weights(SHAPE, dtype=torch.float32)
    x = plain.make_x(SHAPE, dtype=torch.float32)
    routing = functional.route(plain.make_logits(SHAPE, dtype=torch.float32), 2)
    scores, ids = routing.topk()
    with penstock.backend(cpu_backend), torch.no_grad():
        run = lambda rows: functional.moe_experts(  # noqa: E731
            x[rows], weights["w1"], weights["w2"], scores[rows], ids[rows]
        )
        together = run(slice(None))
        assert all(torch.equal(run(slice(t, t + 1))[0], together[t]) for t in range(SHAPE[0]))


@pytest.mark.parametrize("order", ["output_major", "input_major"])
@pytest.mark.parametrize("halves", ["one tensor", "pair"])
def test_weight_seams(order, halves):
    shape = (9, 8, 5, 3, 2)
    weights, x = plain.make_weights(shape), plain.make_x(shape)
    routing = functional.route(plain.make_logits(shape), 2)
    w1, w2, b1, b2 = weights.values()
    reference = functional.moe_experts(x, w1, w2, routing, b1=b1, b2=b2)
    leaves = [t.detach().clone().requires_grad_() for t in (w1, w2, b1)]
    given, down, bias = leaves
    if order == "input_major":
        down = (leaves[1].detach().transpose(1, 2).contiguous()).requires_grad_()
        given = given.detach().transpose(1, 2).contiguous().requires_grad_()
    axis = 1 if order == "output_major" else 2
    if halves == "pair":
        given = tuple(t.detach().contiguous().requires_grad_() for t in given.chunk(2, axis))
        bias = tuple(t.detach().contiguous().requires_grad_() for t in bias.chunk(2, 1))
    ours = functional.moe_experts(x, given, down, routing, b1=bias, b2=b2, weight_order=order)
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)
    pieces = given if halves == "pair" else (given,)
    grads = torch.autograd.grad(ours.square().sum(), [*pieces, down])
    want = torch.autograd.grad(reference.square().sum(), [w1, w2])
    got_w1, got_w2 = torch.cat(grads[:-1], axis), grads[-1]
    if order == "input_major":
        got_w1, got_w2 = got_w1.transpose(1, 2), got_w2.transpose(1, 2)
    torch.testing.assert_close(got_w1, want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_w2, want[1], rtol=1e-12, atol=1e-12)
