# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that transformers writes, loaded into a patched model of another initialisation."""

import pytest
import torch
from families import BF16_FAMILIES, tiny_model, tokens

import penstock

# Families whose checkpoints differ from the model by more than the experts' layout.
RENAMED = {
    "granitemoe": {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.": "router.",
    },
}


# nemotron_h's names differ from one version of transformers to the next.
@pytest.mark.parametrize("family", [name for name in BF16_FAMILIES if name != "nemotron_h"])
def test_a_saved_checkpoint_is_loaded_exactly(family, tmp_path):
    model, ids = tiny_model(family, seed=3), tokens()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    twin = tiny_model(family, seed=4)
    penstock.hf.patch(model)
    penstock.hf.patch(twin)
    assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    penstock.load(twin, tmp_path, renames=RENAMED.get(family))
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
