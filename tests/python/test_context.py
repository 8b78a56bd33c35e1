# SPDX-License-Identifier: Apache-2.0
"""The context of a call, the library's place, backends and errors."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import plain
import pytest
import torch

import penstock
from penstock import _context, _library, functional

SHAPE = (33, 24, 20, 6, 2)


def test_blocks_nest_and_restore():
    assert _context.current() == _context.CallContext()
    with penstock.backend("reference", threads=3) as outer:
        assert _context.current() == outer
        with penstock.backend(id_checks="checked"):
            inner = _context.current()
            assert (inner.backend, inner.threads, inner.id_checks) == ("reference", 3, "checked")
        with pytest.raises(KeyError), penstock.backend(threads=1):
            raise KeyError
        assert _context.current() == outer
    assert _context.current() == _context.CallContext()


def test_a_context_packs_and_unpacks():
    context = _context.CallContext("reference", 3, "checked", 5, "nvtx")
    assert _context.CallContext.unpack(context.pack()) == context
    with penstock.backend("reference"):
        assert _context.CallContext.unpack("").backend == "reference"


@pytest.mark.parametrize(
    "keywords",
    [{"threads": -1}, {"id_checks": "maybe"}, {"sm_budget": -1}, {"name": "a,b"}, {"ranges": "x"}],
)
def test_settings_are_checked(keywords):
    with pytest.raises(ValueError, match="got"), penstock.backend(**keywords):
        pass


class Nvtx:
    """Stands for torch.cuda.nvtx; keeps the names in the order in which ranges open."""

    def __init__(self):
        self.names, self.open = [], 0

    def range_push(self, name):
        self.names.append(name)
        self.open += 1

    def range_pop(self):
        self.open -= 1

    @contextmanager
    def range(self, name):
        self.range_push(name)
        yield
        self.range_pop()


def test_ranges_are_around_every_pass_where_they_are_asked_for(monkeypatch):
    nvtx = Nvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    layer = penstock.MoE(16, 8, 4, 2)
    x = torch.randn(5, 16)
    layer(x).sum().backward()
    assert nvtx.names == []
    with penstock.backend(ranges="nvtx"):
        y = layer(x)
        with penstock.backend(ranges=""):
            layer(x)
    y.sum().backward()  # in the context of its forward pass
    passes = ["router_logits", "build_plan", "experts_forward"]
    passes += ["experts_backward", "router_logits_backward"]
    marked = [f"penstock::{name}" for name in passes]
    assert [name for name in nvtx.names if name in marked] == marked
    assert nvtx.open == 0


def test_ranges_need_a_torch_that_has_them(monkeypatch):
    class Without(Nvtx):
        def range_push(self, name):
            raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda, "nvtx", Without())
    with pytest.raises(ValueError, match="not installed"), penstock.backend(ranges="nvtx"):
        pass


def test_other_threads_have_their_own_context():
    seen = []
    with penstock.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_context.current().backend))
        thread.start()
        thread.join()
    assert seen == [""]


def test_a_backend_chosen_by_name_is_not_replaced():
    weights = plain.make_weights(SHAPE, bias=False)
    x, routing = plain.make_x(SHAPE), functional.route(plain.make_logits(SHAPE), 2)
    names = [backend.name for backend in penstock.list_backends()]
    assert "reference" in names
    with penstock.backend("reference"):
        assert penstock.chosen_backend(SHAPE) == "reference"
    if "fast" in names:
        assert "float64" in penstock.why_not("fast", SHAPE, dtype="float64")
        with penstock.backend("fast"), pytest.raises(penstock.UnsupportedError, match="float64"):
            functional.moe_experts(x, weights["w1"], weights["w2"], routing)
    assert penstock.chosen_backend(SHAPE, dtype="float64") == "reference"
    assert penstock.why_not("reference", SHAPE) == ""


def test_unsupported_is_a_runtime_error_and_errors_carry_their_parts():
    assert issubclass(penstock.UnsupportedError, RuntimeError)
    x, logits = plain.make_x(SHAPE, dtype=torch.float32), plain.make_logits(SHAPE)
    weights = plain.make_weights(SHAPE, dtype=torch.float32, bias=False)
    routing = functional.route(logits.detach(), 2)
    with pytest.raises(ValueError, match=r"scores: got .*float64.*expected .*float32.*\. "):
        functional.moe_experts(x, weights["w1"], weights["w2"], routing)
    with pytest.raises(ValueError, match="w2"):
        functional.moe_experts(x, weights["w1"], weights["w2"][:, :-1], routing)


def test_version():
    assert penstock.version() == _library.library().version()
    assert penstock.version().count(".") == 2


def test_the_library_is_looked_for_in_one_place(monkeypatch, tmp_path):
    monkeypatch.delenv(_library.ENVIRONMENT_VARIABLE, raising=False)
    assert _library.library_path().parent.name == "lib"
    monkeypatch.setenv(_library.ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(ImportError, match="got no file"):
        _library._load(_library.library_path())


def test_calls_from_several_threads_give_the_bits_of_serial_calls():
    def call(seed):
        weights = plain.make_weights(SHAPE, dtype=torch.float32, seed=seed)
        x = plain.make_x(SHAPE, dtype=torch.float32, seed=seed + 1)
        routing = functional.route(plain.make_logits(SHAPE, dtype=torch.float32, seed=seed), 2)
        y = functional.moe_experts(x, weights["w1"], weights["w2"], routing)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weights["w1"], weights["w2"]])]

    serial = [call(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(call, range(12)))
    for one, other in zip(serial, concurrent, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_python_runs_while_the_engine_works():
    """The GIL is released: another thread counts on during one long call."""
    shape = (512, 256, 256, 4, 2)
    weights = plain.make_weights(shape, dtype=torch.float32, bias=False)
    x = plain.make_x(shape, dtype=torch.float32).detach()
    routing = functional.route(plain.make_logits(shape, dtype=torch.float32).detach(), 2)
    ticks, inside, done = [0], threading.Event(), threading.Event()

    def count():
        inside.wait()
        while not done.is_set():
            ticks[0] += 1
            done.wait(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    with torch.no_grad(), penstock.backend("reference", threads=1):
        inside.set()
        functional.moe_experts(x, weights["w1"].detach(), weights["w2"].detach(), routing)
    during = ticks[0]
    done.set()
    thread.join()
    assert during >= 5
