# SPDX-License-Identifier: Apache-2.0
"""Writes penstock_cases.h, the cases of this folder as C++ constants.

Run by CMake at configure time: generate_header.py OUT.h. Every parameter of hostile case N becomes
a constant in namespace penstock::cases::case_N: an integer, a double, an array of integers, a Shape
(a name that is or ends in `shape`) or an array of Shapes (`shapes`). Nothing but the standard
library is needed, so a build needs no Python package.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPE_KEYS = ("T", "d", "n", "E", "K")


def load(name):
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def shape_literal(name, sizes):
    return "{" + ", ".join([json.dumps(name), *map(str, sizes)]) + "}"


def constant(case, name, value):
    """One parameter as a C++ definition; the kind follows from its name and value."""
    label = f"case {case}"
    if name.endswith("shapes"):
        literals = ",\n    ".join(shape_literal(label, sizes) for sizes in value)
        return f"inline constexpr Shape {name}[] = {{\n    {literals}}};"
    if name.endswith("shape"):
        return f"inline constexpr Shape {name} = {shape_literal(label, value)};"
    if isinstance(value, list):
        return f"inline constexpr int64_t {name}[] = {{{', '.join(map(str, value))}}};"
    if isinstance(value, float):
        return f"inline constexpr double {name} = {value!r};"
    if isinstance(value, int):
        return f"inline constexpr int64_t {name} = {value};"
    raise SystemExit(f"hostile case {case}: parameter {name} has no C++ form: {value!r}")


def tolerance_functions(tolerances):
    """double stage(DType) and so on, one function per table of tolerances.json."""
    lines = []
    for name, table in tolerances.items():
        if isinstance(table, dict):
            cases = "".join(
                f"\n    case DType::{dtype}:\n      return {bound!r};"
                for dtype, bound in table.items()
            )
            lines.append(
                f"constexpr double {name}(DType dtype) {{\n  switch (dtype) {{{cases}\n"
                "    default:\n      return 0.0;\n  }\n}"
            )
        elif isinstance(table, float):
            lines.append(f"inline constexpr double {name} = {table!r};")
    return "\n".join(lines)


def header():
    shapes = ",\n    ".join(
        shape_literal(name, [entry[key] for key in SHAPE_KEYS])
        for name, entry in load("shapes")["shapes"].items()
    )
    hostile = load("hostile")["cases"]
    titles = ",\n    ".join(
        f"{{{case['number']}, {json.dumps(case['title'])}}}" for case in hostile
    )
    parameters = "\n\n".join(
        f"namespace case_{case['number']} {{\n"
        + "\n".join(constant(case["number"], *item) for item in case["parameters"].items())
        + f"\n}}  // namespace case_{case['number']}"
        for case in hostile
    )
    return f"""// SPDX-License-Identifier: Apache-2.0
//
// Generated from tests/cases/*.json by generate_header.py; edit those.
#pragma once

#include <cstdint>

#include "penstock/dtype.h"

namespace penstock::cases {{

struct Shape {{
  const char* name;
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_experts;
  int32_t top_k;
}};

inline constexpr Shape kShapes[] = {{
    {shapes}}};

struct HostileCase {{
  int number;
  const char* title;
}};

inline constexpr HostileCase kHostileCases[] = {{
    {titles}}};

namespace tolerance {{
{tolerance_functions(load("tolerances"))}
}}  // namespace tolerance

{parameters}

}}  // namespace penstock::cases
"""


def main():
    out = Path(sys.argv[1])
    text = header()
    # Left alone when nothing changed, so that a new configure does not rebuild the tests.
    if not out.exists() or out.read_text(encoding="utf-8") != text:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
