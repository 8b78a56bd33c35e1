# SPDX-License-Identifier: Apache-2.0
"""The routers: who goes where, from logits. Each takes logits (T, E) and returns a Routing.

A router is scores, a selection, and a plan (functional.plan) of what was selected. Its scores are
differentiable in the logits (torch); its selection is not. functional.route(logits, K, router=NAME,
...) is the same by name. A routing of your own, as scores and ids, is as good as any of these.

Logits are fp32, or float64 on the reference backend; NumPy arrays or torch tensors. Ties go to the
lower id (between tokens: to the lower token), and a NaN ranks below every number. T tokens, E
experts, K experts per token. Errors: ValueError for an option out of range, UnsupportedError where
no backend has the router.
"""

from __future__ import annotations

import inspect
from typing import Any

from penstock import _engine_route
from penstock._arrays import arrays_of, is_torch
from penstock._context import current
from penstock._engine_route import Routed, RouterSpec
from penstock._sizes import tile_rows
from penstock.errors import invalid
from penstock.routing import HandedPlan, Routing

__all__ = [
    "MODES",
    "NAMES",
    "expert_choice",
    "replay",
    "sigmoid_topk",
    "softmax_topk",
    "threshold",
    "token_rounding",
    "topk_softmax",
]

MODES = ("NR-f", "SR-f", "NR-s", "Balance-f", "UP", "DOWN")


def softmax_topk(logits: Any, top_k: int) -> Routing:
    """The K largest logits, softmax over the chosen (Mixtral). Scores of a token sum to 1."""
    return _route(logits, RouterSpec("softmax_topk", top_k=top_k))


def topk_softmax(logits: Any, top_k: int, *, renormalize: bool = False) -> Routing:
    """Softmax over all E logits, then the K largest (Switch Transformer, arXiv 2101.03961).

    renormalize: divide by the sum of the chosen.
    """
    name = "topk_softmax_normalized" if renormalize else "topk_softmax"
    return _route(logits, RouterSpec(name, top_k=top_k))


