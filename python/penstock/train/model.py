# SPDX-License-Identifier: Apache-2.0
"""A byte-level decoder language model whose feed-forward layers are penstock.MoE.

Pre-norm blocks of causal attention (rotary positions) and a mixture of experts; embedding, norms,
attention and the output head are torch's. The dense model of the comparison differs in one thing:
a single SwiGLU of width K·n in each block, which is as many parameters as a token meets in K
experts. Shapes in comments: B windows, L bytes each, d hidden, E experts. Built by the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penstock
from penstock import functional, losses
from penstock.train.config import VOCABULARY, ModelConfig

ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class RoutingMeasures:
    """What the routers of the last call did: means over the MoE layers, of one call each."""

    entropy: float  # nats of a token's softmax over the experts
    max_violation: float  # the largest load over the mean, less 1; the worst layer's
    drop_rate: float  # pairs that lost their place, of those chosen
    without_expert: float  # tokens that no expert got, of all
    padding: float  # rows that filling every expert up to whole tiles would add, of all rows then


@dataclass(frozen=True)
class RoutingLosses:
    """Sums over the MoE layers of their last call; zeros for the dense model."""

    aux: Tensor
    z: Tensor


class RMSNorm(nn.Module):
    """Scales a row to unit mean square, in fp32, then by a learnt weight."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of (..., d) of unit mean square, times the weight."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (x.float() * scale).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention of several heads with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix (B, L, d) over the positions before and at each one."""
        batch, length, hidden = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d / heads)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class DenseFeedForward(nn.Module):
    """SwiGLU of width K·n: the active parameters of a token's K experts in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.top_k * config.intermediate_size
        self.up = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate) · up) of (..., d)."""
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size)
        self.feed_forward = _feed_forward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, L, d) to (B, L, d)."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nn.Module):
    """Bytes (B, L) to logits (B, L, 256)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        cos, sin = _rotary_tables(config.sequence, config.hidden_size // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each of `tokens` (B, L), L at most config.sequence."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def moe_layers(self) -> list[penstock.MoE]:
        """The mixture of each block, in order; none in the dense model."""
        return [b.feed_forward for b in self.blocks if isinstance(b.feed_forward, penstock.MoE)]

    def routing_losses(self) -> RoutingLosses:
        """What the routers of the last call are to be punished for."""
        zero = self.head.weight.new_zeros((), dtype=torch.float32)
        stats = [layer.stats for layer in self.moe_layers()]
        return RoutingLosses(
            aux=sum((s.aux_loss for s in stats), zero), z=sum((s.z_loss for s in stats), zero)
        )

    def routing_measures(self) -> RoutingMeasures:
        """Entropy, violation and losses of the last call; zeros for the dense model."""
        stats = [layer.stats for layer in self.moe_layers()]
        if not stats:
            return RoutingMeasures(0.0, 0.0, 0.0, 0.0, 0.0)
        count = len(stats)
        tile = self.config.tile or self._backend_tile(stats[0].logits.shape[0])
        without = [
            s.report.tokens_without_expert / max(1, s.logits.shape[0]) for s in stats if s.report
        ]
        return RoutingMeasures(
            entropy=sum(s.entropy.item() for s in stats) / count,
            max_violation=max(s.max_load_violation.item() for s in stats),
            drop_rate=sum(s.drop_rate for s in stats) / count,
            without_expert=sum(without) / count,
            padding=sum(losses.padding_waste(s.loads, tile).item() for s in stats) / count,
        )

    def _backend_tile(self, num_tokens: int) -> int:
        config = self.config
        shape = (num_tokens, config.hidden_size, config.intermediate_size, config.experts)
        device = str(self.head.weight.device)
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
        return functional.tile_rows((*shape, config.top_k), dtype=dtype, device=device)

    def expert_loads(self) -> Tensor:
        """(layers, E) int64 on the CPU: slots each expert got in the last call."""
        loads = [layer.stats.loads.detach().cpu().long() for layer in self.moe_layers()]
        return torch.stack(loads) if loads else torch.zeros(0, 0, dtype=torch.int64)

    def num_parameters(self) -> tuple[int, int]:
        """(all, active): what is stored, and what one byte passes through."""
        total = sum(p.numel() for p in self.parameters())
        idle_share = 1 - self.config.top_k / self.config.experts
        experts = sum(
            p.numel() for layer in self.moe_layers() for p in layer.parameters() if p.dim() == 3
        )
        return total, total - round(experts * idle_share)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of unit gain; what is added to the residual stream is scaled down."""
        residual_scale = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            gain = residual_scale if name.endswith(("out.weight", "down.weight", "w2")) else 1.0
            nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embedding.weight, std=1.0)
        self.head.weight.mul_(0.5)


def _feed_forward(config: ModelConfig) -> nn.Module:
    if config.feed_forward == "dense":
        return DenseFeedForward(config)
    return penstock.MoE(
        config.hidden_size,
        config.intermediate_size,
        config.experts,
        config.top_k,
        activation="swiglu",
        router=config.router,
        router_options=config.router_options(),
        save=config.save,
    )


def _rotary_tables(length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (L, head_size / 2)."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float32), ROTARY_BASE**-exponents)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
