# SPDX-License-Identifier: Apache-2.0
"""Each router against its statement: ids exactly, scores and gradients in float64, hostile logits.

The cases are those of tests/cases/routers.json, on every backend that has the dtype.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import router_statements as statements
import torch

import penstock
from penstock import functional, routers

CASES = json.loads(
    (Path(__file__).resolve().parents[1] / "cases" / "routers.json").read_text(encoding="utf-8")
)
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4, "nondet_tol": 0.0}


def label(row):
    options = "-".join(f"{name}={value}" for name, value in row["options"].items())
    return f"{row['router']}-{options}" if options else row["router"]


def options_of(options, num_experts, dtype=torch.float64):
    """The options with a bias of that seed in place of its number."""
    options = dict(options)
    if "bias" in options:
        generator = torch.Generator().manual_seed(options["bias"])
        bias = torch.randn(num_experts, generator=generator, dtype=torch.float64)
        options["bias"] = (0.3 * bias).to(dtype)
    return options


def pairs_of(routing, num_experts):
    """Per token, ids and scores; and that what lies past the last pair is padding."""
    ids, scores = routing.ids.tolist(), routing.scores
    if routing.token_offsets is None:
        ends = [routing.top_k * t for t in range(routing.num_tokens + 1)]
    else:
        ends = routing.token_offsets.tolist()
        assert ids[ends[-1] :] == [-1] * (len(ids) - ends[-1])
        assert not scores[ends[-1] :].any()
    assert ends[0] == 0 and len(ends) == routing.num_tokens + 1
    spans = itertools.pairwise(ends)
    return [(ids[begin:end], scores[begin:end]) for begin, end in spans]


EVERY_CASE = [
    pytest.param(row, shape, kind, id=f"{label(row)}-{name}-{kind}")
    for row in CASES["routers"]
    for name, shape in CASES["shapes"].items()
    for kind in CASES["logits"]
]


def compare(row, logits, top_k):
    options = options_of(row["options"], logits.shape[1])
    expected = statements.STATEMENTS[row["router"]](logits, top_k, **options)
    routing = functional.route(logits, top_k, router=row["router"], **options)
    got = pairs_of(routing, logits.shape[1])
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, ours), (_, theirs) in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, equal_nan=True)
    return routing, expected


@pytest.mark.parametrize(("row", "shape", "kind"), EVERY_CASE)
def test_ids_and_scores(row, shape, kind):
    num_tokens, num_experts, top_k = shape
    compare(row, statements.make_logits(kind, num_tokens, num_experts), top_k)


@pytest.mark.parametrize("case", CASES["grouped"], ids=lambda case: str(case["options"]))
@pytest.mark.parametrize("kind", CASES["logits"])
def test_groups(case, kind):
    num_tokens, num_experts, top_k = case["shape"]
    logits = statements.make_logits(kind, num_tokens, num_experts)
    compare({"router": "sigmoid_topk", **case}, logits, top_k)


@pytest.mark.parametrize("row", CASES["routers"], ids=label)
@pytest.mark.parametrize(
    "shape", ["usual", "odd experts", "all experts", "fewer tokens than a tile"]
)
def test_gradients(row, shape):
    """By differences, and equal to autograd through the statement where it is exact."""
    num_tokens, num_experts, top_k = CASES["shapes"][shape]
    logits = statements.make_logits("random", num_tokens, num_experts, seed=1).requires_grad_()
    options = options_of(row["options"], num_experts)

    def scores(logits):
        return functional.route(logits, top_k, router=row["router"], **options).scores

    assert torch.autograd.gradcheck(scores, (logits,), **GRADCHECK)
    routing, expected = compare(row, logits, top_k)
    stated = torch.cat([scores for _, scores in expected])
    direction = torch.linspace(-1, 2, len(stated), dtype=torch.float64)
    ours = torch.autograd.grad(routing.scores[: len(stated)] @ direction, logits)[0]
    theirs = torch.autograd.grad(stated @ direction, logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("row", CASES["routers"], ids=label)
def test_bits_do_not_depend_on_backend_threads_or_front_end(row):
    """fp32, where every backend runs: reference and fast, one thread and four, NumPy and torch."""
    logits = statements.make_logits("random", 300, 24, seed=2).float()
    options = options_of(row["options"], 24, torch.float32)
    results = []
    for backend, threads in (("reference", 1), ("fast", 1), ("fast", 4)):
        with penstock.backend(backend, threads=threads):
            routing = functional.route(logits, 3, router=row["router"], **options)
            results.append(routing)
    numpy_options = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    from_numpy = functional.route(logits.numpy(), 3, router=row["router"], **numpy_options)
    for other in (*results[1:], from_numpy):
        for name in ("ids", "scores", "token_offsets", "report"):
            want, got = getattr(results[0], name), getattr(other, name)
            assert (want is None) == (got is None), name
            if want is not None:
                assert np.array_equal(np.asarray(want), np.asarray(got)), name
    dscores = torch.linspace(-1, 1, len(results[0].scores))
    grads = []
    for backend, threads in (("reference", 1), ("fast", 4)):
        with penstock.backend(backend, threads=threads):
            grads.append(functional.route_backward(dscores, logits, results[0]))
    assert torch.equal(*grads)
    by_numpy = functional.route_backward(dscores.numpy(), logits.numpy(), from_numpy)
    assert np.array_equal(by_numpy, grads[0].numpy())


@pytest.mark.parametrize("row", CASES["routers"], ids=label)
@pytest.mark.parametrize("kind", ["random", "ties", "nan_somewhere"])
def test_replay_gives_the_same_bits_and_gradients(row, kind):
    num_tokens, num_experts, top_k = CASES["shapes"]["odd experts"]
    logits = statements.make_logits(kind, num_tokens, num_experts).requires_grad_()
    options = options_of(row["options"], num_experts)
    routing = functional.route(logits, top_k, router=row["router"], **options)
    again = routers.replay(logits, routing.detach())
    assert torch.equal(routing.ids, again.ids)
    torch.testing.assert_close(routing.scores, again.scores, rtol=0, atol=0, equal_nan=True)
    dscores = torch.linspace(-1, 1, len(routing.scores), dtype=torch.float64)
    grads = [torch.autograd.grad(r.scores, logits, dscores)[0] for r in (routing, again)]
    torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)


def routing_of(row, form=torch.from_numpy):
    logits = np.random.default_rng(3).standard_normal((40, 12)).astype(np.float32)
    options = options_of(row["options"], 12, torch.float32)
    if "bias" in options:
        options["bias"] = form(options["bias"].numpy())
    if options.get("mode") == "SR-f":
        options["seed"] = 5
    return functional.route(form(logits), 3, router=row["router"], **options)


def assert_plan_is_of(routing):
    built = functional.plan(replace(routing, plan=None), 12)
    for array, other in zip(functional.plan(routing, 12), built, strict=True):
        assert np.array_equal(array, other)


@pytest.mark.parametrize("row", CASES["routers"], ids=label)
def test_a_routing_carries_the_plan_of_its_ids(row):
    routing = routing_of(row)
    assert (routing.plan is None) == routing.router.fixed_top_k()
    assert_plan_is_of(routing)
    if routing.plan is not None:
        assert functional.plan(routing, 12) is routing.plan.plan
    wider = functional.plan(routing, 13)  # of more experts than the router has
    assert wider.expert_counts[12] == 0 and len(wider.expert_offsets) == 14
    replayed = routers.replay(torch.ones(40, 12), routing)
    assert replayed.plan is routing.plan


@pytest.mark.parametrize(
    "row", [row for row in CASES["routers"] if row["router"] == "token_rounding"], ids=label
)
def test_a_plan_handed_over_is_not_used_for_other_ids(row):
    def masked(routing):
        return routing.ids.masked_fill(torch.arange(len(routing.ids)) % 3 == 0, -1)

    replaced = routing_of(row)
    assert_plan_is_of(replace(replaced, ids=masked(replaced)))
    assigned = routing_of(row)
    assigned.ids = masked(assigned)
    assert_plan_is_of(assigned)
    written = routing_of(row)
    written.ids.copy_(masked(written))
    assert_plan_is_of(written)
    with torch.inference_mode():
        assert routing_of(row).plan is None


def test_numpy_arrays_do_not_tell_of_writes_and_get_no_plan():
    row = next(row for row in CASES["routers"] if row["router"] == "token_rounding")
    routing = routing_of(row, np.asarray)
    assert routing.plan is None
    assert_plan_is_of(routing)


def test_compiled_code_makes_the_plan_of_what_it_is_given():
    """In whole graphs, of a routing made inside and of one that carries its plan from outside."""
    row = next(row for row in CASES["routers"] if row["router"] == "token_rounding")
    routing = routing_of(row)

    def planned(logits):
        chosen = routers.token_rounding(logits, 2, tile=8)
        return *functional.plan(chosen, 12)[:5], *functional.plan(routing, 12)[:5]

    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(planned, fullgraph=True, backend="aot_eager")(logits)
    for got, want in zip(compiled, planned(logits), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("row", CASES["routers"], ids=label)
def test_replay_under_other_weights(row):
    """Recorded ids, scores of the new logits: the router's own formula, by differences."""
    num_tokens, num_experts, top_k = CASES["shapes"]["odd experts"]
    old = statements.make_logits("random", num_tokens, num_experts, seed=3)
    new = statements.make_logits("random", num_tokens, num_experts, seed=4).requires_grad_()
    options = options_of(row["options"], num_experts)
    recorded = functional.route(old, top_k, router=row["router"], **options)
    replayed = routers.replay(new, recorded)
    assert replayed.ids is recorded.ids
    live = recorded.ids >= 0
    assert not torch.equal(replayed.scores[live], recorded.scores[live])
    assert torch.autograd.gradcheck(
        lambda logits: routers.replay(logits, recorded).scores, (new,), **GRADCHECK
    )


