# SPDX-License-Identifier: Apache-2.0
"""Rung 5: fine-tune a Hugging Face model's experts with PEFT's adapters in the grouped products.

A tiny random model learns one sequence by heart; only the adapters move. They are saved, loaded and
merged by PEFT itself. Needs pip install 'penstock[hf,peft]'.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import penstock


def tiny_model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=8,
        num_experts_per_tok=2, head_dim=16, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def main():
    adapters = LoraConfig(
        r=8, lora_alpha=16, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    model = get_peft_model(tiny_model(), adapters)
    print(penstock.hf.patch(model))  # after get_peft_model: the adapters are found

    text = torch.randint(1, 101, (1, 48), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(60):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
    assert losses[-1] < 0.5 * losses[0], "the adapters did not learn"

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_model(), folder)
    penstock.hf.patch(loaded)
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        adapted, plain = model(input_ids=text).logits, merged(input_ids=text).logits
    error = ((adapted - plain).norm() / plain.norm()).item()
    print(f"saved, loaded and merged, the logits differ by {error:.1e}: {error < 1e-5}")


if __name__ == "__main__":
    main()
