# SPDX-License-Identifier: Apache-2.0
"""The NumPy front door: without torch, same bits as with torch, bfloat16 through ml_dtypes."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import plain
import pytest
import torch

import penstock
from penstock import functional

SHAPE = (33, 24, 20, 6, 2)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def to_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same_bits(array, tensor):
    return array.tobytes() == to_numpy(tensor.contiguous()).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_same_bits_as_torch(dtype, save):
    torch_dtype = DTYPES[dtype]
    accumulator = torch.float64 if dtype == "float64" else torch.float32
    weights = plain.make_weights(SHAPE, dtype=torch_dtype)
    x = plain.make_x(SHAPE, dtype=torch_dtype)
    router = plain.make_logits((SHAPE[3], 0, 0, SHAPE[1], 0), dtype=torch_dtype)
    d_output = plain.make_x(SHAPE, dtype=torch_dtype, seed=5).detach()

    logits = functional.router_logits(x, router)
    routing = functional.route(logits, 2)
    output = functional.moe_experts(
        x, weights["w1"], weights["w2"], routing, b1=weights["b1"], b2=weights["b2"], save=save
    )
    want = torch.autograd.grad(
        output, [x, router, routing.scores, logits, *weights.values()], d_output
    )

    arrays = {name: to_numpy(weight) for name, weight in weights.items()}
    np_logits = functional.router_logits(to_numpy(x), to_numpy(router))
    np_routing = functional.route(np_logits, 2)
    np_output, saved = functional.moe_experts_forward(
        to_numpy(x), functional.Weights(**arrays), np_routing, functional.Config(save=save)
    )
    grads = functional.moe_experts_backward(to_numpy(d_output), saved)
    d_logits = functional.route_backward(grads.scores, np_logits, np_routing)
    dx, d_router = functional.router_logits_backward(d_logits, to_numpy(x), to_numpy(router))
    assert np_logits.dtype == to_numpy(torch.empty(0, dtype=accumulator)).dtype
    assert same_bits(np_logits, logits) and same_bits(np_output, output)
    assert same_bits(grads.scores, want[2]) and same_bits(d_logits, want[3])
    assert same_bits(d_router, want[1])
    for name, grad in zip(("w1", "w2", "b1", "b2"), want[4:], strict=True):
        assert same_bits(getattr(grads.weights, name), grad)
    total = grads.x.astype(np.float64) + dx.astype(np.float64)
    np.testing.assert_allclose(total, to_numpy(want[0]).astype(np.float64), rtol=2e-2, atol=2e-2)
    if dtype == "float64":
        np.testing.assert_allclose(total, to_numpy(want[0]), rtol=1e-13)
    forward_only = functional.moe_experts(
        to_numpy(x), arrays["w1"], arrays["w2"], *np_routing.topk(), b1=arrays["b1"],
        b2=arrays["b2"],
    )  # fmt: skip
    assert same_bits(forward_only, output)
    formula = functional.saved_bytes(SHAPE, dtype=dtype, save=save)
    assert saved.kept_bytes == formula


def make(dtype=np.float32):
    arrays = {k: to_numpy(v).astype(dtype) for k, v in plain.make_weights(SHAPE).items()}
    x = to_numpy(plain.make_x(SHAPE)).astype(dtype)
    routing = functional.route(to_numpy(plain.make_logits(SHAPE)).astype(np.float32), 2)
    return x, functional.Weights(**arrays), routing


def test_read_only_arrays_are_read():
    x, weights, routing = make()
    want, _ = functional.moe_experts_forward(x, weights, routing)
    for array in (x, *(w for w in weights if w is not None)):
        array.flags.writeable = False
    got, _ = functional.moe_experts_forward(x, weights, routing)
    assert np.array_equal(got, want)


def test_accumulate_and_frozen_experts():
    x, weights, routing = make()
    _, saved = functional.moe_experts_forward(x, weights, routing)
    d_output = np.ones_like(x)
    fresh = functional.moe_experts_backward(d_output, saved).weights
    into = functional.Weights(*(None if w is None else np.full(w.shape, 3.0, w.dtype)
                                for w in weights))  # fmt: skip
    trainable = np.ones(SHAPE[3], np.uint8)
    trainable[2] = 0
    functional.moe_experts_backward(
        d_output, saved, into=into, mode="accumulate", trainable=trainable
    )
    for got, grad in zip(into, fresh, strict=True):
        if grad is None:
            continue
        assert (got[2] == 3.0).all()
        keep = [0, 1, 3, 4, 5]
        np.testing.assert_allclose(got[keep], 3.0 + grad[keep], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="into"):
        functional.moe_experts_backward(d_output, saved, mode="accumulate")


def test_errors():
    x, weights, routing = make()
    with pytest.raises(ValueError, match="dtype of w1: got float32, expected float64"):
        functional.moe_experts_forward(x.astype(np.float64), weights, routing)
    with pytest.raises(ValueError, match="uint16"):
        functional.router_logits(x.astype(np.uint16), x[:4].astype(np.uint16))
    with pytest.raises(ValueError, match="save"):
        _, saved = functional.moe_experts_forward(
            x, weights, routing, functional.Config(save="nothing")
        )
        functional.moe_experts_backward(x, saved)
    with pytest.raises(ValueError, match=r"number of tokens.*33"):
        functional.moe_experts(x[:-1], weights.w1, weights.w2, routing)
    with pytest.raises(ValueError, match="torch.Tensor or a numpy.ndarray"):
        functional.moe_experts_forward(x.tolist(), weights, routing)
    with pytest.raises(ValueError, match="top_k: got 9"):
        functional.route(np.zeros((3, 4), np.float32), 9)


def test_checked_ids():
    ids = np.array([[0, 0], [1, -2]], np.int32)
    routing = functional.Routing.from_topk(np.ones((2, 2), np.float32), ids)
    assert functional.plan(routing, 3).expert_counts.tolist() == [2, 1, 0]
    with penstock.backend(id_checks="checked"), pytest.raises(ValueError, match="token 0"):
        functional.plan(routing, 3)


BLOCKED = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
import numpy as np, penstock
x = np.ones((3, 8), np.float32)
w1, w2 = np.ones((4, 6, 8), np.float32), np.ones((4, 8, 3), np.float32)
routing = penstock.functional.route(np.eye(3, 4, dtype=np.float32), 2)
y, saved = penstock.functional.moe_experts_forward(x, penstock.functional.Weights(w1, w2=w2),
                                                   routing)
penstock.functional.moe_experts_backward(y, saved)
assert y.shape == (3, 8) and penstock.info() and penstock.list_backends()
try:
    penstock.MoE
except ImportError as error:
    assert "pip install 'penstock[torch]'" in str(error)
else:
    raise SystemExit("MoE without torch")
assert "torch" not in sys.modules
"""

LAZY = """
import sys, penstock
assert not {"torch", "tvm_ffi"} & set(sys.modules), "import penstock is light"
"""


@pytest.mark.parametrize("script", [BLOCKED, LAZY], ids=["without torch", "lazily"])
def test_import(script):
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert result.returncode == 0, result.stderr
