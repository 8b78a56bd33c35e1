# SPDX-License-Identifier: Apache-2.0
"""One product for every expert: the rows of an expert times its matrix, in one of two ways.

grouped_product is torch's grouped matrix product, loop_product one torch.matmul an expert. Which
of the two a call takes is why_not_grouped's answer, and no setting's: the grouped one wherever
torch has it for the device, the dtype and the strides. Both are differentiable and sum as torch's
products do. What they return for rows past the last expert's end is undefined: the caller masks.

Shapes: R rows, E experts; matrices (E, inner, outer) may lie in any order of their last two axes.
Called by forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16  # of torch's grouped product, in every stride and at the start


def product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """(R, outer): rows (R, inner) of expert e times matrices[e].

    ends (E) int32: where each expert's rows end; the next expert's begin there, the first's at 0.
    """
    if why_not_grouped(rows, matrices):
        return loop_product(rows, matrices, ends)
    return grouped_product(rows, matrices, ends)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped product; the ends stay on the device."""
    grouped_mm = _grouped_mm()
    return grouped_mm(rows, matrices, offs=ends)


def loop_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """One product after another; the host waits for the ends.

    The matrices are unbound once, so that backward stacks the experts' gradients once instead of
    adding E tensors of the size of all of them.
    """
    bounds = [0, *ends.tolist()]
    sizes = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    *groups, rest = rows.split([*sizes, rows.shape[0] - bounds[-1]])
    products = [group @ matrix for group, matrix in zip(groups, matrices.unbind(0), strict=True)]
    return torch.cat([*products, rest.new_zeros((rest.shape[0], matrices.shape[2]))])


def why_not_grouped(rows: Tensor, matrices: Tensor) -> str:
    """Why torch's grouped product cannot take these tensors; empty if it can."""
    elements = ALIGNMENT_BYTES // rows.element_size()
    if rows.shape[0] == 0:
        return "there are no rows"
    if any(size % elements for size in matrices.shape[1:]):
        return f"sizes {tuple(matrices.shape[1:])} are not multiples of {elements}"
    strides = (*rows.stride()[:1], *matrices.stride())
    if any(stride % elements for stride in strides if stride != 1):
        return f"strides {strides} are not multiples of {elements}"
    # The compiler cannot read where a tensor begins; the rows are always new ones.
    if not torch.compiler.is_compiling() and matrices.storage_offset() % elements:
        return f"the matrices do not begin at a multiple of {ALIGNMENT_BYTES} bytes"
    return why_torch_cannot(rows.dtype, rows.device.type, rows.device.index or 0)


@torch.compiler.assume_constant_result
def why_torch_cannot(dtype: torch.dtype, device_type: str, index: int) -> str:
    """torch's own words, where its grouped product of 32 numbers a row fails; empty if it works.

    Tried once a dtype and device, forward and backward: which of them torch has differs from
    version to version, and it does not say so otherwise.
    """
    return _tried(dtype, device_type, index)


@lru_cache
def _tried(dtype: torch.dtype, device_type: str, index: int) -> str:
    if _grouped_mm() is None:
        return f"torch {torch.__version__} has no grouped product"
    device = torch.device(device_type) if device_type == "cpu" else f"{device_type}:{index}"
    with torch.inference_mode(False), torch.enable_grad():
        rows = torch.ones((32, 32), dtype=dtype, device=device, requires_grad=True)
        matrices = torch.ones((2, 32, 32), dtype=dtype, device=device, requires_grad=True)
        ends = torch.full((2,), 16, dtype=torch.int32, device=device)
        try:
            result = grouped_product(rows, matrices.transpose(1, 2), ends)
            torch.autograd.grad(result, (rows, matrices), torch.ones_like(result))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    return ""


def _grouped_mm() -> Callable[..., Any] | None:
    """torch's grouped product under its name in this version; None where there is none."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public or getattr(torch, "_grouped_mm", None)
