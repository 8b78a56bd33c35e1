# SPDX-License-Identifier: Apache-2.0
"""Checks that files, functions and parameter lists stay small enough to be read in one go.

Run by `make lint` as `check_sizes.py [ROOT]`. Limits: 400 lines a file; 80 lines a function, 150
for device code under src/backends/cuda; 6 parameters; 8 template parameters. In Python the limit
is on parameters that can be passed by position: options that must be named explain themselves, and
torch.library's custom operators have flat schemas.
tests/scripts/test_check_sizes.py shows that it can fail.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpp_functions import functions

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_DEVICE_FUNCTION_LINES = 150
MAX_PARAMETERS = 6
MAX_TEMPLATE_PARAMETERS = 8

FOLDERS = (
    "include", "src", "python", "tests", "benchmarks", "examples", "scripts", "cmake",
)  # fmt: skip
CPP = {".h", ".cpp", ".cu", ".cuh"}
COUNTED = CPP | {".py", ".sh", ".cmake"}


def is_torch_op(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether torch calls it by its schema, which is flat: no struct may stand for its tensors."""
    calls = (node.func for node in function.decorator_list if isinstance(node, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr == "custom_op" for call in calls)


def python_problems(name: str, text: str) -> Iterator[str]:
    """Complaints about the functions of one Python file."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        where = f"{name}:{node.lineno}: {node.name}"
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{where} has {lines} lines, at most {MAX_FUNCTION_LINES}"
        if is_torch_op(node):
            continue
        positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if positional[:1] in (["self"], ["cls"], ["ctx"]):
            positional = positional[1:]
        if len(positional) > MAX_PARAMETERS:
            yield f"{where} takes {len(positional)} positional parameters, at most {MAX_PARAMETERS}"


def cpp_problems(name: str, text: str) -> Iterator[str]:
    """Complaints about the functions of one C++ or CUDA file."""
    cuda = name.startswith("src/backends/cuda/")
    for function in functions(text):
        where = f"{name}:{function.first_line}: {function.name}"
        lines = function.last_line - function.first_line + 1
        limit = MAX_DEVICE_FUNCTION_LINES if cuda and function.on_device else MAX_FUNCTION_LINES
        if lines > limit:
            yield f"{where} has {lines} lines, at most {limit}"
        if function.parameters > MAX_PARAMETERS:
            yield f"{where} takes {function.parameters} parameters, at most {MAX_PARAMETERS}"
        if function.template_parameters > MAX_TEMPLATE_PARAMETERS:
            yield (
                f"{where} takes {function.template_parameters} template parameters, "
                f"at most {MAX_TEMPLATE_PARAMETERS}"
            )


def problems_in(root: Path, path: Path) -> Iterator[str]:
    """Complaints about one file."""
    name = path.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{name}: {lines} lines, at most {MAX_FILE_LINES}"
    if path.suffix == ".py":
        yield from python_problems(name, text)
    elif path.suffix in CPP:
        yield from cpp_problems(name, text)


def check(root: Path) -> tuple[list[str], int]:
    """Every complaint about the tree below `root`, and the number of files looked at."""
    paths = [
        path
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in COUNTED and path.is_file()
    ]
    return [problem for path in paths for problem in problems_in(root, path)], len(paths)


def main() -> int:
    """Prints the complaints; the exit status says whether there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    problems, count = check(root.resolve())
    for problem in problems:
        print(problem)
    print(f"check_sizes: {count} files, {len(problems)} problems")
    return 1 if problems or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