@pytest.mark.parametrize("row", CASES["routers"], ids=label)
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_a_layer_equals_its_statement(row, save):
    """Through plan, experts and combine: no expert gives 0, and gradients reach the logits."""
    num_tokens, num_experts, top_k = CASES["shapes"]["usual"]
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    x, w1, w2 = draw(num_tokens, 6), draw(num_experts, 8, 6), draw(num_experts, 6, 4)
    logits = statements.make_logits("random", num_tokens, num_experts, seed=7).requires_grad_()
    options = options_of(row["options"], num_experts)
    expected = torch.zeros_like(x)
    pairs = statements.STATEMENTS[row["router"]](logits, top_k, **options)
    for token, (ids, scores) in enumerate(pairs):
        for expert, score in zip(ids, scores, strict=True):
            gate, up = (w1[expert] @ x[token]).chunk(2)
            y = w2[expert] @ (torch.nn.functional.silu(gate) * up)
            row_output = (score * y)[None]
            expected = expected.index_add(0, torch.tensor([token]), row_output)
    routing = functional.route(logits, top_k, router=row["router"], **options)
    output = functional.moe_experts(x, w1, w2, routing, save=save)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-11)
    without = [token for token, (ids, _) in enumerate(pairs) if not ids]
    assert not output[without].any()
    inputs = (x, w1, w2, logits)
    direction = draw(num_tokens, 6).detach()
    ours = torch.autograd.grad((output * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_every_router_has_a_statement_and_a_case():
    names = set(routers.NAMES) - {"topk_softmax_normalized"}
    assert names == set(statements.STATEMENTS) == {row["router"] for row in CASES["routers"]}
    assert {row["options"].get("mode") for row in CASES["routers"]} - {None} == set(routers.MODES)
