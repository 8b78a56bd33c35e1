# SPDX-License-Identifier: Apache-2.0
"""patch() and unpatch(): put the engine in the place of a model's experts, and take it out again.

A patched module keeps its class, its parameters and their names: it only gains an attribute
`forward` of its own, which unpatch() deletes. So checkpoints, optimisers, PEFT, FSDP and hooks see
the same module as before.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import nn

from penstock.errors import invalid
from penstock.hf._experts import experts_forward, forget, remember
from penstock.hf._lora import adapted_forward, wrappers_of
from penstock.hf._structure import Refusal, find_experts, read_layout


class Row(NamedTuple):
    """What became of one experts module."""

    name: str
    kind: str  # the module's class
    experts: int  # 0 where unknown
    replaced: bool
    detail: str  # the layout, or the reason of the refusal


class Report:
    """What patch() replaced and what it refused; print it for a table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def replaced(self) -> list[Row]:
        """The modules whose computation is now the engine's."""
        return [row for row in self.rows if row.replaced]

    @property
    def refused(self) -> list[Row]:
        """The modules that were left as they are; `detail` says why."""
        return [row for row in self.rows if not row.replaced]

    def __repr__(self) -> str:
        """A table, one line a module."""
        head = ("module", "class", "experts", "", "how, or why not")
        body = [
            (r.name, r.kind, str(r.experts or "?"), "ours" if r.replaced else "left", r.detail)
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *body)
        ]
        total = f"{len(self.replaced)} of {len(self.rows)} replaced, no weights copied"
        return "\n".join([*lines, total])


def patch(model: nn.Module) -> Report:
    """Compute the experts of every MoE block of `model` with the engine, in place.

    model: a transformers model (5.14 or newer) or any module that contains such experts. Blocks are
    found by their structure. Weights are neither copied nor moved: the modules keep their fused
    3-D parameters. Routers, shared experts and auxiliary losses stay as they are. Experts adapted
    by PEFT (LoraConfig.target_parameters) are found in their wrappers: patch after get_peft_model.
    Returns a Report of what was replaced and what was refused, with reasons. Patching twice is
    patching once. ValueError where the model has no experts at all.
    """
    rows = []
    for name, outermost in find_experts(model):
        wrappers = wrappers_of(outermost)
        module = wrappers[-1].base_layer if wrappers else outermost
        layout = read_layout(module)
        kind, experts = type(module).__name__, _num_experts(module)
        if isinstance(layout, Refusal):
            rows.append(Row(name, kind, experts, False, layout.reason))
            continue
        remember(module, layout)
        module.forward = functools.partial(experts_forward, module)
        detail = layout.describe()
        if wrappers:
            outermost.forward = functools.partial(adapted_forward, outermost)
            detail += ", LoRA on " + " and ".join(w.parameter_name for w in wrappers)
        rows.append(Row(name, kind, experts, True, detail))
    if not rows:
        raise invalid(
            "model",
            f"{type(model).__name__} without experts",
            "a model with Mixture-of-Experts blocks",
            "Check that it is the MoE variant of its family",
        )
    return Report(rows)


def unpatch(model: nn.Module) -> int:
    """Give every patched module its own forward back; returns how many there were.

    An experts module and PEFT's wrapper around it are two.
    """
    patched = [module for module in model.modules() if _is_patched(module)]
    for module in patched:
        del module.__dict__["forward"]
        forget(module)
    return len(patched)


def _is_patched(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    ours = (experts_forward, adapted_forward)
    return isinstance(forward, functools.partial) and forward.func in ours


def _num_experts(module: nn.Module) -> int:
    fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return fused[0].shape[0] if fused else len(list(module.children()))
