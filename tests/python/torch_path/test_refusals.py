# SPDX-License-Identifier: Apache-2.0
"""What plain torch does not do is refused by name, before anything runs; and who chooses it."""

import subprocess
import sys

import numpy as np
import plain
import pytest
import torch

import penstock
from penstock import functional, lora, routers
from penstock.routing import SOFTMAX_ROUTERS

SHAPE = (6, 16, 8, 4, 2)
REFUSED = {
    "main_grad": {"main_grad": True},
    "delayed": {"delayed": functional.DelayedWeightGrads()},
    "order": {"order": "low_memory"},
    "save": {"save": "nothing"},
}


def layer():
    weights = plain.make_weights(SHAPE, dtype=torch.float32)
    routing = functional.route(plain.make_logits(SHAPE, dtype=torch.float32), SHAPE[4])
    return plain.make_x(SHAPE, dtype=torch.float32), weights, routing


@pytest.mark.parametrize("name", REFUSED)
def test_options(name):
    x, weights, routing = layer()
    with pytest.raises(penstock.UnsupportedError, match=rf'^{name}: got .*backend\("torch"\), exp'):
        functional.moe_experts(x, weights["w1"], weights["w2"], routing, **REFUSED[name])


def test_nothing_is_kept_where_no_gradient_is_wanted():
    x, weights, routing = layer()
    with torch.no_grad():
        y = functional.moe_experts(x, weights["w1"], weights["w2"], routing, save="nothing")
    want = functional.moe_experts(x, weights["w1"], weights["w2"], routing)
    assert torch.equal(y, want) and not y.requires_grad


@pytest.mark.parametrize(
    "settings",
    [{"threads": 2}, {"id_checks": "checked"}, {"sm_budget": 4}, {"ranges": "nvtx"}],
    ids=str,
)
def test_settings_of_the_context(settings, monkeypatch):
    from penstock import _context

    monkeypatch.setattr(_context, "check_kind", lambda kind: None)  # a torch without NVTX
    (name,) = settings
    with pytest.raises(penstock.UnsupportedError, match=rf"^{name}: got"):
        with penstock.backend(**settings):
            pass
    with penstock.backend("reference", **settings):
        with pytest.raises(penstock.UnsupportedError, match=rf"^{name}: got"):
            with penstock.backend("torch"):
                pass


@pytest.mark.parametrize("router", sorted(set(routers.NAMES) - set(SOFTMAX_ROUTERS)))
def test_other_routers(router):
    logits = torch.zeros(8, 4)
    options = {"tile": 2} if router == "token_rounding" else {}
    with pytest.raises(penstock.UnsupportedError, match=f"router: got '{router}'.*bring ids"):
        functional.route(logits, 2, router=router, **options)


@pytest.mark.parametrize("query", ["workspace_bytes", "tile_rows"])
def test_sizes_that_only_the_engine_has(query):
    with pytest.raises(penstock.UnsupportedError, match=query):
        getattr(functional, query)(SHAPE)
    with pytest.raises(penstock.UnsupportedError, match="bring the ids"):
        functional.route(torch.zeros(8, 4), 2, router="token_rounding")


def test_explicit_passes():
    x, weights, routing = layer()
    given = functional.Weights(w1=weights["w1"], w2=weights["w2"])
    with penstock.backend("reference"):
        _, saved = functional.moe_experts_forward(x, given, routing)
    logits = torch.zeros(6, 4)
    calls = {
        "moe_experts_forward": (x, given, routing),
        "moe_experts_backward": (x, saved),
        "route_backward": (routing.scores, logits, routing),
        "router_logits_backward": (logits, x, torch.zeros(4, 16)),
    }
    for name, arguments in calls.items():
        with pytest.raises(penstock.UnsupportedError, match=f"{name}: got.*autograd"):
            getattr(functional, name)(*arguments)


