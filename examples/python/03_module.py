# SPDX-License-Identifier: Apache-2.0
"""Rung 3: penstock.MoE as a module. Fits a small function in a few seconds on the CPU.

Shows the layer's statistics, the balancing loss added to the training loss, and autocast.
"""

import torch

import penstock


def main():
    torch.manual_seed(0)
    layer = penstock.MoE(
        32, 64, num_experts=8, top_k=2, bias=True, aux_loss_coef=0.01, z_loss_coef=0.001
    )
    print(layer)
    x = torch.randn(512, 32)
    target = torch.sin(3 * x) + x.roll(1, dims=-1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        loss = torch.nn.functional.mse_loss(layer(x), target)
        (loss + layer.stats.total_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {losses[-1]:.4f}, loads {layer.stats.loads.tolist()}")
    assert losses[-1] < 0.5 * losses[0], "the layer did not learn"

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    error = (half.float() - layer(x)).norm() / layer(x).norm()
    print(f"under autocast: {half.dtype}, relative difference {error:.4f}")


if __name__ == "__main__":
    main()
