# SPDX-License-Identifier: Apache-2.0
"""Large blocks of host memory are used again, never while anything still looks at them."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import plain
import pytest
import torch

import penstock
from penstock import _blocks, functional
from penstock._arrays import NumpyArrays, TorchArrays
from penstock._blocks import SMALLEST_BYTES, BlockCache, limit_from

MIB = 1 << 20


def address(array):
    return array.ctypes.data


def test_a_block_is_used_again_once_its_last_view_is_gone():
    cache = BlockCache(64 * MIB)
    first = cache.take(8 * MIB)
    where, view = address(first), first[100:200]
    del first
    assert cache.idle_bytes == 0 and address(cache.take(8 * MIB)) != where
    del view
    assert address(cache.take(8 * MIB)) == where


def test_sizes_are_exact_and_near_ones_share_a_block():
    cache = BlockCache(64 * MIB)
    first = cache.take(8 * MIB + 1)
    where = address(first)
    assert first.nbytes == 8 * MIB + 1 and where % _blocks.ALIGNMENT == 0
    del first
    other = cache.take(8 * MIB + 77777)
    assert address(other) == where and other.nbytes == 8 * MIB + 77777


@pytest.mark.parametrize("num_bytes", [4 * MIB, 4 * MIB + 1, 5000001, 123456789, 1 << 31])
def test_a_block_is_at_most_an_eighth_larger_than_asked(num_bytes):
    assert num_bytes <= _blocks._rounded(num_bytes) <= num_bytes * 9 // 8


def test_the_longest_unused_goes_first():
    cache = BlockCache(33 * MIB)
    held = [cache.take(size * MIB) for size in (8, 9, 16)]
    where = [address(array) for array in held]
    while held:
        del held[0]  # 8 and 9 MiB come back, then 16 MiB, which fits beside the 9
    assert 25 * MIB <= cache.idle_bytes <= cache.limit_bytes
    kept = [cache.take(size * MIB) for size in (9, 16)]
    assert [address(array) for array in kept] == where[1:] and cache.idle_bytes == 0


def test_without_room_nothing_is_kept():
    cache = BlockCache(0)
    cache.take(8 * MIB)
    assert cache.idle_bytes == 0


def test_clear_returns_what_is_idle():
    cache = BlockCache(64 * MIB)
    cache.take(8 * MIB)
    assert cache.idle_bytes > 0
    cache.clear()
    assert cache.idle_bytes == 0


def test_a_failed_allocation_is_tried_again_without_the_idle_blocks(monkeypatch):
    cache = BlockCache(64 * MIB)
    cache.take(8 * MIB)
    empty, idle_before = np.empty, []

    def fail_once(*args):
        idle_before.append(cache.idle_bytes)
        if len(idle_before) == 1:
            raise MemoryError
        return empty(*args)

    monkeypatch.setattr(_blocks.np, "empty", fail_once)
    assert cache.take(12 * MIB).nbytes == 12 * MIB
    assert idle_before[0] > 0 and idle_before[1] == 0


def test_a_block_may_come_back_while_the_lock_is_held():
    """The garbage collector may free a tensor inside any statement, the cache's own among them."""
    cache = BlockCache(64 * MIB)
    block = cache.take(8 * MIB)
    where = address(block)
    with cache._exclusive():
        del block
    assert address(cache.take(8 * MIB)) == where


def test_blocks_in_reference_cycles_come_back_with_the_collector():
    cache = BlockCache(64 * MIB)
    cycle = [cache.take(8 * MIB)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert cache.idle_bytes > 0


def test_threads_never_share_a_block():
    cache = BlockCache(16 * MIB)

    def use(value):
        for _ in range(50):
            mine = cache.take(SMALLEST_BYTES)[:4096]
            mine[:] = value
            assert (mine == value).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(8)))
    assert cache.idle_bytes <= cache.limit_bytes


def test_a_forked_child_can_allocate_while_the_parent_held_the_lock():
    with _blocks.cache._exclusive():
        child = os.fork()
        if child == 0:
            _blocks.cache.take(SMALLEST_BYTES)[:] = 1
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("text", "expected"), [(None, 1024), ("", 1024), ("0", 0), ("16", 16)])
def test_the_environment_sets_the_limit(text, expected):
    assert limit_from(text) == expected * MIB


@pytest.mark.parametrize("text", ["-1", "1.5", "1 GiB"])
def test_a_limit_that_is_no_count_is_an_error(text):
    with pytest.raises(ValueError, match="PENSTOCK_CACHE_MIB: got .* expected MiB"):
        limit_from(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_from_the_cache_is_like_any_other(dtype):
    tensor = TorchArrays.empty((1024, 2048), dtype, torch.empty(0))
    num_bytes = tensor.nbytes
    assert tensor.untyped_storage().nbytes() == num_bytes and tensor.is_contiguous()
    assert not tensor._is_view() and tensor.device.type == "cpu"
    tensor.fill_(1)
    where = tensor.data_ptr()
    kept = tensor[5:7]
    del tensor
    assert TorchArrays.empty((1024, 2048), dtype, torch.empty(0)).data_ptr() != where
    assert (kept == 1).all()
    del kept
    assert TorchArrays.workspace(num_bytes, torch.empty(0)).data_ptr() == where


def test_numpy_arrays_come_from_the_same_cache():
    array = NumpyArrays.empty((1024, 2048), "float32", np.empty(0))
    where = address(array)
    assert array.dtype == np.float32 and array.shape == (1024, 2048)
    del array
    assert NumpyArrays.workspace(8 * MIB, np.empty(0)).ctypes.data == where


def test_fresh_memory_is_the_librarys_own(monkeypatch):
    taken = []
    take = _blocks.cache.take
    monkeypatch.setattr(_blocks.cache, "take", lambda size: taken.append(size) or take(size))
    with penstock.testing.fresh_memory():
        TorchArrays.empty((1024, 2048), "float32", torch.empty(0))
        NumpyArrays.workspace(8 * MIB, np.empty(0))
    assert not taken
    TorchArrays.empty((1024, 2048), "float32", torch.empty(0))
    assert taken == [8 * MIB]


def test_a_layer_does_not_depend_on_what_its_memory_held():
    shape = (2048, 512, 256, 4, 2)
    weights = plain.make_weights(shape, dtype=torch.float32, bias=False)
    x = plain.make_x(shape, dtype=torch.float32)
    routing = functional.route(plain.make_logits(shape, dtype=torch.float32), shape[4])

    def run():
        output = functional.moe_experts(x, weights["w1"], weights["w2"], routing)
        leaves = [x, weights["w1"], weights["w2"]]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    with penstock.testing.fresh_memory():
        expected = run()
    run()
    with _blocks.cache._exclusive():
        idle = list(_blocks.cache._idle)
    assert len(idle) >= 5  # H, two workspaces, the output and gradients
    for block in idle:
        block[:] = 0xFF
    del idle
    assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