def test_adapters():
    x, weights, routing = layer()
    factors = lora.Adapters(torch.zeros(4, 2, 16), torch.zeros(4, 16, 2), None, None)
    frozen = (weights["w1"].detach(), weights["w2"].detach())
    with pytest.raises(penstock.UnsupportedError, match="adapted_experts: got"):
        lora.adapted_experts(x, *frozen, routing, adapters=factors)


def test_numpy():
    x, weight = np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(penstock.UnsupportedError, match="NumPy arrays"):
        functional.router_logits(x, weight)
    with pytest.raises(penstock.UnsupportedError, match="NumPy arrays"):
        functional.route(np.zeros((3, 4), np.float32), 2)


WRONG = {
    "w1": {"w1": torch.zeros(4, 15, 16)},
    "w2": {"w2": torch.zeros(4, 8, 8)},
    "b1": {"b1": torch.zeros(4, 1)},  # torch would broadcast it
    "b2": {"b2": torch.zeros(1, 16)},
    "activation": {"activation": "tanh"},
    "gate_layout": {"gate_layout": "woven"},
    "weight_order": {"weight_order": "any"},
    "trainable": {"trainable": torch.ones(3, dtype=torch.uint8)},
    "dtype of trainable": {"trainable": torch.ones(4)},
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit(name):
    x, weights, routing = layer()
    given = {**weights, **WRONG[name]}
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected .*\. "):
        functional.moe_experts(x, given.pop("w1"), given.pop("w2"), routing, **given)


def test_pairs_that_do_not_fit():
    x, weights, routing = layer()
    pair, bias = weights["w1"].chunk(2, 1), weights["b1"]
    with pytest.raises(ValueError, match="b1: got one tensor"):
        functional.moe_experts(x, pair, weights["w2"], routing, b1=bias)
    with pytest.raises(ValueError, match="b1: got a pair"):
        functional.moe_experts(x, weights["w1"], weights["w2"], routing, b1=bias.chunk(2, 1))
    with pytest.raises(ValueError, match="w1: got a pair for relu"):
        functional.moe_experts(x, pair, weights["w2"], routing, activation="relu")


def test_scores_and_logits_have_the_contracts_dtypes():
    x, weights, routing = layer()
    narrow = routing.with_scores(routing.scores.bfloat16())
    with pytest.raises(ValueError, match="dtype of scores"):
        functional.moe_experts(x, weights["w1"], weights["w2"], narrow)
    with pytest.raises(ValueError, match="dtype of logits"):
        functional.route(torch.zeros(2, 4, dtype=torch.bfloat16), 2)
    with pytest.raises(ValueError, match="dtype of router_weight"):
        functional.router_logits(x, torch.zeros(4, 16, dtype=torch.bfloat16))


def test_what_is_told_of_it(monkeypatch):
    (told,) = (backend for backend in penstock.list_backends() if backend.name == "torch")
    assert told.available and told.device == "any" and "only by name" in told.description
    assert penstock.why_not("torch", SHAPE, dtype="float64", device="cuda") == ""
    assert penstock.chosen_backend(SHAPE) == "torch"
    with penstock.backend(""):
        assert penstock.chosen_backend(SHAPE) != "torch"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert penstock.why_not("torch", SHAPE) == "torch is not installed"
    with pytest.raises(penstock.UnsupportedError, match="not installed"):
        penstock.chosen_backend(SHAPE)


def test_a_name_that_nothing_has_is_the_registrys_error():
    x, weights, routing = layer()
    with penstock.backend("torhc"), pytest.raises(ValueError, match="'torhc', expected one of"):
        functional.moe_experts(x, weights["w1"], weights["w2"], routing)


def test_it_is_never_taken_unless_named():
    program = (
        "import sys, torch, penstock\n"
        "layer = penstock.MoE(16, 8, 4, 2)\n"
        "layer(torch.randn(3, 16)).sum().backward()\n"
        "print('penstock._torch_path' in sys.modules)\n"
        "with penstock.backend('torch'): layer(torch.randn(3, 16)).sum().backward()\n"
        "print('penstock._torch_path' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
