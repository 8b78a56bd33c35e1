# SPDX-License-Identifier: Apache-2.0
"""The language model is causal, counts its parameters rightly, and learns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny_config

import penstock
from penstock.train.baselines import unigram_loss
from penstock.train.config import ROUTERS, ModelConfig, RunConfig
from penstock.train.data import Corpus, evaluation_windows, load_corpus
from penstock.train.errors import TrainError
from penstock.train.model import LanguageModel
from penstock.train.sample import sample
from penstock.train.trainer import Trainer, learning_rate


@pytest.mark.parametrize("config", [TINY, TINY.as_dense()], ids=["moe", "dense"])
def test_later_bytes_do_not_change_earlier_logits(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config)
    tokens = torch.randint(0, 256, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    with torch.no_grad():
        first, second = model(tokens), model(changed)
    torch.testing.assert_close(first[:, :7], second[:, :7], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[:, 7:], second[:, 7:])


def test_every_feed_forward_is_ours_and_gets_gradients() -> None:
    torch.manual_seed(0)
    model = LanguageModel(TINY)
    assert len(model.moe_layers()) == TINY.layers
    assert all(isinstance(layer, penstock.MoE) for layer in model.moe_layers())
    logits = model(torch.randint(0, 256, (4, 12)))
    losses = model.routing_losses()
    (logits.square().mean() + losses.aux + losses.z).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    loads = model.expert_loads()
    assert loads.shape == (TINY.layers, TINY.experts)
    assert loads.sum(dim=1).tolist() == [4 * 12 * TINY.top_k] * TINY.layers


def test_dense_model_has_the_active_parameters_of_ours() -> None:
    _, ours = LanguageModel(TINY).num_parameters()
    total, dense = LanguageModel(TINY.as_dense()).num_parameters()
    assert total == dense
    router = TINY.layers * TINY.experts * TINY.hidden_size  # the only thing dense does without
    assert ours - dense == router


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    config = RunConfig(steps=200, lr=1.0)
    rates = [learning_rate(config, step) for step in range(200)]
    assert rates[0] == pytest.approx(0.05) and rates[20] == pytest.approx(1.0)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=2e-3)
    assert learning_rate(RunConfig(steps=1, lr=1.0), 0) == 1.0


def test_thirty_steps_beat_the_unigram(text_file: Path) -> None:
    shape = ModelConfig(
        layers=2, hidden_size=64, heads=2, experts=8, intermediate_size=32, sequence=64
    )
    config = RunConfig(model=shape, steps=30, batch=8, lr=1e-2, threads=1)
    corpus = load_corpus((str(text_file),), 64)
    trainer = Trainer(config, corpus)
    losses = [trainer.train_step().loss for _ in range(30)]
    assert losses[0] > math.log(256) - 0.5
    assert sum(losses[-5:]) / 5 < losses[0] - 2
    windows = evaluation_windows(corpus.held_out, 64, 64)
    assert trainer.evaluate(windows).loss < unigram_loss(corpus.train, windows)


def test_evaluation_is_the_mean_over_targets_whatever_the_batch(
    text_file: Path, corpus: Corpus
) -> None:
    windows = evaluation_windows(corpus.held_out, TINY.sequence, 7)
    one, three = (Trainer(tiny_config(text_file, batch=size), corpus) for size in (1, 3))
    first, second = one.evaluate(windows), three.evaluate(windows)
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.loads == second.loads
    targets = torch.from_numpy(windows[:, 1:])
    log_p = torch.log_softmax(one.logits(torch.from_numpy(windows[:, :-1])), dim=-1)
    brute = -log_p.gather(-1, targets[..., None]).mean().item()
    assert first.loss == pytest.approx(brute, rel=1e-5)


def test_bf16_products_learn_too(text_file: Path, corpus: Corpus) -> None:
    trainer = Trainer(tiny_config(text_file, dtype="bf16"), corpus)
    losses = [trainer.train_step().loss for _ in range(8)]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_runaway_loss_stops_with_a_reason(text_file: Path, corpus: Corpus) -> None:
    trainer = Trainer(tiny_config(text_file), corpus)
    with torch.no_grad():
        trainer.model.head.weight.fill_(math.nan)
    with pytest.raises(TrainError, match="loss at step 1: got nan"):
        trainer.train_step()


def test_sample_is_repeatable(text_file: Path, corpus: Corpus) -> None:
    trainer = Trainer(tiny_config(text_file), corpus)
    first = sample(trainer, b"ab", 20)
    assert len(first) == 22 and first.startswith(b"ab")
    assert sample(trainer, b"ab", 20) == first
    other = Trainer(dataclasses.replace(trainer.config, seed=1), corpus)
    assert sample(other, b"ab", 20) != first


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_learns_and_is_measured(router: str, text_file: Path, corpus: Corpus) -> None:
    shape = dataclasses.replace(TINY, router=router, tile=4, threshold=0.6)
    trainer = Trainer(dataclasses.replace(tiny_config(text_file), model=shape), corpus)
    results = [trainer.train_step() for _ in range(8)]
    assert results[-1].loss < results[0].loss
    for result in results:
        assert 0 < result.entropy <= math.log(shape.experts) + 1e-6
        assert 0 <= result.padding < 1
        assert result.max_violation == pytest.approx(max(0.0, result.max_load - 1), abs=1e-5)
    assert any(r.drop_rate > 0 for r in results) == (router == "token_rounding")
    if router not in ("expert_choice", "threshold"):
        assert any(r.padding > 0 for r in results) == (router != "token_rounding")
    biases = [layer.router.score_bias for layer in trainer.model.moe_layers()]
    if router == "sigmoid_topk":  # one step of bias_rate for each step of the optimiser, at most
        assert all(0 < bias.abs().max() <= 8 * trainer.config.bias_rate + 1e-9 for bias in biases)
    windows = evaluation_windows(corpus.held_out, shape.sequence, 7)
    evaluation = trainer.evaluate(windows)
    if router == "token_rounding":  # a plain top K there
        slots = len(windows) * shape.sequence * shape.top_k
        assert [sum(layer) for layer in evaluation.loads] == [slots] * shape.layers
