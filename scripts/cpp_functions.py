# SPDX-License-Identifier: Apache-2.0
"""Finds the functions of a C++ or CUDA file: name, first and last line, number of parameters.

Not a parser: it follows braces through namespaces and classes, and takes what has a parameter list
in front of an opening brace for a function. That holds for code formatted as this project's is;
lambdas and local classes count with the function around them. Called by scripts/check_sizes.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Comments and literals, and directives with their continuation lines, which may hold odd braces.
SILENT = re.compile(
    r"//[^\n]*"
    r"|/\*.*?\*/"
    r'|R"(?P<tag>[^(\s]*)\(.*?\)(?P=tag)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"
    r"|^[ \t]*#(?:\\\n|[^\n])*",
    re.DOTALL | re.MULTILINE,
)
SCOPE = re.compile(r"\b(?:namespace|class|struct|union|enum|extern)\b")
# Words whose parentheses hold no parameters.
WITH_ARGUMENTS = re.compile(
    r"\b(?:alignas|decltype|noexcept|requires|__attribute__|__launch_bounds__|explicit)\s*\("
)
TEMPLATE = re.compile(r"\btemplate\s*<")
ACCESS = re.compile(r"\b(?:public|private|protected)\s*$")
NAME = re.compile(r"(operator\s*(?:\(\s*\)|[^\s\w(]+|\w+)|~?[A-Za-z_]\w*)\s*\(")


@dataclass(frozen=True)
class Function:
    """One function definition. Lines count from 1; the first is that of its signature."""

    name: str
    first_line: int
    last_line: int
    parameters: int
    template_parameters: int
    on_device: bool


def blank(text: str) -> str:
    """The text with comments, literals and directives blanked out, line numbers unchanged."""
    return SILENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def matching(text: str, start: int, pair: str) -> int:
    """The index just past the bracket that closes the one at `start`; the end if none does."""
    depth, index = 0, start
    while index < len(text):
        if text[index] == pair[0]:
            depth += 1
        elif text[index] == pair[1] and not (pair == "<>" and text[index - 1] == "-"):
            depth -= 1
            if depth == 0:
                return index + 1
        elif pair == "<>" and text[index] == "(":  # in (a > b), the sign closes nothing
            index = matching(text, index, "()")
            continue
        index += 1
    return len(text)


def count_items(text: str) -> int:
    """The number of comma-separated items, commas inside any brackets aside."""
    if not text.strip() or text.strip() == "void":
        return 0
    items, index = 1, 0
    while index < len(text):
        for pair in ("()", "[]", "{}", "<>"):
            if text[index] == pair[0]:
                index = matching(text, index, pair)
                break
        else:
            items += text[index] == ","
            index += 1
    return items


def strip_templates(head: str) -> tuple[str, int]:
    """The head without template<...> prefixes, and the longest template parameter list."""
    most = 0
    while match := TEMPLATE.search(head):
        end = matching(head, match.end() - 1, "<>")
        most = max(most, count_items(head[match.end() : end - 1]))
        head = head[: match.start()] + " " * (end - match.start()) + head[end:]
    return head, most


def strip_arguments(head: str) -> str:
    """The head without attributes and specifiers that have parentheses of their own."""
    while match := WITH_ARGUMENTS.search(head):
        end = matching(head, match.end() - 1, "()")
        head = head[: match.start()] + " " * (end - match.start()) + head[end:]
    return head


def top_level_equals(head: str) -> bool:
    """Whether the head is an initialiser, `name = ` in front of a brace."""
    return re.search(r"(?<![=!<>+\-*/%&|^])=\s*$", head) is not None


def is_member_initialiser(head: str) -> bool:
    """Whether the brace after the head initialises a member in a constructor's list."""
    return re.search(r"\)[^()]*(?<!:):(?!:).*[\w>]\s*$", head, re.DOTALL) is not None


def describe(text: str, start: int, brace: int, end: int) -> Function | None:
    """The function whose body is text[brace:end], if its head, from `start`, is one's."""
    head, template_parameters = strip_templates(text[start:brace])
    head = strip_arguments(head)
    name = NAME.search(head)
    if not name or top_level_equals(head):
        return None
    close = matching(head, name.end() - 1, "()")
    signature = start + len(head) - len(head.lstrip())
    return Function(
        name=name[1],
        first_line=text.count("\n", 0, signature) + 1,
        last_line=text.count("\n", 0, end) + 1,
        parameters=count_items(head[name.end() : close - 1]),
        template_parameters=template_parameters,
        on_device=re.search(r"\b__(?:global|device)__\b", head) is not None,
    )


def functions(source: str) -> Iterator[Function]:
    """Every function definition at namespace or class scope."""
    text = blank(source)
    index = start = 0  # `start`: where the declaration that `index` is in began
    while index < len(text):
        char = text[index]
        if char == "(":
            index = matching(text, index, "()")
            continue
        if char in ";}" or (char == ":" and ACCESS.search(text[start:index])):
            start = index + 1
        elif char == "{":
            head = text[start:index]
            end = matching(text, index, "{}")
            function = describe(text, start, index, end)
            if function is None and SCOPE.search(head) and not top_level_equals(head):
                start = index + 1  # a namespace or a class: look inside
            elif function is None or is_member_initialiser(head):
                index = end  # values: the declaration goes on behind them
                continue
            else:
                yield function
                index = start = end
                continue
        index += 1
