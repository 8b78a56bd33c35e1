# SPDX-License-Identifier: Apache-2.0
"""Checks what a shared library exports against what the public headers mark PENSTOCK_API.

Run by ctest as `check_exports.py LIBRARY HEADER_FOLDER`. Fails, naming the symbols, if the library
exports anything that is not marked, or if something marked is missing from it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLASS = re.compile(r"\b(?:class|struct)\s+PENSTOCK_API\s+(\w+)")
FUNCTION = re.compile(r"^PENSTOCK_API\s+[\w:<>,&*\s]*?(\w+)\s*\(", re.MULTILINE)
SPECIAL = re.compile(r"^(?:typeinfo(?: name)?|vtable) for ")


def declared(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the functions and of the classes that the headers export."""
    text = "\n".join(path.read_text() for path in sorted(folder.glob("*.h")))
    return set(FUNCTION.findall(text)), set(CLASS.findall(text))


def exported(library: Path) -> set[str]:
    """Demangled names that the library defines for others to link."""
    command = ["nm", "--dynamic", "--defined-only", "--demangle", "--format=posix", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    # "name(arguments) T address size": the name itself may hold blanks.
    return {re.sub(r" [A-Za-z] [0-9a-f ]*$", "", line).strip() for line in lines if line}


def base_name(symbol: str) -> str:
    """penstock::f for penstock::f(int), penstock::C for a member or the type information of C."""
    return re.sub(r"\[abi:\w+\]", "", SPECIAL.sub("", symbol)).split("(")[0]


def main() -> int:
    library, folder = Path(sys.argv[1]), Path(sys.argv[2])
    functions, classes = declared(folder)
    names = {base_name(symbol) for symbol in exported(library)}
    allowed = {f"penstock::{name}" for name in functions | classes}
    members = tuple(f"penstock::{name}::" for name in classes)

    unexpected = sorted(n for n in names if n not in allowed and not n.startswith(members))
    missing = sorted(f"penstock::{name}" for name in functions if f"penstock::{name}" not in names)
    for name in unexpected:
        print(f"exported, but not marked PENSTOCK_API in {folder}: {name}")
    for name in missing:
        print(f"marked PENSTOCK_API, but not exported by {library.name}: {name}")
    if not functions:
        print(f"no PENSTOCK_API function found in {folder}: is this the header folder?")
    print(f"{len(names)} exported names, {len(functions)} functions declared")
    return 1 if unexpected or missing or not functions else 0


if __name__ == "__main__":
    sys.exit(main())
