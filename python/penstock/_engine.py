# SPDX-License-Identifier: Apache-2.0
"""One Python function for each pass of the engine, for NumPy arrays and torch tensors alike.

Each allocates its outputs and its workspace, hands everything to the library, and returns the
outputs. What is wrong with the tensors' shapes is the core's to say; here is checked only what
allocating the outputs needs, and what the core cannot name (a dtype's cure, two devices).
Called by functional.py and _torch_ops.py. Nothing here knows of gradients or of torch operators.

Shapes: T tokens, d hidden, n intermediate, h = 2n gated or n, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock._arrays import TorchArrays, arrays_of
from penstock._context import TORCH, CallContext, torch_refusal
from penstock._library import library
from penstock._memory import workspace
from penstock._ranges import ranged
from penstock.errors import invalid

GATED = ("swiglu", "geglu", "reglu", "swiglu_clamped")


class Config(NamedTuple):
    """The experts' settings, in the order in which the library takes them."""

    activation: str = "swiglu"
    gate_layout: str = "concatenated"
    weight_order: str = "output_major"
    save: str = "preactivation"
    clamp_alpha: float = 1.702
    clamp_limit: float = 7.0
    order: str = "fast"  # or "low_memory"
    kept_h: str = "preserved"  # by a backward pass, or "overwritten"

    def pack(self) -> str:
        """The names in one string, which an operator's schema can carry."""
        return ",".join((*self[:4], *self[6:]))

    @property
    def clamp(self) -> list[float]:
        """The numbers; apart from the names because torch.compile may hold them as symbols."""
        return [self.clamp_alpha, self.clamp_limit]

    @staticmethod
    def unpack(packed: str, clamp: list[float]) -> Config:
        """The inverse of pack and clamp."""
        names = packed.split(",")
        return Config(*names[:4], *clamp, *names[4:])

    @property
    def halves(self) -> int:
        """Up-projections: 2 with a gate, 1 without."""
        return 2 if self.activation in GATED else 1


class Weights(NamedTuple):
    """The experts' weights, or their gradients; None is absent. Shapes for output_major."""

    w1: Any  # (E, h, d), or (E, n, d) with w1_up
    w1_up: Any = None  # (E, n, d)
    w2: Any = None  # (E, d, n)
    b1: Any = None  # (E, h), or (E, n) with b1_up
    b1_up: Any = None  # (E, n)
    b2: Any = None  # (E, d)


class Plan(NamedTuple):
    """The RoutingPlan's int32 arrays; None is absent. Rows are sorted by expert, then by slot."""

    expert_counts: Any  # (E)
    expert_offsets: Any  # (E+1) exclusive, with a leading 0
    row_to_token: Any = None  # (R_cap)
    row_to_slot: Any = None  # (R_cap)
    slot_to_row: Any = None  # (slots), -1: skipped
    token_offsets: Any = None  # (T+1), only where tokens have differing numbers of experts
    top_k: int = 0  # 0 with token_offsets, or for rows already dispatched

    @property
    def dispatched(self) -> bool:
        """Whether the rows come sorted by expert already, so that there are no maps."""
        return self.row_to_token is None

    def row_capacity(self, num_tokens: int) -> int:
        """R_cap, for x of num_tokens rows: those of x where they are already dispatched."""
        return num_tokens if self.dispatched else self.row_to_token.shape[0]


class Problem(NamedTuple):
    """What sizes depend on, in the order in which the library takes it."""

    num_tokens: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_experts: int = 0
    num_slots: int = 0
    row_capacity: int = 0
    dtype: str = "float32"
    device_type: str = "cpu"
    device_index: int = 0
    rows: str = "routed"


