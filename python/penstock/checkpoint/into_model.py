# SPDX-License-Identifier: Apache-2.0
"""load(): a checkpoint's bytes into the parameters and buffers of a model that exists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from penstock.checkpoint.errors import CheckpointError, some_of
from penstock.checkpoint.folder import Checkpoint
from penstock.checkpoint.layouts import (
    Target,
    as_it_is,
    fuse,
    has_fused,
    has_per_expert,
    split,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Mixtral's checkpoints call the block otherwise than transformers 5 does.
RENAMES = {"block_sparse_moe.": "mlp."}


def load(
    model: nn.Module, source: str | Path | Checkpoint, *, renames: Mapping[str, str] | None = None
) -> list[str]:
    """Fill every parameter and persistent buffer of `model` from the checkpoint `source`.

    source: a folder of safetensors shards with their index, or one file; experts fused or one by
    one, whichever the model has not is converted on the way. Tensors go from the memory map into
    the model's own storage, one at a time, and must have its shapes and dtypes. renames: parts of
    the checkpoint's names and what the model calls them, used where the model does not know the
    name as it is (by default Mixtral's block_sparse_moe is mlp). Tied tensors are filled by either
    name. Returns the names that were filled. CheckpointError (a ValueError), with the names and
    before any tensor is changed: something is missing, left over or there twice, or differs in
    shape or dtype.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    held = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    targets = _renamed(_laid_out(checkpoint, held), held, RENAMES if renames is None else renames)
    _check(targets, held)
    for name, target in targets.items():
        _fill(held[name], target, checkpoint)
    return sorted(targets)


def _laid_out(checkpoint: Checkpoint, held: Mapping[str, Tensor]) -> dict[str, Target]:
    """The checkpoint's tensors in the layout of the model's experts."""
    if has_per_expert(checkpoint.tensors) and has_fused(held):
        return fuse(checkpoint)
    if has_fused(checkpoint.tensors) and has_per_expert(held):
        mixtral = any(name.endswith(".w1.weight") for name in held)
        return split(checkpoint, "mixtral" if mixtral else "mlp")
    return as_it_is(checkpoint)


def _renamed(
    targets: dict[str, Target], held: Mapping[str, Tensor], renames: Mapping[str, str]
) -> dict[str, Target]:
    result: dict[str, Target] = {}
    for name, target in targets.items():
        new_name = name
        for theirs, ours in renames.items():
            if new_name not in held:
                new_name = new_name.replace(theirs, ours)
        if new_name in result:
            raise CheckpointError(
                f"tensor {new_name} of the model", got="two tensors of the checkpoint for it",
                expected="one", remedy="Check the renames",
            )  # fmt: skip
        result[new_name] = target
    return result


def _check(targets: dict[str, Target], held: Mapping[str, Tensor]) -> None:
    left_over = targets.keys() - held.keys()
    if left_over:
        raise CheckpointError(
            "the checkpoint", got=f"{some_of(left_over)}, which the model lacks",
            expected="a place for every tensor",
            remedy="Build the model from the checkpoint's configuration, or pass renames",
        )  # fmt: skip
    filled: dict[object, str] = {}
    for name, target in targets.items():
        tensor = held[name]
        _check_one(name, target, tensor)
        if _memory(name, tensor) in filled:
            raise CheckpointError(
                "tied tensors", got=f"both {filled[_memory(name, tensor)]} and {name}",
                expected="one of them, for they share their memory",
                remedy="Untie them in the configuration, or drop one from the checkpoint",
            )  # fmt: skip
        filled[_memory(name, tensor)] = name
    missing = {name for name, tensor in held.items() if _memory(name, tensor) not in filled}
    if missing:
        raise CheckpointError(
            "the checkpoint", got=f"nothing for {some_of(missing)}",
            expected="a tensor for every parameter and buffer of the model",
            remedy="Get the complete checkpoint, or pass renames",
        )  # fmt: skip


def _check_one(name: str, target: Target, tensor: Tensor) -> None:
    dtype = DTYPES.get(target.dtype)
    if (dtype, target.shape) != (tensor.dtype, tuple(tensor.shape)):
        raise CheckpointError(
            f"tensor {name}", got=f"{target.dtype} {list(target.shape)}",
            expected=f"{tensor.dtype} {list(tensor.shape)}, as the model has",
            remedy="Build the model with the checkpoint's sizes and convert it with .to(dtype)",
        )  # fmt: skip
    if tensor.is_meta:
        raise CheckpointError(
            f"tensor {name}", got="a model on the meta device", expected="a model with memory",
            remedy="Call model.to_empty(device=...) first",
        )  # fmt: skip


def _memory(name: str, tensor: Tensor) -> object:
    """What identifies the elements; tensors without elements stand for themselves."""
    if tensor.numel() == 0 or tensor.is_meta:
        return name
    return (tensor.device, tensor.data_ptr(), tuple(tensor.stride()))


def _fill(tensor: Tensor, target: Target, checkpoint: Checkpoint) -> None:
    """Copy the pieces: straight into host memory, or through it for other devices and strides."""
    direct = tensor.device.type == "cpu" and tensor.is_contiguous()
    staged = tensor if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
    view = staged.reshape(-1).view(torch.uint8).numpy()
    position = 0
    for piece in target.pieces:
        data = checkpoint.bytes_of(piece.source)[piece.start : piece.end]
        view[position : position + len(data)] = np.frombuffer(data, np.uint8)
        position += len(data)
    if not direct:
        tensor.copy_(staged)
