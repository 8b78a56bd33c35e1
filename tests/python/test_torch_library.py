# SPDX-License-Identifier: Apache-2.0
"""How operators are defined: groups of arguments, and what custom_op would have given besides."""

import os
import subprocess
import sys

import pytest
import torch

import penstock
from penstock import _torch_library, _torch_ops, functional
from penstock._context import CallContext
from penstock._engine import Config, Plan, Weights
from penstock._engine_adapters import AdapterRows
from penstock._torch_library import Group, Pass, Signature

FIRST_STEP = """
import sys, torch, penstock
layer = penstock.MoE(8, 8, 4, 2)
layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
assert layer.experts.w1.grad is not None
assert "torch._dynamo" not in sys.modules, "the first step pays for the import of torch._dynamo"
"""


def test_a_first_step_does_not_import_dynamo():
    result = subprocess.run(
        [sys.executable, "-c", FIRST_STEP],
        capture_output=True, text=True, env=os.environ, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_signature_is_its_groups():
    pair = Group("Tensor a, Tensor? b", lambda a, b: (a, b))
    signature = Signature(Group("Tensor x"), pair, Group("str name", str.upper))
    assert signature.schema == "Tensor x, Tensor a, Tensor? b, str name"
    assert signature.join(("x", "a", None, "name")) == ["x", ("a", None), "NAME"]


def test_a_default_left_out_is_none():
    signature = Signature(Group("Tensor x"), Group("Tensor? addend=None"))
    assert signature.join(("x",)) == ["x", None]


def test_a_pass_is_put_together_in_the_order_of_its_schema():
    config, context = Config("relu", save="input"), CallContext("fast", threads=3)
    arrays = tuple("counts offsets to_token to_slot to_row token_offsets".split())
    settings = (2, config.pack(), config.clamp, context.pack())
    plan = Plan(*arrays, 2)
    assert Pass.join(*arrays, *settings) == Pass(plan, config, context)
    wanted = [True, False]
    backward = Pass.join_backward(*arrays, "h", wanted, *settings)
    assert backward == Pass(plan, config, context, wanted, "h")
    adapted = Pass.join_backward(*arrays, "h", "u1", "u2", wanted, *settings)
    assert adapted == Pass(plan, config, context, wanted, "h", AdapterRows("u1", "u2"))

    def names(group):
        return [argument.split()[1] for argument in group.schema.split(", ")]

    behind = ["top_k", "config", "clamp", "context"]
    assert names(_torch_library.BACKWARD) == [*Plan._fields[:6], "h", "wanted", *behind]
    assert names(_torch_library.ADAPTED_BACKWARD) == [
        *Plan._fields[:6], "h", "up_rows", "down_rows", "wanted", *behind,
    ]  # fmt: skip
    assert names(_torch_library.WEIGHTS) == list(Weights._fields)


@pytest.mark.parametrize("torch_has_marks", [True, False], ids=["marked", "without marks"])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_dynamo_does_not_trace_a_kernel(torch_has_marks, monkeypatch):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(function):
        graphs.clear()
        torch._dynamo.reset()
        assert torch.compile(function, backend=compiler)(torch.ones(2)).sum() == 4
        return len(graphs)

    assert compiled(lambda x: x + 1) == 1
    if not torch_has_marks:
        monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")
    assert compiled(_torch_library._outside_dynamo(lambda x: x + 1)) == 0


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_dynamo_does_not_look_into_operators():
    layer = penstock.MoE(8, 8, 4, 2)
    x = torch.randn(3, 8, requires_grad=True)

    def step(x):
        layer(x).sum().backward()  # the graph breaks here: backward formulas run as Python

    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    torch.compile(step, backend="eager")(x)
    seen = {os.path.basename(m.co_filename) for m in torch._dynamo.utils.get_compilation_metrics()}
    assert "_torch_ops.py" in seen  # formulas, which are Dynamo's to trace
    assert not {"_torch_library.py", "_engine.py", "_engine_backward.py", "_arrays.py"} & seen


def test_writing_to_h_counts_as_a_new_version():
    x, w1, w2 = torch.randn(4, 8), torch.randn(2, 6, 8), torch.randn(2, 8, 3)
    routing = functional.Routing.from_topk(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32))
    plan, context = functional.plan(routing, 2), CallContext().pack()

    def versions(op, kept_h):
        config = Config(kept_h=kept_h)
        settings = (plan.top_k, config.pack(), config.clamp, context)
        tensors = (x, routing.scores, w1, None, w2, *[None] * 4, *plan[:6])
        output, h = _torch_ops.experts(*tensors, *settings)
        before = h._version
        op(torch.ones_like(output), *tensors, h, [True] * 3 + [False] * 5, *settings)
        return h._version - before

    assert versions(_torch_ops.experts_backward_over_h, "overwritten") == 1
    assert versions(_torch_ops.experts_backward, "preserved") == 0
