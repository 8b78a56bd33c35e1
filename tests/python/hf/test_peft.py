# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters on the experts of a patched model, against PEFT's own computation."""

import importlib.util
import math

import pytest
import torch
from families import relative_error, tiny_model, tokens

import penstock

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

from peft import LoraConfig, PeftModel, get_peft_model

# transformers' new name for what PEFT still calls by the old one
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
BOTH = ["gate_up_proj", "down_proj"]
UP = {"nemotron_h": "up_proj"}


def config(rank=4, targets=BOTH, family="mixtral", **settings):
    named = [UP.get(family, name) if name == BOTH[0] else name for name in targets]
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in named],
        init_lora_weights=False,
        **settings,
    )


def adapted_model(family="mixtral", seed=0, **settings):
    """A tiny model with random adapters; the same seed gives the same."""
    model = tiny_model(family, seed)
    torch.manual_seed(seed)
    model = get_peft_model(model, config(family=family, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def logits_and_grads(model, ids):
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]])
def test_logits_and_gradients_are_those_of_peft(family, targets):
    model, ids = adapted_model(family, targets=targets), tokens()
    logits, grads = logits_and_grads(model, ids)
    report = penstock.hf.patch(model)
    assert report.replaced and not report.refused and "LoRA on" in repr(report)
    ours, our_grads = logits_and_grads(model, ids)
    assert relative_error(ours, logits) <= 1e-5
    assert our_grads.keys() == grads.keys() and all("lora_" in name for name in grads)
    assert max(relative_error(our_grads[name], grads[name]) for name in grads) <= 1e-5


@pytest.mark.parametrize("rank", [1, 16, 256])
def test_ranks(rank):
    model, ids = adapted_model(rank=rank), tokens()
    logits, grads = logits_and_grads(model, ids)
    penstock.hf.patch(model)
    ours, our_grads = logits_and_grads(model, ids)
    assert relative_error(ours, logits) <= 1e-5
    assert max(relative_error(our_grads[name], grads[name]) for name in grads) <= 1e-5


def test_the_experts_weights_are_not_materialised(monkeypatch):
    """PEFT's way is a parametrization, which makes W + B A of every expert."""
    model, ids = adapted_model(), tokens()

    def refuse(*arguments, **settings):
        raise AssertionError("a weight was parametrized")

    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", refuse)
    with pytest.raises(AssertionError, match="parametrized"):
        model(input_ids=ids)
    penstock.hf.patch(model)
    logits_and_grads(model, ids)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # it was never saved
def test_saving_and_loading_stay_pefts(tmp_path):
    model, ids = adapted_model(seed=1), tokens()
    penstock.hf.patch(model)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("mixtral", seed=1), tmp_path).eval()
    theirs = loaded(input_ids=ids).logits
    penstock.hf.patch(loaded)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert relative_error(expected, theirs) <= 1e-5


def test_merge_unmerge_and_disable():
    model, ids = adapted_model(), tokens()
    penstock.hf.patch(model)
    adapted = model(input_ids=ids).logits
    with model.disable_adapter():
        plainly = model(input_ids=ids).logits
    bare = tiny_model("mixtral")
    penstock.hf.patch(bare)
    assert torch.equal(plainly, bare(input_ids=ids).logits)
    assert relative_error(plainly, adapted) > 0.1
    model.merge_adapter()
    assert relative_error(model(input_ids=ids).logits, adapted) <= 1e-5
    model.unmerge_adapter()
    assert relative_error(model(input_ids=ids).logits, adapted) <= 1e-5
    merged = model.merge_and_unload()
    assert relative_error(merged(input_ids=ids).logits, adapted) <= 1e-5


def test_two_adapters_switch_and_add():
    model, ids = adapted_model(), tokens()
    try:
        model.add_adapter("second", config(rank=3))
    except ValueError as error:
        pytest.skip(f"this version of PEFT: {error}")
    results = {}
    for ours in (False, True):
        if ours:
            penstock.hf.patch(model)
        for active in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(active)
            results[ours, len(active), active[0]] = model(input_ids=ids).logits
    for (_, *active), logits in results.items():
        assert relative_error(logits, results[(False, *active)]) <= 1e-5
    assert len({logits.sum().item() for (ours, *_), logits in results.items() if ours}) == 3


def test_bf16_model_with_fp32_adapters():
    """PEFT keeps the factors of a bf16 model in fp32 and casts them; so do we."""
    model, ids = tiny_model("mixtral").bfloat16(), tokens()
    model = get_peft_model(model, config())
    (a, *_) = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert a.dtype == torch.float32
    logits, grads = logits_and_grads(model, ids)
    penstock.hf.patch(model)
    ours, our_grads = logits_and_grads(model, ids)
    assert our_grads.keys() == grads.keys()
    assert relative_error(ours, logits) < 0.05
    assert all(grad.dtype == torch.float32 for grad in our_grads.values())


def test_fine_tuning_lowers_the_loss_and_moves_only_the_adapters():
    model, ids = tiny_model("qwen3_moe"), tokens()
    model = get_peft_model(model, config(rank=8))
    penstock.hf.patch(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < 0.8 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_weights_that_train_besides_are_left_to_peft():
    model, ids = adapted_model(), tokens()
    for name, parameter in model.named_parameters():
        if name.endswith("experts.base_layer.base_layer.down_proj"):
            parameter.requires_grad_(True)
    _, grads = logits_and_grads(model, ids)
    penstock.hf.patch(model)
    _, our_grads = logits_and_grads(model, ids)
    assert our_grads.keys() == grads.keys() and any("lora_" not in name for name in grads)
    assert max(relative_error(our_grads[name], grads[name]) for name in grads) <= 1e-5
    assert penstock.hf.unpatch(model) == 4