def accumulator(dtype: str) -> str:
    """The dtype in which scores, logits and dS are kept for tensors of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


def call_tuple(context: CallContext, like: Any) -> tuple[Any, ...]:
    """The context as the library takes it; UnsupportedError where no backend of it is chosen."""
    if context.backend == TORCH:
        raise torch_refusal(
            "a pass of the engine",
            "NumPy arrays, or code that torch compiled outside the block",
            "Pass torch tensors, and compile inside the block, with a torch whose compiler reads "
            "context variables (2.15 does)",
        )
    arrays = arrays_of(like)
    return (
        context.backend,
        context.threads,
        arrays.stream(like),
        context.sm_budget,
        context.id_checks,
        arrays.uint16_as(like),
    )


def problem_of(x: Any, weights: Weights, plan: Plan, config: Config) -> Problem:
    """The problem of a call, by the shapes of its tensors."""
    check_rank("x", x, 2, "(num_tokens, hidden_size)")
    check_rank("w1", weights.w1, 3, "(num_experts, rows, columns)")
    check_rank("w2", weights.w2, 3, "(num_experts, rows, columns)")
    arrays = arrays_of(x)
    num_tokens, hidden_size = x.shape
    return Problem(
        num_tokens,
        hidden_size,
        weights.w2.shape[2 if config.weight_order == "output_major" else 1],
        weights.w1.shape[0],
        0 if plan.dispatched else plan.slot_to_row.shape[0],
        plan.row_capacity(num_tokens),
        arrays.dtype_name(x),
        *arrays.device(x),
        "dispatched" if plan.dispatched else "routed",
    )


@ranged
def router_logits(x: Any, weight: Any, context: CallContext) -> Any:
    """Logits (T, E) = x (T, d) times weight (E, d) transposed, in fp32 (float64 for float64)."""
    problem = _router_problem(x, weight)
    arrays = arrays_of(x)
    call = call_tuple(context, x)
    logits = arrays.empty((x.shape[0], weight.shape[0]), accumulator(problem.dtype), x)
    scratch = workspace(library().router_workspace_bytes(call, problem), x)
    library().router_logits(call, pass_on(x, x, weight, logits, scratch))
    return logits


@ranged
def router_logits_backward(
    dlogits: Any,
    x: Any,
    weight: Any,
    wanted: tuple[bool, bool],
    addend: Any,
    context: CallContext,
) -> tuple[Any, Any]:
    """Gradients of x and of the router's weight, in their dtypes; None for what is not wanted.

    addend (T, d) or None: the gradient of x by its other uses, added to this one before rounding.
    """
    arrays = arrays_of(x)
    problem = _router_problem(x, weight)
    call = call_tuple(context, x)
    dx = arrays.empty(tuple(x.shape), problem.dtype, x) if wanted[0] else None
    dweight = arrays.empty(tuple(weight.shape), problem.dtype, x) if wanted[1] else None
    scratch = workspace(library().router_workspace_bytes(call, problem), x)
    tensors = pass_on(x, dlogits, x, weight, dx, dweight, scratch, addend)
    library().router_logits_backward(call, tensors)
    return dx, dweight


@ranged
def build_plan(ids: Any, token_offsets: Any, shape: tuple[int, int], context: CallContext) -> Plan:
    """The plan of flat ids (slots); `shape` is (num_tokens, num_experts)."""
    num_tokens, num_experts = shape
    check_rank("ids", ids, 1, "(slots,)")
    num_slots = ids.shape[0]
    top_k = slots_per_token(ids, token_offsets, num_tokens)
    arrays = arrays_of(ids)
    plan = empty_plan(ids, token_offsets, num_experts)._replace(top_k=top_k)
    call = call_tuple(context, ids)
    device = arrays.device(ids)
    problem = Problem(0, 0, 0, num_experts, num_slots, num_slots, "float32", *device)
    scratch = workspace(library().plan_workspace_bytes(call, problem), ids)
    tensors = pass_on(ids, None, ids, token_offsets, scratch)
    library().build_plan(call, tensors, num_tokens, plan_arguments(plan))
    return plan


def empty_plan(ids: Any, token_offsets: Any, num_experts: int) -> Plan:
    """The arrays of a plan of flat ids (slots), with nothing in them yet."""
    arrays = arrays_of(ids)
    sizes = (num_experts, num_experts + 1, *(3 * (ids.shape[0],)))
    return Plan(*(arrays.empty((size,), "int32", ids) for size in sizes), token_offsets)


def slots_per_token(ids: Any, token_offsets: Any, num_tokens: int) -> int:
    """K of flat ids (slots), at least 1; 0 with token_offsets. ValueError where there is no K."""
    if token_offsets is not None:
        return 0
    num_slots = ids.shape[0]
    if num_slots % num_tokens if num_tokens else num_slots:
        raise invalid(
            "ids",
            f"{num_slots} slots for {num_tokens} tokens",
            "the same number of slots for every token",
            "Pass token_offsets where tokens have differing numbers of experts",
        )
    return max(num_slots // num_tokens, 1) if num_tokens else 1


@ranged
def experts_forward(
    x: Any, scores: Any, weights: Weights, plan: Plan, config: Config, context: CallContext
) -> tuple[Any, Any]:
    """Output and H: (T, d) and (R_cap, h), or None in place of H unless save is preactivation.

    For rows already dispatched the output is (R_cap, d), and rows in a gap are zeros.
    """
    check_operands(x, weights)
    problem = problem_of(x, weights, plan, config)
    output, h = new_output_and_h(x, problem, config)
    call = call_tuple(context, x)
    scratch = workspace(library().forward_workspace_bytes(call, config, problem), x)
    tensors = pass_on(x, x, scores, h, output, scratch)
    library().experts_forward(call, config, tensors, pass_on(x, *weights), plan_arguments(plan))
    return output, h


def new_output_and_h(x: Any, problem: Problem, config: Config) -> tuple[Any, Any]:
    """What a forward pass fills: (T, d), and (R_cap, h) or None unless save is preactivation.

    Rows in a gap of a receive buffer are never written: an output of dispatched rows starts as
    zeros.
    """
    arrays = arrays_of(x)
    h = None
    if config.save == "preactivation":
        h_size = config.halves * problem.intermediate_size
        h = arrays.empty((problem.row_capacity, h_size), problem.dtype, x)
    allocate = arrays.zeros if problem.rows == "dispatched" else arrays.empty
    return allocate((problem.num_tokens, problem.hidden_size), problem.dtype, x), h


def check_operands(x: Any, weights: Weights) -> None:
    """ValueError unless all floating tensors have one dtype and one device."""
    arrays = arrays_of(x)
    dtype, device = arrays.dtype_name(x), arrays.device(x)
    for name, tensor in weights._asdict().items():
        if tensor is None:
            continue
        if arrays_of(tensor) is not arrays:
            raise invalid(name, type(tensor).__name__, type(x).__name__ + " like x", "Convert it")
        if arrays.device(tensor) != device:
            raise invalid(
                f"device of {name}",
                "{}:{}".format(*arrays.device(tensor)),
                "{}:{}, the device of x".format(*device),
                "Move one to the other's device",
            )
        if arrays.dtype_name(tensor) != dtype:
            raise invalid(
                f"dtype of {name}",
                arrays.dtype_name(tensor),
                f"{dtype}, the dtype of x",
                "Convert one to the other's dtype (penstock never casts silently; the modules cast "
                "under torch.autocast)",
            )


def pass_on(like: Any, *group: Any) -> tuple[Any, ...]:
    """The tensors of one argument group, as the library takes them; all like `like`."""
    arrays = arrays_of(like)
    if arrays is TorchArrays:
        return group
    return tuple(None if array is None else arrays.pass_on(array) for array in group)


def plan_arguments(plan: Plan) -> tuple[Any, int]:
    """The plan as the library takes it; dropped_slots is not wanted, as R_cap covers every slot."""
    return pass_on(plan.expert_counts, *plan[:6], None), plan.top_k


def check_router_operands(x: Any, weight: Any) -> None:
    """ValueError unless both are matrices of one dtype."""
    check_rank("x", x, 2, "(num_tokens, hidden_size)")
    check_rank("router_weight", weight, 2, "(num_experts, hidden_size)")
    arrays = arrays_of(x)
    if arrays.dtype_name(weight) != arrays.dtype_name(x):
        raise invalid(
            "dtype of router_weight",
            arrays.dtype_name(weight),
            f"{arrays.dtype_name(x)}, the dtype of x",
            "Convert one of them; penstock.MoE converts x to the wider of the two",
        )


def _router_problem(x: Any, weight: Any) -> Problem:
    check_router_operands(x, weight)
    arrays = arrays_of(x)
    return Problem(
        num_tokens=x.shape[0],
        hidden_size=x.shape[1],
        num_experts=weight.shape[0],
        dtype=arrays.dtype_name(x),
        device_type=arrays.device(x)[0],
        device_index=arrays.device(x)[1],
    )


def check_rank(name: str, array: Any, rank: int, shape: str) -> None:
    """ValueError unless `array` has `rank` dimensions; `shape` names them."""
    if array.ndim != rank:
        raise invalid(name, f"shape {tuple(array.shape)}", f"{rank} dimensions {shape}", "Reshape")