def sigmoid_topk(
    logits: Any,
    top_k: int,
    *,
    bias: Any = None,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Sigmoid scores s, chosen by s + bias among a token's best groups (DeepSeek-V3, 2412.19437).

    bias (E), dtype of logits, or None: steers the choice and no score; see balance.update_bias.
    groups: (G, g): the experts are G runs of equal length, and the K experts come from the g runs
    whose two best biased scores sum highest. Score: scale * s / (sum of the chosen s), or scale * s
    with renormalize=False. NaN where all the chosen s are 0 and are to be divided.
    """
    num_groups, top_groups = groups
    spec = RouterSpec(
        "sigmoid_topk",
        scaling=_scaling(renormalize),
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=float(scale),
    )
    return _route(logits, spec, steering=(bias, None))


def token_rounding(
    logits: Any,
    top_k: int,
    *,
    tile: int | None = None,
    mode: str = "NR-f",
    seed: Any = None,
    renormalize: bool = True,
) -> Routing:
    """Top K, then every expert's count rounded to whole tiles (SonicMoE, arXiv 2512.14080, Alg. 4).

    With p the softmax over all E: rounding down drops an expert's chosen tokens of least p,
    rounding up adds the others of largest p, so that no row of a tile is padding. Score: p / (sum
    of p over the token's top K), for added pairs too, or p with renormalize=False. A token may end
    with no expert (its output is 0) or with more than K. A count never passes T // tile * tile;
    with T < tile nothing is rounded, and report.rounded is 0. Slots: T K + E (tile - 1), or T K
    where nothing is rounded.

    tile: M, by default the rows of the backend's tile for these sizes. mode: "NR-f" nearest by
    count (halfway: the even multiple), "SR-f" stochastic by fraction, "NR-s" up where the chosen of
    the last tile weigh more than what would fill it, "Balance-f" nearest with the error so far
    carried from expert to expert, "UP", "DOWN". seed, for SR-f: an int, or an int64 tensor (1) on
    the device of logits; drawn from torch's generator by default. The paper's rule: quality holds
    while tokens per expert, T K / E, are at least 2 M.
    """
    if mode not in MODES:
        raise invalid("mode", repr(mode), "one of " + ", ".join(MODES), "Check the spelling")
    num_tokens, num_experts = logits.shape
    if tile is None:
        tile = _backend_tile(logits, top_k)
    spec = RouterSpec(
        "token_rounding", scaling=_scaling(renormalize), mode=mode, top_k=top_k, tile=tile
    )
    slots = num_tokens * top_k
    if num_tokens >= tile:
        slots = slots + num_experts * (tile - 1)
    return _route(logits, spec, slots, (None, _seed(seed, logits) if mode == "SR-f" else None))


def expert_choice(logits: Any, top_k: int, *, capacity: int | None = None) -> Routing:
    """Every expert takes the C tokens with its largest p = softmax over E (arXiv 2202.09368).

    capacity: C, by default K T / E rounded up, so that a token has K experts on average; T where
    it is more.
    Score: p. Loads are equal by construction; tokens have any number of experts, also none. An
    expert sees the whole batch when it chooses, so a token's experts depend on tokens after it.
    """
    num_tokens, num_experts = logits.shape
    if capacity is None:
        capacity = -(-num_tokens * top_k // num_experts)
    return _route(logits, RouterSpec("expert_choice"), num_experts * min(capacity, num_tokens))


def threshold(
    logits: Any,
    top_k: int | None = None,
    *,
    threshold: float | None = None,
    capacity: int | None = None,
) -> Routing:
    """Every expert whose s = sigmoid(logit) is at least `threshold` (None: 0.5); score s.

    capacity: slots that there are for the whole call, by default T E, which no routing passes.
    Pairs get them in order of token, then of expert; the rest is dropped and counted in
    report.dropped: check that where you pass a smaller bound. top_k is not used: it is there so
    that every router can be called alike.
    """
    num_tokens, num_experts = logits.shape
    slots = num_tokens * num_experts if capacity is None else capacity
    # The default is the spec's own: torch.compile would make a symbol of one of this function.
    spec = RouterSpec("threshold")
    if threshold is not None:
        spec = spec._replace(threshold=threshold)
    return _route(logits, spec, slots)


def replay(logits: Any, recorded: Routing) -> Routing:
    """The same experts as `recorded`, with scores (and their gradients) of these logits.

    recorded: what a router returned before, perhaps of other weights; `recorded.detach()` keeps it
    without its graph. With equal logits the scores have the same bits.
    """
    spec = recorded.router
    if spec is None:
        raise invalid(
            "recorded",
            "a routing that the caller brought",
            "one that a router of penstock returned",
            "Only its own router knows how to score a pair; compute your scores yourself",
        )
    fixed = spec.fixed_top_k()
    ids = recorded.ids.reshape(recorded.num_tokens, recorded.top_k) if fixed else recorded.ids
    if logits.shape[0] != recorded.num_tokens:
        raise invalid(
            "logits",
            f"{logits.shape[0]} tokens",
            f"{recorded.num_tokens}, as were recorded",
            "Replay the tokens that the recording saw",
        )
    given = Routed(None, ids, recorded.token_offsets)
    if is_torch(logits):
        scores = _operations().replay(logits, spec, given)
    else:
        scores = _engine_route.replay(logits, spec, given, current())
    return recorded.with_scores(scores.reshape(-1))


NAMES = {
    "softmax_topk": softmax_topk,
    "topk_softmax": topk_softmax,
    "topk_softmax_normalized": lambda logits, top_k: topk_softmax(logits, top_k, renormalize=True),
    "sigmoid_topk": sigmoid_topk,
    "token_rounding": token_rounding,
    "expert_choice": expert_choice,
    "threshold": threshold,
}


def route_by_name(logits: Any, top_k: int, router: str, options: dict[str, Any]) -> Routing:
    """functional.route: the router of that name, with its options."""
    check_options(router, options)
    return NAMES[router](logits, top_k, **options)


def check_options(router: str, options: dict[str, Any]) -> None:
    """ValueError unless there is such a router and it has these options."""
    if router not in NAMES:
        raise invalid("router", repr(router), "one of " + ", ".join(NAMES), "Check the spelling")
    known = list(inspect.signature(NAMES[router]).parameters)[2:]
    for name in options:
        if name not in known:
            raise invalid(
                name,
                f"{options[name]!r} with {router}",
                "the router's own options: " + (", ".join(known) or "it has none"),
                "Leave it out, or name another router",
            )


def _scaling(renormalize: bool) -> str:
    return "normalized" if renormalize else "plain"


def _backend_tile(logits: Any, top_k: int) -> int:
    """Rows of a tile on the backend in force; the choice depends on T, E and K alone."""
    device_type, index = arrays_of(logits).device(logits)
    num_tokens, num_experts = logits.shape
    # Widths that every backend takes; the storage dtype that the device's backends have in common.
    dtype = arrays_of(logits).dtype_name(logits) if device_type == "cpu" else "bfloat16"
    shape = (num_tokens, 64, 64, num_experts, top_k)
    return tile_rows(shape, dtype=dtype, device=f"{device_type}:{index}")


def _seed(seed: Any, logits: Any) -> Any:
    """The seed as an array (1) of int64; torch draws one where none is given."""
    if seed is not None and not isinstance(seed, int):
        return seed
    if is_torch(logits):
        import torch

        if seed is None:
            return torch.randint(0, 2**63 - 1, (1,), device=logits.device)
        return torch.full((1,), seed, dtype=torch.int64, device=logits.device)
    if seed is None:
        raise invalid("seed", "None with NumPy arrays", "an int", "Pass one: NumPy draws none here")
    import numpy as np

    return np.array([seed], dtype=np.int64)


def _route(
    logits: Any, spec: RouterSpec, slots: int = 0, steering: tuple[Any, Any] = (None, None)
) -> Routing:
    if is_torch(logits):
        routed = _operations().route(logits, spec, slots, steering)
    else:
        routed = _engine_route.route(logits, spec, slots, steering, current())
    routing = Routing(
        routed.scores.reshape(-1), routed.ids.reshape(-1), logits.shape[0], router=spec
    )
    if spec.fixed_top_k():
        routing.top_k = spec.top_k
    else:
        routing.token_offsets, routing.report = routed.token_offsets, routed.report
        if routed.plan is not None:
            routing.plan = HandedPlan.of(routed.plan, routing.ids, routing.token_offsets)
    return routing


def _operations() -> Any:
    from penstock import _torch_operations

    return _torch_operations.operations()
