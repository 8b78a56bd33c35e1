# SPDX-License-Identifier: Apache-2.0
"""Every router stated in plain torch from its paper's equations, and the logits to try it on.

The oracle of test_routers.py: loops and sorts, float64, no code shared with penstock. A statement
takes logits (T, E) and gives, for each token, its experts in order and their scores, so that
autograd runs through the scores.
"""

from __future__ import annotations

import torch

NAN_LAST = -float("inf")


def ranked(values):
    """Indices by falling value; NaN after every number, equal ones in order of their index."""
    number = values.detach().double()
    missing = number.isnan()
    # Sort by the least significant key first: both sorts are stable.
    order = torch.where(missing, NAN_LAST, number).argsort(descending=True, stable=True)
    return order[missing[order].int().argsort(stable=True)].tolist()


def softmax_topk(logits, top_k):
    """Softmax over the K largest logits."""
    pairs = []
    for row in logits:
        ids = ranked(row)[:top_k]
        pairs.append((ids, row[ids].softmax(0)))
    return pairs


def topk_softmax(logits, top_k, renormalize=False):
    """Softmax over all, then the K largest logits."""
    pairs = []
    for row in logits:
        ids = ranked(row)[:top_k]
        scores = row.softmax(0)[ids]
        pairs.append((ids, scores / scores.sum() if renormalize else scores))
    return pairs


def sigmoid_topk(logits, top_k, bias=None, groups=(1, 1), scale=1.0, renormalize=True):
    """DeepSeek-V3, equations 12 to 16, with node-limited choice by groups."""
    num_groups, top_groups = groups
    pairs = []
    for row in logits:
        affinity = row.sigmoid()
        biased = affinity.detach() + (0 if bias is None else bias)
        runs = biased.view(num_groups, -1)
        worth = torch.stack([run[ranked(run)[:2]].sum() for run in runs])
        best = ranked(worth)[:top_groups]
        size = runs.shape[1]
        allowed = [e for e in ranked(biased) if e // size in best]
        ids = allowed[:top_k]
        chosen = affinity[ids]
        pairs.append((ids, scale * (chosen / chosen.sum() if renormalize else chosen)))
    return pairs


def rounded_counts(counts, tile, num_tokens, mode, seed=None, prefers_up=None):
    """How many tokens each expert gets. prefers_up(e): whether NR-s rounds expert e up."""
    most = num_tokens // tile * tile
    targets, carried = [], 0
    for expert, count in enumerate(counts):
        below, above = count // tile * tile, -(-count // tile) * tile
        if above > most:
            target = below
        elif mode == "UP":
            target = above
        elif mode == "DOWN":
            target = below
        elif mode == "NR-f":
            target = round(count / tile) * tile  # Python rounds halves to even
        elif mode == "Balance-f":
            target = above if 2 * (count + carried - below) > tile and above > below else below
        elif mode == "SR-f":
            target = above if drawn(seed, expert) * tile < count - below else below
        else:
            target = above if prefers_up(expert) else below
        carried += count - target
        targets.append(target)
    return targets


def drawn(seed, expert):
    """The number in [0, 1) of a seed and an expert: the SplitMix64 generator's output."""
    mask = 2**64 - 1
    z = (seed + (expert + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / 2**53


def token_rounding(logits, top_k, tile, mode="NR-f", seed=None, renormalize=True):
    """SonicMoE's Algorithm 4: sorts every expert's column of p, chosen pairs first."""
    num_tokens, num_experts = logits.shape
    p = logits.softmax(1)
    top = [ranked(row)[:top_k] for row in logits]
    columns, counts = [], []
    for expert in range(num_experts):
        chosen = [t for t in range(num_tokens) if expert in top[t]]
        others = [t for t in range(num_tokens) if expert not in top[t]]
        column = p[:, expert]
        by_rank = [chosen[i] for i in ranked(column[chosen])]
        by_rank += [others[i] for i in ranked(column[others])]
        columns.append(by_rank)
        counts.append(len(chosen))

    def prefers_up(expert):
        below = counts[expert] // tile * tile
        column = p[:, expert].detach()
        leaving = column[columns[expert][below : counts[expert]]].sum()
        joining = column[columns[expert][counts[expert] : below + tile]].sum()
        return bool(leaving > joining)

    if num_tokens >= tile:
        targets = rounded_counts(counts, tile, num_tokens, mode, seed, prefers_up)
    else:
        targets = counts
    kept = [set(column[:target]) for column, target in zip(columns, targets, strict=True)]
    pairs = []
    for token in range(num_tokens):
        ids = [e for e in top[token] if token in kept[e]]
        ids += [e for e in range(num_experts) if token in kept[e] and e not in top[token]]
        divisor = p[token, top[token]].sum() if renormalize else 1.0
        pairs.append((ids, p[token, ids] / divisor))
    return pairs


def expert_choice(logits, top_k, capacity=None):
    """Zhou et al.: the transposed choice over a softmax of each token."""
    num_tokens, num_experts = logits.shape
    if capacity is None:
        capacity = min(num_tokens, -(-num_tokens * top_k // num_experts))
    p = logits.softmax(1)
    takers = [set(ranked(p[:, expert])[:capacity]) for expert in range(num_experts)]
    pairs = []
    for token in range(num_tokens):
        ids = [expert for expert in range(num_experts) if token in takers[expert]]
        pairs.append((ids, p[token, ids]))
    return pairs


def threshold(logits, top_k, threshold=0.5, capacity=None):
    """Every expert whose sigmoid is high enough, while there are slots."""
    s = logits.sigmoid()
    left = s.numel() if capacity is None else capacity
    pairs = []
    for row in s:
        ids = [expert for expert, score in enumerate(row.tolist()) if score >= threshold][:left]
        left -= len(ids)
        pairs.append((ids, row[ids]))
    return pairs


STATEMENTS = {
    function.__name__: function
    for function in (
        softmax_topk,
        topk_softmax,
        sigmoid_topk,
        token_rounding,
        expert_choice,
        threshold,
    )
}


def make_logits(kind, num_tokens, num_experts, seed=0):
    """Float64 logits (T, E) of one of the kinds that tests/cases/routers.json lists."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    if kind == "all_equal":
        logits[:] = 0.25
    elif kind == "ties":
        logits = (logits * 2).round()
    elif kind == "nan_rows":
        logits[::3] = float("nan")
    elif kind == "nan_somewhere":
        logits[:, ::2][::2] = float("nan")
    elif kind == "one_hot":
        logits[:, -1] += 30.0
    elif kind == "infinite":
        logits[1::4, 0] = float("inf")
        logits[2::4] = -float("inf")
    elif kind == "large":
        logits *= 300.0
    return logits
