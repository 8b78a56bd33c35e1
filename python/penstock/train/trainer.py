# SPDX-License-Identifier: Apache-2.0
"""One model, its optimiser, and a single step of training or a pass of evaluation.

Everything a step does is a function of the configuration, the data and the step number, so two
trainers at the same step with the same weights and moments go on with the same bits (on the CPU,
with the same number of torch threads). No files, no printing. Driven by loop.py.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import penstock
from penstock.train.config import VOCABULARY, RunConfig
from penstock.train.data import Corpus, training_windows
from penstock.train.errors import TrainError
from penstock.train.model import LanguageModel
from penstock.train.placement import resolve_placement

BETAS = (0.9, 0.95)
FINAL_LR_SHARE = 0.1
MAX_WARMUP = 100


@dataclass(frozen=True)
class StepResult:
    """What one step has to say."""

    loss: float  # cross-entropy in nats per byte, auxiliary losses not included
    lr: float
    grad_norm: float
    aux_loss: float  # mean over MoE layers; 1 when the load is even
    z_loss: float
    idle_experts: int  # over all layers, in this step
    max_load: float  # the busiest expert's slots over an equal share


@dataclass(frozen=True)
class Evaluation:
    """A pass over held-out windows."""

    loss: float  # nats per byte
    loads: list[list[int]]  # slots by layer and expert; empty for the dense model

    def idle_experts(self) -> int:
        """Experts, over all layers, that got nothing."""
        return sum(load == 0 for layer in self.loads for load in layer)

    def relative_loads(self) -> list[list[float]]:
        """Slots over an equal share of the layer's slots."""
        return [[load * len(layer) / max(sum(layer), 1) for load in layer] for layer in self.loads]


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then a cosine from lr to a tenth of it. Steps count from 0."""
    warmup = min(MAX_WARMUP, max(1, config.steps // 10))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (
        FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
    )


class Trainer:
    """Holds what a checkpoint holds: model, optimiser and step."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.placement = resolve_placement(config)
        self.device = self.placement.device
        self.threads = config.threads or len(os.sched_getaffinity(0))
        self.step = 0
        torch.set_num_threads(self.threads)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config.model).to(self.device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=BETAS,
            fused=True,
        )

    def train_step(self) -> StepResult:
        """Learns from the windows of the current step, then moves to the next."""
        config = self.config
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shape = (config.seed, config.batch, config.model.sequence)
        windows = training_windows(self.corpus.train, shape, self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._numerics():
            loss = self._cross_entropy(torch.from_numpy(windows), "mean")
            routing = self.model.routing_losses()
            total = loss + config.aux_coefficient * routing.aux + config.z_coefficient * routing.z
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise TrainError(
                f"loss at step {self.step + 1}",
                got=f"{loss.item()} with gradient norm {norm.item()}",
                expected="finite numbers",
                remedy="Start another run with a lower --lr.",
            )
        self.optimizer.step()
        self.step += 1
        loads = self.model.expert_loads()
        layers = max(1, len(loads))
        return StepResult(
            loss=loss.item(),
            lr=lr,
            grad_norm=norm.item(),
            aux_loss=routing.aux.item() / layers,
            z_loss=routing.z.item() / layers,
            idle_experts=int((loads == 0).sum()),
            max_load=_max_relative_load(loads),
        )

    @torch.no_grad()
    def evaluate(self, windows: np.ndarray) -> Evaluation:
        """Mean loss over every target of `windows` (count, sequence + 1), and who got the load."""
        self.model.eval()
        total = 0.0
        loads = torch.zeros(0, 0, dtype=torch.int64)
        for start in range(0, len(windows), self.config.batch):
            part = torch.from_numpy(windows[start : start + self.config.batch])
            with self._numerics():
                total += self._cross_entropy(part, "sum").item()
            part_loads = self.model.expert_loads()
            loads = part_loads if start == 0 else loads + part_loads
        return Evaluation(loss=total / windows[:, 1:].size, loads=loads.tolist())

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(B, L, 256) fp32 on the CPU; for sampling."""
        self.model.eval()
        with self._numerics():
            return self.model(tokens.to(self.device)).float().cpu()

    def _cross_entropy(self, windows: Tensor, reduction: str) -> Tensor:
        windows = windows.to(self.device)
        logits = self.model(windows[:, :-1]).float()
        return F.cross_entropy(
            logits.reshape(-1, VOCABULARY), windows[:, 1:].reshape(-1), reduction=reduction
        )

    @contextlib.contextmanager
    def _numerics(self):
        """Our threads, and bf16 products over fp32 weights where the placement says so."""
        bf16 = self.placement.dtype == torch.bfloat16
        with (
            penstock.backend(threads=self.threads),
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16),
        ):
            yield


def _max_relative_load(loads: Tensor) -> float:
    """The largest share of a layer's slots that one expert has, over an equal share."""
    if loads.numel() == 0:
        return 1.0
    shares = loads / loads.sum(dim=1, keepdim=True).clamp(min=1)
    return shares.max().item() * loads.shape[1]
