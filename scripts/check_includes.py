# SPDX-License-Identifier: Apache-2.0
"""Proves that includes go one way.

    ffi -> experts -> routing -> backend -> backends/{cpu,cuda}

A file may include files of its own layer and of the layers that the table below names for it;
include/penstock and src/tensor serve everybody. Headers of other projects are allowed where the
table says and nowhere else, so the public headers stay free of CUDA, torch and tvm-ffi. No chain of
includes may come back to where it started.

Run by `make lint` as `check_includes.py [ROOT]`; tests/scripts/test_check_includes.py shows that it
can fail.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}

CUDA_HEADERS = r"cuda|cub/|cooperative_groups|nv/|mma\.h|crt/"
TVM_HEADERS = r"tvm/|dlpack/"
FOREIGN = re.compile(rf"^(?:{CUDA_HEADERS}|{TVM_HEADERS}|torch/|ATen/|c10/|Python\.h|pybind11/)")


@dataclass(frozen=True)
class Layer:
    """A folder, the path prefixes it may include besides itself, and the foreign headers it may."""

    folder: str
    may_include: tuple[str, ...]
    foreign: str = ""


# The contract, and what every backend must compute alike.
SHARED = ("src/backend/ops.h", "src/backend/count_rounding.h", "src/backend/ranking.h")

# Longest folder first: a file belongs to the first layer whose folder it is in.
LAYERS = (
    Layer("include/penstock", ()),
    Layer("src/tensor", ()),
    Layer("src/backends/cpu/reference", ("src/backend/ops.h", "src/backends/cpu/common")),
    Layer("src/backends/cpu/fast", ("src/backend/ops.h", "src/backends/cpu/common")),
    Layer("src/backends/cpu/common", SHARED),
    Layer("src/backends/cuda/arch", (), CUDA_HEADERS),
    Layer("src/backends/cuda", SHARED, CUDA_HEADERS),
    # The registry lists the backends by name: it sees the one header of each that declares it.
    Layer(
        "src/backend",
        (
            "src/backends/cpu/reference/reference_backend.h",
            "src/backends/cpu/fast/fast_backend.h",
            "src/backends/cuda/cuda_backend.h",
        ),
    ),
    Layer("src/routing", ("src/backend",)),
    Layer("src/experts", ("src/routing", "src/backend")),
    Layer("src/ffi", ("src/experts", "src/routing", "src/backend"), TVM_HEADERS),
    Layer("examples/cpp", ()),
)
FOR_EVERYBODY = ("include/penstock", "src/tensor")
# The public headers and src/tensor stand below everything; examples see what users see.
PUBLIC_ONLY = {"include/penstock": ("include/penstock",), "examples/cpp": ("include/penstock",)}


def inside(path: str, prefix: str) -> bool:
    """Whether `path` is `prefix` itself or lies below it."""
    return path == prefix or path.startswith(prefix + "/")


def layer_of(path: str) -> Layer | None:
    """The layer that a file belongs to."""
    return next((layer for layer in LAYERS if inside(path, layer.folder)), None)


def sources(root: Path) -> Iterator[Path]:
    """Every C++ and CUDA file that the layers own."""
    for folder in ("include", "src", "examples/cpp"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                yield path


def resolve(root: Path, source: Path, name: str) -> str | None:
    """The path below `root` of an included file of ours, or None for a header of others."""
    for base in (source.parent, root / "src", root / "include"):
        for candidate in (base / name, base / f"{name}.in"):
            if candidate.is_file():
                return candidate.resolve().relative_to(root).as_posix().removesuffix(".in")
    return None


def allowed(layer: Layer, target: str) -> bool:
    """Whether a file of `layer` may include the file `target` of ours."""
    common = PUBLIC_ONLY.get(layer.folder, FOR_EVERYBODY)
    return any(inside(target, p) for p in (layer.folder, *layer.may_include, *common))


def complaint(layer: Layer, source: str, name: str, target: str | None, quoted: bool) -> str:
    """Why this include is refused, or an empty string."""
    if target is not None:
        if allowed(layer, target):
            return ""
        seen = ", ".join((*layer.may_include, *PUBLIC_ONLY.get(layer.folder, FOR_EVERYBODY)))
        return f'{source}: includes "{name}", but {layer.folder} may only see itself, {seen}'
    if quoted:
        return f'{source}: includes "{name}", which is not below src/ or include/'
    if FOREIGN.match(name) and not (layer.foreign and re.match(layer.foreign, name)):
        return f"{source}: includes <{name}>, which {layer.folder} must not know"
    return ""


def cycle_in(graph: dict[str, list[str]]) -> list[str]:
    """One chain of includes that comes back to its start, or an empty list."""
    done: set[str] = set()

    def visit(node: str, chain: list[str]) -> list[str]:
        if node in chain:
            return [*chain[chain.index(node) :], node]
        if node in done:
            return []
        for follower in graph.get(node, []):
            if found := visit(follower, [*chain, node]):
                return found
        done.add(node)
        return []

    return next((found for start in graph if (found := visit(start, []))), [])


def check(root: Path) -> tuple[list[str], int]:
    """Every complaint about the tree below `root`, and the number of files looked at."""
    root = root.resolve()
    problems: list[str] = []
    graph: dict[str, list[str]] = {}
    for path in sources(root):
        source = path.relative_to(root).as_posix()
        graph[source] = []
        layer = layer_of(source)
        if layer is None:
            problems.append(f"{source}: in no layer; add its folder to {Path(__file__).name}")
            continue
        for quoted, angled in INCLUDE.findall(path.read_text(encoding="utf-8")):
            name = quoted or angled
            target = resolve(root, path, name)
            if target is not None:
                graph[source].append(target)
            if text := complaint(layer, source, name, target, bool(quoted)):
                problems.append(text)
    if chain := cycle_in(graph):
        problems.append("includes go in a circle: " + " -> ".join(chain))
    return problems, len(graph)


def main() -> int:
    """Prints the complaints; the exit status says whether there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    problems, count = check(root)
    for problem in problems:
        print(problem)
    print(f"check_includes: {count} files, {len(problems)} problems")
    return 1 if problems or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
