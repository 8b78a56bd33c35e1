# SPDX-License-Identifier: Apache-2.0
"""penstock.load: a checkpoint of either layout into a model, all of it or nothing."""

import models
import pytest
import torch
from torch import nn

import penstock
from penstock.checkpoint import CheckpointError, convert


class Tiny(nn.Module):
    """A model with the names of models.per_expert(layers=1), its experts fused or one by one."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.zeros_like(tensor)))


def held(model):
    return {name: models.bits(tensor) for name, tensor in model.state_dict().items()}


def expected(tensors):
    return {name: models.bits(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("spelling", ["mlp", "mixtral"])
@pytest.mark.parametrize("of_file", ["per_expert", "fused"])
@pytest.mark.parametrize("of_model", ["per_expert", "fused"])
def test_either_layout_into_either(tmp_path, spelling, of_file, of_model):
    single = models.per_expert(spelling)
    layouts = {"per_expert": single, "fused": models.fused_by_hand(single, spelling)}
    source = models.write(tmp_path / "source", layouts[of_file], 2)
    model = Tiny(layouts[of_model])
    assert penstock.load(model, source) == sorted(layouts[of_model])
    assert held(model) == expected(layouts[of_model])


def test_strided_parameters_are_filled(tmp_path):
    tensors = models.per_expert(layers=1)
    fused = models.fused_by_hand(tensors)
    source = models.write(tmp_path / "source", tensors)
    model = Tiny(fused)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    experts.down_proj = nn.Parameter(torch.zeros(8, 4, 6, dtype=torch.bfloat16).transpose(1, 2))
    penstock.load(model, source)
    assert held(model) == expected(fused)


def test_renames_are_used_where_the_model_knows_no_such_name(tmp_path):
    tensors = models.per_expert("mixtral", layers=1)
    theirs = {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in tensors.items()}
    source = models.write(tmp_path / "source", theirs)
    model = Tiny(models.fused_by_hand(tensors, "mixtral"))
    penstock.load(model, source)
    assert held(model) == expected(models.fused_by_hand(tensors, "mixtral"))
    with pytest.raises(CheckpointError, match="block_sparse_moe"):
        penstock.load(model, source, renames={})
    with pytest.raises(CheckpointError, match="two tensors of the checkpoint"):
        onto_one = {"block_sparse_moe.shared_experts.up_proj": "mlp.gate"}
        penstock.load(model, source, renames={**onto_one, "block_sparse_moe.": "mlp."})


GATE = "model.layers.0.mlp.gate.weight"
WRONG = {
    "missing": (lambda t: t.pop(GATE), "nothing for " + GATE),
    "left over": (lambda t: t.update(more=torch.zeros(1)), "more, which the model lacks"),
    "other shape": (lambda t: t.update({GATE: t[GATE][:-1].clone()}), r"got BF16 \[7, 6\]"),
    "other dtype": (lambda t: t.update({GATE: t[GATE].float()}), r"got F32 \[8, 6\]"),
    "an expert missing": (lambda t: t.pop("model.layers.0.mlp.experts.5.up_proj.weight"),
                          "up weight of expert 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_changes_nothing(tmp_path, case):
    change, says = WRONG[case]
    tensors = models.per_expert(layers=1)
    model = Tiny(models.fused_by_hand(tensors))
    change(tensors)
    source = models.write(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=says):
        penstock.load(model, source)
    assert not any(parameter.view(torch.uint8).any() for parameter in model.parameters())


def test_tied_parameters_are_filled_by_either_name(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    values = torch.randn(5, 3)
    for name in ("embed.weight", "head.weight"):
        model = Tied()
        source = models.write(tmp_path / name, {name: values})
        assert penstock.load(model, source) == [name]
        assert torch.equal(model.head.weight, values)
    both = {"embed.weight": values, "head.weight": values.clone()}
    source = models.write(tmp_path / "both", both)
    with pytest.raises(CheckpointError, match="tied tensors"):
        penstock.load(Tied(), source)


def test_a_model_without_memory_is_refused(tmp_path):
    source = models.write(tmp_path / "source", {"weight": torch.ones(2, 3)})
    with pytest.raises(CheckpointError, match="to_empty"):
        penstock.load(nn.Linear(3, 2, bias=False, device="meta"), source)


def test_loading_does_not_hold_the_checkpoint_in_memory(tmp_path):
    """The data stays in the memory map: beside the model, nothing of its size is allocated."""
    import tracemalloc

    tensors = {"weight": torch.randn(1000, 1000)}
    source = models.write(tmp_path / "source", tensors)
    model = nn.Linear(1000, 1000, bias=False)
    tracemalloc.start()
    penstock.load(model, source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert torch.equal(model.weight, tensors["weight"])


def test_convert_fuses_what_load_fuses(tmp_path):
    tensors = models.per_expert(layers=1)
    convert(models.write(tmp_path / "source", tensors), tmp_path / "fused", to="fused")
    model = Tiny(models.fused_by_hand(tensors))
    penstock.load(model, tmp_path / "fused")
    assert held(model) == models.read(tmp_path / "fused")
