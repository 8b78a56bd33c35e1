# SPDX-License-Identifier: Apache-2.0
"""patch() and unpatch(): put the engine in the place of a model's experts, and take it out again.

A patched module keeps its class, its parameters and their names: it only gains an attribute
`forward` of its own, which unpatch() deletes. So checkpoints, optimisers, PEFT, FSDP and hooks see
the same module as before. Lists of experts are brought together only where `convert` names them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from penstock.errors import invalid
from penstock.hf._convert import (
    Conversion,
    Converter,
    conversion_of,
    converted_forward,
    forget_conversion,
    remember_conversion,
)
from penstock.hf._experts import experts_forward, forget, remember
from penstock.hf._freeze import forget_frozen, frozen_ids, set_frozen
from penstock.hf._lists import FusedList, experts_in, read_list
from penstock.hf._lora import adapted_forward, wrappers_of
from penstock.hf._structure import Refusal, find_experts, read_layout


class Row(NamedTuple):
    """What became of one experts module."""

    name: str
    kind: str  # the module's class
    experts: int  # 0 where unknown
    replaced: bool
    detail: str  # the layout, or the reason of the refusal
    moved: int = 0  # bytes of weights that a conversion has moved into fused tensors


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
        moved = sum(row.moved for row in self.rows)
        weights = f"{moved / 2**20:,.1f} MiB of weights moved" if moved else "no weights copied"
        total = f"{len(self.replaced)} of {len(self.rows)} replaced, {weights}"
        return "\n".join([*lines, total])


def patch(
    model: nn.Module,
    *,
    convert: Mapping[str, Converter] | None = None,
    frozen: Mapping[str, Sequence[int]] | None = None,
) -> Report:
    """Compute the experts of every MoE block of `model` with the engine, in place.

    model: a transformers model (5.14 or newer) or any module that contains such experts. Blocks are
    found by their structure. Weights are neither copied nor moved: the modules keep their fused
    3-D parameters. Routers, shared experts and auxiliary losses stay as they are. Experts adapted
    by PEFT (LoraConfig.target_parameters) are found in their wrappers: patch after get_peft_model.

    convert: by the name of a class whose modules hold a list of experts (its child `experts`, or
    itself), the function that takes the place of their forward: converter(module, experts, *args,
    **kwargs), where experts(hidden_states (..., d), top_k_index (T, K), top_k_weights (T, K)) is
    all experts at once. penstock.hf.CONVERTERS has those of transformers 5. The weights move, once,
    into one tensor of which the experts' parameters become views; the report says how much.
    frozen: ids of experts that get no gradient work, by the name of their module in the report, or
    a pattern of names ("*"); their slices of a fresh gradient are zeros. Those of the latest call
    hold. In a converted list, experts whose parameters want no gradient are frozen besides.

    Returns a Report of what was replaced and what was refused, with reasons. Patching twice is
    patching once. ValueError where the model has no experts at all, and where `frozen` names
    modules or experts that are not there.
    """
    converters = _converters_in(model) | dict(convert or {})
    found = dict(find_experts(model, converters))
    if not found:
        raise invalid(
            "model",
            f"{type(model).__name__} without experts",
            "a model with Mixture-of-Experts blocks",
            "Check that it is the MoE variant of its family",
        )
    inner = {name: _without_wrappers(module) for name, module in found.items()}
    counts = {name: _num_experts(module) for name, module in inner.items()}
    ids = frozen_ids(counts, frozen or {})
    rows = []
    for name, module in inner.items():
        row = Row(name, type(module).__name__, counts[name], False, "")
        if row.kind in converters:
            row = _convert(module, converters[row.kind], row)
        else:
            row = _replace(found[name], row)
        if row.replaced:
            set_frozen(module, row.experts, ids[name])
            if ids[name]:
                row = row._replace(detail=f"{row.detail}, {len(ids[name])} frozen")
        rows.append(row)
    return Report(rows)


def _replace(outermost: nn.Module, row: Row) -> Row:
    """Patch fused experts, inside PEFT's wrappers or not."""
    module, wrappers = _without_wrappers(outermost), wrappers_of(outermost)
    layout = read_layout(module)
    if isinstance(layout, Refusal):
        return row._replace(detail=layout.reason)
    remember(module, layout)
    module.forward = functools.partial(experts_forward, module)
    detail = layout.describe()
    if wrappers:
        outermost.forward = functools.partial(adapted_forward, outermost)
        detail += ", LoRA on " + " and ".join(w.parameter_name for w in wrappers)
    return row._replace(replaced=True, detail=detail)


def _convert(module: nn.Module, converter: Converter, row: Row) -> Row:
    """Patch a module that holds a list of experts; one that is together stays as it lies."""
    experts, before = experts_in(module), conversion_of(module)
    how = read_list(experts)
    if isinstance(how, Refusal):
        return row._replace(detail=how.reason)
    if before is not None and before.weights.is_whole():
        weights, moved = before.weights, 0
    else:
        weights = FusedList(experts, how)
        moved = weights.nbytes
    remember_conversion(module, Conversion(weights, converter))
    module.forward = functools.partial(converted_forward, module)
    detail = f"{how.layout.describe()}, from a list"
    return row._replace(replaced=True, detail=detail, moved=moved)


def _converters_in(model: nn.Module) -> dict[str, Converter]:
    """The converters of what earlier calls have converted."""
    found = ((type(module).__name__, conversion_of(module)) for module in model.modules())
    return {kind: conversion.converter for kind, conversion in found if conversion is not None}


def _without_wrappers(module: nn.Module) -> nn.Module:
    wrappers = wrappers_of(module)
    return wrappers[-1].base_layer if wrappers else module


def unpatch(model: nn.Module) -> int:
    """Give every patched module its own forward back; returns how many there were.

    An experts module and PEFT's wrapper around it are two. Weights that a conversion has moved stay
    where they are.
    """
    patched = [module for module in model.modules() if _is_patched(module)]
    for module in patched:
        del module.__dict__["forward"]
        forget_frozen(module)
        forget(module)
        forget_conversion(module)
    return len(patched)


def _is_patched(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    ours = (experts_forward, adapted_forward, converted_forward)
    return isinstance(forward, functools.partial) and forward.func in ours


def _num_experts(module: nn.Module) -> int:
    fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return fused[0].shape[0] if fused else len(list(experts_in(module).children()))
