# SPDX-License-Identifier: Apache-2.0
"""The size check measures functions as a reader would and refuses what is too big."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_sizes
from cpp_functions import functions

ROOT = Path(__file__).resolve().parents[2]

CPP = """\
// void not_code(int a) {
namespace penstock {
namespace {
constexpr int kTable[] = {1, 2, 3};
const std::vector<int> more{1, 2};
struct Args { int a = {}; std::array<int, 2> b = {1, 2}; };

class __attribute__((visibility("default"))) Thing : public Base {
 public:
  Thing(int a, std::map<int, int> b) : Base{a}, b_(b), c_{[] { return 1; }()} { run("}"); }
  bool operator()(int x) const noexcept(true) { return x < 3; }
  ~Thing() {}
 private:
  int c_ = 0;
};
}  // namespace

#define MACRO(x) \\
  { x
template <typename T, int N = (3 > 2), typename = std::enable_if_t<(N > 1)>>
__global__ void __launch_bounds__(128, 1)
    kernel(const T* __restrict__ in, T (&out)[N], std::function<int(int, int)> f) {
  if (in) { auto g = [](int a, int b) { return a + b; }; }
}

auto arrow(char separator = '{') -> std::pair<int, int> { return {1, 2}; }
extern "C" {
int in_c(void) { return 0; }
}
}  // namespace penstock
"""


def test_functions_of_cpp_are_found():
    found = [
        (f.name, f.first_line, f.last_line, f.parameters, f.template_parameters, f.on_device)
        for f in functions(CPP)
    ]
    assert found == [
        ("Thing", 10, 10, 2, 0, False),
        ("operator()", 11, 11, 1, 0, False),
        ("~Thing", 12, 12, 0, 0, False),
        ("kernel", 21, 24, 3, 3, True),
        ("arrow", 26, 26, 1, 0, False),
        ("in_c", 28, 28, 0, 0, False),
    ]


def body(lines: int) -> str:
    return "  x();\n" * (lines - 2)


BAD = {
    "a long C++ function": ("src/a.cpp", f"void f() {{\n{body(81)}}}\n", "81 lines, at most 80"),
    "a long host function of CUDA": (
        "src/backends/cuda/a.cu",
        f"void f() {{\n{body(81)}}}\n",
        "81 lines, at most 80",
    ),
    "a long kernel": (
        "src/backends/cuda/a.cu",
        f"__global__ void f() {{\n{body(151)}}}\n",
        "151 lines, at most 150",
    ),
    "seven parameters": (
        "include/a.h",
        "inline void f(int a, int b, int c, int d, int e, int f, int g) {}\n",
        "takes 7 parameters",
    ),
    "nine template parameters": (
        "src/a.h",
        "template <" + ", ".join(f"int K{i}" for i in range(9)) + ">\nvoid f() {}\n",
        "takes 9 template parameters",
    ),
    "a long file": ("src/a.h", "\n" * 401, "401 lines, at most 400"),
    "a long script": ("scripts/a.sh", "\n" * 401, "401 lines, at most 400"),
    "a long Python function": (
        "python/a.py",
        "def f():\n" + "    x()\n" * 80,
        "81 lines, at most 80",
    ),
    "seven positional parameters": (
        "python/a.py",
        "def f(a, b, c, d, e, f, g): ...\n",
        "takes 7 positional parameters",
    ),
}

GOOD = {
    "src/a.cpp": f"void f(int a, int b, int c, int d, int e, int f) {{\n{body(80)}}}\n",
    "src/backends/cuda/a.cu": f"__global__ void f() {{\n{body(150)}}}\n",
    "python/op.py": '@torch.library.custom_op("n::f")\ndef f(a, b, c, d, e, f, g): ...\n',
    "python/a.py": "class A:\n    def f(self, a, b, c, d, e, f, *, g=1): ...\n",
}


def test_small_things_pass(tree):
    problems, count = check_sizes.check(tree(GOOD))
    assert problems == []
    assert count == len(GOOD)


@pytest.mark.parametrize("case", BAD)
def test_big_things_are_named(tree, case):
    name, text, expected = BAD[case]
    problems, _ = check_sizes.check(tree({name: text}))
    assert len(problems) == 1
    assert expected in problems[0]


def test_this_project_passes():
    problems, count = check_sizes.check(ROOT)
    assert problems == []
    assert count > 10
