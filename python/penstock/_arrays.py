# SPDX-License-Identifier: Apache-2.0
"""The little that the engine's callers need to know about NumPy arrays and torch tensors.

Two classes of static functions with the same names: how to allocate, what the dtype is called, and
to hand the memory to the library. Large memory on the CPU comes from _blocks.py, any other from
NumPy's or torch's allocator. Nothing here computes. Used by _engine.py.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from penstock import _blocks
from penstock.errors import invalid


class NumpyArrays:
    """NumPy, with ml_dtypes for bfloat16 where the caller uses it."""

    @staticmethod
    def dtype_name(array: np.ndarray) -> str:
        """The dtype as the engine calls it."""
        return array.dtype.name

    @staticmethod
    def device(array: np.ndarray) -> tuple[str, int]:
        """Device type and index."""
        return ("cpu", 0)

    @staticmethod
    def stream(array: np.ndarray) -> int:
        """The stream of the launches; none on the CPU."""
        return 0

    @staticmethod
    def _dtype(name: str) -> np.dtype:
        if name == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(name)

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str, like: np.ndarray) -> np.ndarray:
        """An array whose elements are undefined."""
        numpy_dtype = cls._dtype(dtype)
        num_bytes = math.prod(shape) * numpy_dtype.itemsize
        if _blocks.serves(num_bytes):
            return _blocks.cache.take(num_bytes).view(numpy_dtype).reshape(shape)
        return np.empty(shape, numpy_dtype)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str, like: np.ndarray) -> np.ndarray:
        """An array of zeros."""
        return np.zeros(shape, cls._dtype(dtype))

    @staticmethod
    def workspace(num_bytes: int, like: np.ndarray) -> np.ndarray:
        """Scratch memory, aligned as the engine wants it (NumPy aligns to 16 bytes only)."""
        if _blocks.serves(num_bytes):
            return _blocks.cache.take(num_bytes)
        raw = np.empty(num_bytes + _blocks.ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _blocks.ALIGNMENT
        return raw[start : start + num_bytes]

    @staticmethod
    def pass_on(array: np.ndarray | None) -> Any:
        """The argument that the library gets: bfloat16 as bits, read-only as it is."""
        if array is None:
            return None
        if array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        if not array.flags.writeable:
            array = np.asarray(_WriteableAlias(array))
        from penstock._library import import_tvm_ffi

        return import_tvm_ffi().from_dlpack(array)

    @staticmethod
    def uint16_as(array: np.ndarray) -> str:
        """What the library shall take uint16 for."""
        return "bfloat16" if array.dtype.name == "bfloat16" else ""


class _WriteableAlias:
    """The same memory without the read-only mark, which NumPy's DLPack export refuses.

    The engine writes to no input.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


class TorchArrays:
    """torch tensors."""

    @staticmethod
    def dtype_name(tensor: Any) -> str:
        """The dtype as the engine calls it."""
        return str(tensor.dtype).removeprefix("torch.")

    @staticmethod
    def device(tensor: Any) -> tuple[str, int]:
        """Device type and index."""
        return (tensor.device.type, tensor.device.index or 0)

    @staticmethod
    def stream(tensor: Any) -> int:
        """The current stream of the tensor's device, 0 on the CPU."""
        if tensor.device.type != "cuda":
            return 0
        import torch

        return torch.cuda.current_stream(tensor.device).cuda_stream

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A tensor whose elements are undefined."""
        torch_type = torch_dtype(dtype)
        num_bytes = math.prod(shape) * torch_type.itemsize
        if like.device.type == "cpu" and _blocks.serves(num_bytes):
            return _over(_blocks.cache.take(num_bytes), shape, torch_type)
        return _on_large_pages(like.new_empty(shape, dtype=torch_type))

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A tensor of zeros."""
        return like.new_zeros(shape, dtype=torch_dtype(dtype))

    @classmethod
    def workspace(cls, num_bytes: int, like: Any) -> Any:
        """Scratch memory."""
        return cls.empty((num_bytes,), "uint8", like)

    @staticmethod
    def uint16_as(tensor: Any) -> str:
        """Torch has bfloat16: uint16 tensors are refused."""
        return ""


def _over(memory: np.ndarray, shape: tuple[int, ...], dtype: Any) -> Any:
    """A tensor, and no view of one, whose storage is `memory` (bytes)."""
    import torch

    storage = torch.from_numpy(memory).untyped_storage()
    return torch.empty((0,), dtype=dtype, device="cpu").set_(storage, 0, shape)


def _on_large_pages(tensor: Any) -> Any:
    """The same new tensor, on large pages if it is large and on the CPU; NumPy does so itself."""
    if tensor.device.type == "cpu":
        from penstock._library import library

        library().prefer_large_pages(tensor)
    return tensor


def torch_dtype(name: str) -> Any:
    """The torch dtype of one of the engine's names."""
    import torch

    return getattr(torch, name)


def is_torch(array: object) -> bool:
    """Whether `array` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def arrays_of(array: object) -> Any:
    """NumpyArrays or TorchArrays, by the type of `array`."""
    if is_torch(array):
        return TorchArrays
    if isinstance(array, np.ndarray):
        return NumpyArrays
    raise invalid(
        "array", type(array).__name__, "a torch.Tensor or a numpy.ndarray", "Convert it first"
    )
