# SPDX-License-Identifier: Apache-2.0
"""Rung 4: a Hugging Face model with the engine's experts: patch, generate, convert, reload.

The model is a tiny random Mixtral that transformers builds here; with a real one, replace
tiny_model() by AutoModelForCausalLM.from_pretrained(path). Needs pip install 'penstock[hf]'.
"""

import tempfile
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import penstock


def tiny_model(seed):
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8,
        num_experts_per_tok=2, initializer_range=0.2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def main():
    model = tiny_model(seed=0)
    prompt = torch.tensor([[5, 17, 42, 99, 3]])
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": prompt > 0}
    before = model.generate(prompt, **settings)

    report = penstock.hf.patch(model)
    print(report)
    after = model.generate(prompt, **settings)
    print("the same tokens:", torch.equal(before, after))

    with tempfile.TemporaryDirectory() as folder:
        saved, fused = Path(folder) / "saved", Path(folder) / "fused"
        model.save_pretrained(saved)  # a tensor for each expert, as published checkpoints
        names = penstock.checkpoint.convert(saved, fused, to="fused")
        print(f"converted to {len(names)} tensors, experts fused")
        other = tiny_model(seed=1)
        penstock.hf.patch(other)
        penstock.load(other, fused)
    reloaded = other.generate(prompt, **settings)
    print("the same tokens after reloading:", torch.equal(reloaded, after))


if __name__ == "__main__":
    main()
