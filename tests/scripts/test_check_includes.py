# SPDX-License-Identifier: Apache-2.0
"""The includes check accepts what the layers allow and names what they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import check_includes

ROOT = Path(__file__).resolve().parents[2]

GOOD = {
    "include/penstock/tensor.h": "#include <cstdint>\n",
    "src/tensor/half.h": '#include "penstock/tensor.h"\n',
    "src/backend/ops.h": '#include "penstock/tensor.h"\n#include "tensor/half.h"\n',
    "src/backends/cpu/fast/fast_backend.h": '#include "backend/ops.h"\n',
    "src/backend/registry.cpp": '#include "backends/cpu/fast/fast_backend.h"\n',
    "src/routing/plan.h": '#include "backend/ops.h"\n',
    "src/experts/forward.cpp": '#include "routing/plan.h"\n#include "backend/ops.h"\n',
    "src/ffi/experts.cpp": '#include <tvm/ffi/tvm_ffi.h>\n#include "experts/order.h"\n',
    "src/experts/order.h": "",
    "src/backends/cuda/gemm/run.cu": "#include <cuda_runtime.h>\n",
    "examples/cpp/run_layer.cpp": "#include <penstock/tensor.h>\n",
}

# One file each that breaks the tree above, and a piece of the complaint.
BAD = {
    "routing sees experts": (
        {"src/routing/a.cpp": '#include "experts/order.h"\n'},
        "src/routing may only see",
    ),
    "backend sees routing": (
        {"src/backend/a.cpp": '#include "routing/plan.h"\n'},
        "src/backend may only see",
    ),
    "a backend sees the order of launches": (
        {"src/backends/cpu/fast/a.cpp": '#include "experts/order.h"\n'},
        "src/backends/cpu/fast may only see",
    ),
    "one backend sees another": (
        {
            "src/backends/cpu/reference/a.cpp": '#include "backends/cpu/fast/fast_backend.h"\n',
        },
        "src/backends/cpu/reference may only see",
    ),
    "experts sees a backend": (
        {"src/experts/a.cpp": '#include "backends/cpu/fast/fast_backend.h"\n'},
        "src/experts may only see",
    ),
    "a public header sees the inside": (
        {"include/penstock/a.h": '#include "tensor/half.h"\n'},
        "include/penstock may only see",
    ),
    "a public header sees CUDA": (
        {"include/penstock/a.h": "#include <cuda_runtime.h>\n"},
        "must not know",
    ),
    "the core sees torch": ({"src/experts/a.cpp": "#include <torch/torch.h>\n"}, "must not know"),
    "the core sees tvm-ffi": (
        {"src/routing/a.cpp": "#  include <tvm/ffi/any.h>\n"},
        "must not know",
    ),
    "the binding sees CUDA": ({"src/ffi/a.cpp": "#include <cuda.h>\n"}, "must not know"),
    "an example sees the inside": (
        {"examples/cpp/a.cpp": '#include "experts/order.h"\n'},
        "examples/cpp may only see",
    ),
    "a header that is nowhere": ({"src/tensor/a.h": '#include "tensor/b.h"\n'}, "not below"),
    "a folder that is in no layer": ({"src/extras/a.h": ""}, "in no layer"),
    "a circle": (
        {"src/tensor/a.h": '#include "tensor/b.h"\n', "src/tensor/b.h": '#include "a.h"\n'},
        "circle: src/tensor/a.h -> src/tensor/b.h -> src/tensor/a.h",
    ),
}


def test_what_the_layers_allow_passes(tree):
    problems, count = check_includes.check(tree(GOOD))
    assert problems == []
    assert count == len(GOOD)


@pytest.mark.parametrize("case", BAD)
def test_what_they_do_not_is_named(tree, case):
    files, expected = BAD[case]
    problems, _ = check_includes.check(tree(GOOD | files))
    assert len(problems) == 1
    assert expected in problems[0]


def test_the_script_fails_on_a_bad_tree_and_on_an_empty_one(tree, tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "check_includes.py")]
    bad = tree(GOOD | BAD["a circle"][0])
    assert subprocess.run([*script, bad], capture_output=True, check=False).returncode == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert subprocess.run([*script, empty], capture_output=True, check=False).returncode == 1


def test_this_project_passes():
    problems, count = check_includes.check(ROOT)
    assert problems == []
    assert count > 10
