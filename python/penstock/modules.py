# SPDX-License-Identifier: Apache-2.0
"""penstock.Experts and penstock.MoE: the engine as torch modules.

Parameters are plain and named as in the functions: experts.w1 (E, h, d), experts.w2 (E, d, n),
biases b1 (E, h) and b2 (E, d), router.weight (E, d). No state beside them but layer.stats, which is
left out of copies and pickles.

Under torch.autocast the modules cast, the functions never do: x and the experts' weights to the
autocast dtype, router logits in fp32. Without autocast, x and the weights must have one dtype,
except that the router's weight may be wider (fp32 router in a bf16 layer): x is then widened for
the logits alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from penstock import functional, routers
from penstock._engine import GATED, Plan
from penstock.balance import recomputing
from penstock.errors import invalid
from penstock.routing import Routing
from penstock.stats import MoEStats
from penstock.tape import RoutingTape

ACTIVATIONS = (*GATED, "silu", "gelu", "gelu_tanh", "relu", "relu_squared")
GATE_LAYOUTS = ("concatenated", "interleaved")
SAVE_POLICIES = ("preactivation", "input", "nothing")
ORDERS = ("fast", "low_memory")


class Experts(nn.Module):
    """E experts, each act(x W1^T + b1) W2^T + b2, for a routing that the caller brings.

    hidden_size d, intermediate_size n, num_experts E; activation, gate_layout, save and order as
    in functional.moe_experts. w1 (E, h, d) with h = 2n for a gated activation, w2 (E, d, n); with
    bias=True b1 (E, h), b2 (E, d). main_grad=True: gradients of parameters that carry an attribute
    `main_grad` are added there and autograd gets none for them (Megatron's habit). Initialised as
    torch.nn.Linear: uniform within 1 / sqrt(fan_in). ValueError for a value out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate_layout: str = "concatenated",
        save: str = "preactivation",
        order: str = "fast",
        clamp_alpha: float = 1.702,
        clamp_limit: float = 7.0,
        main_grad: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(
            hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts
        )
        _check_choice("activation", activation, ACTIVATIONS)
        _check_choice("gate_layout", gate_layout, GATE_LAYOUTS)
        _check_choice("save", save, SAVE_POLICIES)
        _check_choice("order", order, ORDERS)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.activation = activation
        self.gate_layout = gate_layout
        self.save = save
        self.order = order
        self.clamp_alpha = clamp_alpha
        self.clamp_limit = clamp_limit
        self.main_grad = main_grad
        h = intermediate_size * (2 if activation in GATED else 1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1 = parameter(num_experts, h, hidden_size)
        self.w2 = parameter(num_experts, hidden_size, intermediate_size)
        self.b1 = parameter(num_experts, h) if bias else None
        self.b2 = parameter(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's random number generator."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1.0 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(
        self, x: Tensor, scores: Any, ids: Tensor | None = None, *, plan: Plan | None = None
    ) -> Tensor:
        """O (..., d) of x (..., d) for scores and ids (T, K), or a Routing, T = number of rows.

        plan: functional.plan of the same routing, where the caller has it already.
        """
        dtype = _autocast_dtype(x)
        rows = x.reshape(-1, self.hidden_size)
        if dtype is not None:
            rows = _cast(rows, dtype)
        output = functional.moe_experts(
            rows,
            *self.weights(dtype),
            scores,
            ids,
            plan=plan,
            order=self.order,
            **self.settings(dtype),
        )
        return output.reshape(x.shape)

    def forward_rows(
        self, rows: Tensor, expert_counts: Tensor, expert_offsets: Tensor | None = None
    ) -> Tensor:
        """functional.experts_on_rows with this module's weights: rows (R_cap, d) to (R_cap, d)."""
        dtype = _autocast_dtype(rows)
        if dtype is not None:
            rows = _cast(rows, dtype)
        return functional.experts_on_rows(
            rows, *self.weights(dtype), expert_counts, expert_offsets, **self.settings(dtype)
        )

    def weights(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """w1 and w2, cast to `dtype` where one is given."""
        return _cast(self.w1, dtype), _cast(self.w2, dtype)

    def settings(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The keyword arguments of the functions: biases, cast to `dtype`, and settings."""
        return {
            "b1": None if self.b1 is None else _cast(self.b1, dtype),
            "b2": None if self.b2 is None else _cast(self.b2, dtype),
            "activation": self.activation,
            "gate_layout": self.gate_layout,
            "save": self.save,
            "clamp_alpha": self.clamp_alpha,
            "clamp_limit": self.clamp_limit,
            "main_grad": self.main_grad,
        }

    def extra_repr(self) -> str:
        """The sizes and settings, for print(module)."""
        return (
            f"{self.hidden_size}, {self.intermediate_size}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, bias={self.b1 is not None}, "
            f"gate_layout={self.gate_layout!r}, save={self.save!r}"
        )


class Router(nn.Module):
    """The router's weight (E, d), a projection without bias; the choice is functional.route's.

    With balanced=True two buffers besides: score_bias (E), which steers the choice of sigmoid_topk
    and belongs to the state dict, and load (E) int64, the rows of each expert in training since
    penstock.balance.update_bias last read them. score_bias stays fp32 or wider whatever the
    module is cast to: its steps are smaller than half precision resolves.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, device: Any, dtype: Any, *, balanced: bool = False
    ) -> None:
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = torch.zeros(num_experts, device=device, dtype=wide) if balanced else None
        load = torch.zeros(num_experts, device=device, dtype=torch.int64) if balanced else None
        self.register_buffer("score_bias", bias)
        self.register_buffer("load", load, persistent=False)
        self.weight = nn.Parameter(
            torch.empty((num_experts, hidden_size), device=device, dtype=dtype)
        )
        self.reset_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Move and cast, except that the bias is never narrowed."""
        bias = self.score_bias
        super()._apply(fn, recurse)
        if bias is not None and self.score_bias.dtype not in (torch.float32, torch.float64):
            self.score_bias = bias.to(self.score_bias.device)
        return self

    def count(self, expert_counts: Tensor) -> None:
        """Add a training call's rows to the load; a recomputation in backward counts nothing."""
        if self.load is not None and self.training and not recomputing():
            self.load += expert_counts

    def reset_parameters(self) -> None:
        """Draw the weight anew, as torch.nn.Linear does."""
        bound = 1.0 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, gives: str = "logits") -> Any:
        """Logits (T, E) of x (T, d), in fp32 (float64 for float64).

        gives: "logits", or "logits_and_x" for both, where x is for its other uses: their gradient
        is then summed with that of the logits in one product, if x and the weight are of one dtype.
        """
        if _autocast_dtype(x) is not None:
            dtype = torch.float32
        else:
            dtype = torch.promote_types(x.dtype, self.weight.dtype)
            if dtype != self.weight.dtype:
                raise invalid(
                    "dtype of router.weight",
                    self.weight.dtype,
                    f"{x.dtype}, the dtype of x, or wider",
                    "Convert the layer with .to(dtype), or use torch.autocast",
                )
        weight = _cast(self.weight, dtype)
        if gives == "logits_and_x" and x.dtype == dtype:
            return functional.logits_and_input(x, weight)
        logits = functional.router_logits(_cast(x, dtype), weight)
        return (logits, x) if gives == "logits_and_x" else logits

    def extra_repr(self) -> str:
        """The sizes, for print(module)."""
        return f"{self.weight.shape[1]}, num_experts={self.weight.shape[0]}"


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, experts, and optionally one expert that all tokens share.

    y = sum over the top_k experts of S_e expert_e(x), plus shared_expert(x) where
    shared_intermediate_size > 0. x (..., d), y alike (autocast's dtype under autocast).

    router: the name of one of penstock.routers, with its options in router_options. Under
    token_rounding the layer chooses a plain top K in evaluation, with the same scores. Under
    sigmoid_topk the layer has a bias, layer.router.score_bias, that penstock.balance keeps up.
    activation, bias, gate_layout, save, order, clamp_alpha, clamp_limit, main_grad: see Experts.
    After a call, layer.stats has loads, idle_experts and the losses aux_loss (Switch Transformer,
    arXiv 2101.03961), z_loss (ST-MoE, arXiv 2202.08906) and total_loss, which weighs the two by
    aux_loss_coef and z_loss_coef. The layer adds none of them by itself.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate_layout: str = "concatenated",
        router: str = "softmax_topk",
        router_options: dict[str, Any] | None = None,
        save: str = "preactivation",
        order: str = "fast",
        shared_intermediate_size: int = 0,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        clamp_alpha: float = 1.702,
        clamp_limit: float = 7.0,
        main_grad: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(
            hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts
        )
        if not 1 <= top_k <= num_experts:
            raise invalid(
                "top_k", top_k, f"1 to num_experts = {num_experts}", "Choose within the experts"
            )
        if shared_intermediate_size < 0:
            raise invalid(
                "shared_intermediate_size",
                shared_intermediate_size,
                "0 (no shared expert) or more",
                "Pass the shared expert's size",
            )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.router_kind = router
        self.router_options = dict(router_options or {})
        _check_router(router, self.router_options)
        self.loss_coefficients = (float(aux_loss_coef), float(z_loss_coef))
        settings: dict[str, Any] = {
            "activation": activation,
            "bias": bias,
            "gate_layout": gate_layout,
            "save": save,
            "order": order,
            "clamp_alpha": clamp_alpha,
            "clamp_limit": clamp_limit,
            "main_grad": main_grad,
            "device": device,
            "dtype": dtype,
        }
        balanced = router == "sigmoid_topk"
        self.router = Router(hidden_size, num_experts, device, dtype, balanced=balanced)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, **settings)
        self.shared_expert = (
            Experts(hidden_size, shared_intermediate_size, 1, **settings)
            if shared_intermediate_size > 0
            else None
        )
        self.stats: MoEStats | None = None
        self.tape: RoutingTape | None = None  # set by penstock.RoutingTape for a block

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x (..., d), the same shape."""
        if x.shape[-1] != self.hidden_size:
            raise invalid(
                "x",
                f"shape {tuple(x.shape)}",
                f"(..., {self.hidden_size}), the layer's hidden_size last",
                "Check the layer that made x",
            )
        # The last call's logits hold its graph, and a graph binds the parameters' gradients to the
        # stream of its call: let go of before this call starts, which may be on another stream.
        # What was counted stays, for a recomputation that checkpointing ends half-way.
        if not torch.compiler.is_compiling() and self.stats is not None:
            self.stats = self.stats.detached()
        rows = x.reshape(-1, self.hidden_size)
        logits, rows = self.router(rows, gives="logits_and_x")
        routing = self._routing(logits)
        plan = functional.plan(routing, self.num_experts)
        y = self.experts(rows, routing, plan=plan)
        self.router.count(plan.expert_counts)
        self.stats = MoEStats(logits, plan.expert_counts, self.loss_coefficients, routing)
        if self.shared_expert is not None:
            everyone = torch.full((1,), rows.shape[0], dtype=torch.int32, device=x.device)
            y = y + self.shared_expert.forward_rows(rows, everyone)
        return y.reshape(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Routing]:
        """Logits (T, E) and the routing of rows (T, d)."""
        logits = self.router(rows)
        return logits, self._routing(logits)

    def _routing(self, logits: Tensor) -> Routing:
        if self.tape is not None:
            return self.tape.routing(self, logits)
        return self.choose(logits)

    def choose(self, logits: Tensor) -> Routing:
        """The routing of logits (T, E) by the layer's router, in its mode."""
        name, options = self.router_kind, self.router_options
        if name == "token_rounding" and not self.training:
            renormalize = options.get("renormalize", True)
            return routers.topk_softmax(logits, self.top_k, renormalize=renormalize)
        if self.router.score_bias is not None:
            options = {**options, "bias": self.router.score_bias.to(logits.dtype)}
        return functional.route(logits, self.top_k, router=name, **options)

    def extra_repr(self) -> str:
        """The settings that no child shows, for print(module)."""
        options = "".join(f", {name}={value!r}" for name, value in self.router_options.items())
        return f"top_k={self.top_k}, router={self.router_kind!r}{options}"

    def __getstate__(self) -> dict[str, Any]:
        """The module's state without stats, whose tensors belong to one call's graph."""
        return {**self.__dict__, "stats": None, "tape": None}


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to cast to, or None outside autocast. Autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise invalid(name, size, "1 or more", "Pass the layer's size")


def _check_router(router: str, options: dict[str, Any]) -> None:
    routers.check_options(router, options)
    if "bias" in options:
        raise invalid(
            "router_options",
            "a bias",
            "the other options: the layer has a bias of its own",
            "Write to layer.router.score_bias",
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise invalid(name, repr(value), "one of " + ", ".join(choices), "Check the spelling")
