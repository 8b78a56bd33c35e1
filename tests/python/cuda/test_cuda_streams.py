# SPDX-License-Identifier: Apache-2.0
"""Streams and the host: work goes to torch's current stream, the host never waits, memory that is
freed and used again is ordered by the stream (hostile cases 18, 20, 25).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from case_layer import parameters
from doors import case
from gpu_layer import forward, gradients, make_inputs, other_bits, own_leaves, sized, step

import penstock
from penstock import _engine, _engine_backward, _engine_route

SHAPE = [300, 128, 64, 12, 3]
SLEEP_CYCLES = 200_000_000  # about a tenth of a second


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    """torch's own check, in the block and not after it, whatever happens."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait_for_the_gpu() -> None:
    """A step returns while the GPU still sleeps; torch's own check finds no synchronisation."""
    inputs = make_inputs(SHAPE, "bfloat16")
    layer = penstock.MoE(64, 48, 8, 2, bias=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(90, 64, device="cuda", dtype=torch.bfloat16)

    def work() -> dict[str, torch.Tensor]:
        results = step(inputs, SHAPE[4])
        y = layer(x)
        (y.float().square().mean() + layer.stats.aux_loss).backward()
        return results

    expected = work()  # CUDA loads a kernel at its first launch, for which it may wait
    work()  # the first that adds to .grad
    torch.cuda.synchronize()
    with synchronisation_is_an_error():
        torch.cuda._sleep(SLEEP_CYCLES)
        awake = torch.cuda.Event()
        awake.record()
        got = work()
        assert not awake.query(), "the host waited for the GPU"
    assert not other_bits(got, expected)


def test_torch_finds_a_synchronisation_where_there_is_one() -> None:
    """The check of the test above can fail, and is off afterwards."""
    one = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), synchronisation_is_an_error():
        one.item()
    assert one.item() == 1


def test_work_goes_to_the_current_stream() -> None:
    """On a stream that waits, the results are not there yet; on it, order is kept."""
    inputs = make_inputs(SHAPE, "bfloat16")
    expected = step(inputs, SHAPE[4])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        got = step(inputs, SHAPE[4])
        done = torch.cuda.Event()
        done.record()
    torch.cuda.current_stream().synchronize()
    assert not done.query(), "the work did not wait for its stream"
    side.synchronize()
    assert not other_bits(got, expected)


@case(18, "cuda")
def test_case_18_two_streams_from_two_threads() -> None:
    values = parameters(18)
    shapes = [sized(shape) for shape in values["shapes"]]
    problems = []
    calls = [(make_inputs(shape, "bfloat16", seed=i), shape[4]) for i, shape in enumerate(shapes)]
    serial = [step(*call) for call in calls]
    torch.cuda.synchronize()

    def work(first: int) -> None:
        try:
            # The same memory, but leaves of the thread's own: torch ties a leaf's gradient to one
            # stream for as long as any graph with the leaf lives, and warns on another.
            own_calls = [(own_leaves(inputs), top_k) for inputs, top_k in calls]
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(values["calls_each"]):
                    which = (first + i) % len(calls)
                    got = step(*own_calls[which])
                    torch.cuda.current_stream().synchronize()
                    assert not other_bits(got, serial[which])
        except BaseException as problem:  # a thread's exception would only be printed
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(values["host_threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


@case(20, "cuda")
def test_case_20_memory_used_again_at_once() -> None:
    """Outputs dropped while their kernels run give their memory to the next call on the stream."""
    inputs = make_inputs(SHAPE, "bfloat16")
    expected = step(inputs, SHAPE[4])
    torch.cuda._sleep(SLEEP_CYCLES // 4)
    for _ in range(parameters(20)["calls"]):
        got = step(inputs, SHAPE[4])
        garbage = torch.full_like(got["dw1"], float("nan"))
        del garbage
    assert not other_bits(got, expected)


@case(20, "cuda")
def test_case_20_another_streams_tensor_needs_record_stream() -> None:
    """The documented rule, followed: made on one stream, used and dropped on another."""
    expected = step(make_inputs(SHAPE, "bfloat16", seed=5), SHAPE[4])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    inputs = make_inputs(SHAPE, "bfloat16", seed=5)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES // 4)
        got = step(inputs, SHAPE[4])
    for tensor in inputs.values():
        tensor.record_stream(side)
    del inputs, tensor
    make_inputs(SHAPE, "bfloat16", seed=6)  # would take the freed memory if it were free
    side.synchronize()
    assert not other_bits(got, expected)


@case(25, "cuda")
@pytest.mark.parametrize("sm_budget", parameters(25)["sm_budgets"])
def test_case_25_fewer_multiprocessors_same_bits(sm_budget, dtype) -> None:
    inputs = make_inputs(SHAPE, dtype)
    expected = step(inputs, SHAPE[4])
    with penstock.backend(sm_budget=sm_budget):
        assert not other_bits(step(inputs, SHAPE[4]), expected)


@case(25, "cuda")
def test_case_25_other_work_on_the_gpu_same_bits() -> None:
    inputs = make_inputs(SHAPE, "bfloat16")
    expected = step(inputs, SHAPE[4])
    other = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(side):
            other @ other
        got = step(inputs, SHAPE[4])
        assert not other_bits(got, expected)


@pytest.mark.parametrize("seam", ["operator", "main_grad"])
def test_backward_runs_in_the_context_of_its_forward_pass(seam, monkeypatch) -> None:
    """In autograd's own thread too, which no context of the caller's reaches."""
    inputs = make_inputs(SHAPE, "bfloat16")
    ran = {}

    def watch(module, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments):
            ran[name] = (threading.get_ident(), arguments[-1])
            return real(*arguments)

        monkeypatch.setattr(module, name, call)

    watch(_engine_backward, "experts_backward")
    watch(_engine, "router_logits_backward")
    watch(_engine_route, "route_backward")
    with penstock.backend("cuda", sm_budget=17) as context:
        output = forward(inputs, SHAPE[4], main_grad=seam == "main_grad")
    got = gradients(output, inputs)
    assert {"experts_backward", "router_logits_backward", "route_backward"} == set(ran)
    for thread, ran_in in ran.values():
        assert thread != threading.get_ident() and ran_in == context
    assert not other_bits(got, step(inputs, SHAPE[4]))
