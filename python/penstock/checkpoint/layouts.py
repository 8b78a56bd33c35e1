# SPDX-License-Identifier: Apache-2.0
"""The two layouts of experts in checkpoints, and which bytes of the one make the other.

Per expert (what most published checkpoints hold), d hidden, n intermediate:
    <block>.experts.<e>.{gate_proj,up_proj,down_proj}.weight   (n, d) (n, d) (d, n)
    <block>.experts.<e>.{w1,w3,w2}.weight                      the same in Mixtral's words
Fused (what transformers 5 and the engine compute with), E experts:
    <block>.experts.gate_up_proj (E, 2n, d), gate rows first;  <block>.experts.down_proj (E, d, n)
Without a gate, up_proj (E, n, d) takes gate_up_proj's place. Biases go the same way.

A target's bytes are slices of sources, one after the other: nothing is computed. check_once proves
that every byte of every source is used, and used once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from penstock.checkpoint.errors import CheckpointError, some_of
from penstock.checkpoint.folder import Checkpoint
from penstock.checkpoint.safetensors_file import Entry

SPELLINGS = {
    "mlp": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
}
_ROLE = {word: role for words in SPELLINGS.values() for role, word in words.items()}
_PER_EXPERT = re.compile(
    rf"(?P<block>.*\.experts)\.(?P<expert>0|[1-9]\d*)\.(?P<word>{'|'.join(_ROLE)})"
    r"\.(?P<kind>weight|bias)"
)
_OF_AN_EXPERT = re.compile(r".*\.experts\.\d+\..*")
_FUSED = re.compile(r"(?P<block>.*\.experts)\.(?P<word>gate_up_proj|up_proj|down_proj)(_bias)?")
_REMEDY = "Convert a complete checkpoint of one layout"


class Piece(NamedTuple):
    """Bytes [start, end) of a source tensor's data."""

    source: str
    start: int
    end: int


class Target(NamedTuple):
    """A tensor to be written: its data is the pieces, one after the other."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of its data."""
        return sum(piece.end - piece.start for piece in self.pieces)


def has_per_expert(names: Iterable[str]) -> bool:
    """Whether any of the names is of an expert by itself."""
    return any(_OF_AN_EXPERT.fullmatch(name) for name in names)


def has_fused(names: Iterable[str]) -> bool:
    """Whether any of the names is of fused experts."""
    return any(_FUSED.fullmatch(name) for name in names)


def as_it_is(checkpoint: Checkpoint) -> dict[str, Target]:
    """Every tensor becomes itself."""
    return {name: _whole(name, checkpoint.entry(name)) for name in checkpoint.tensors}


def fuse(checkpoint: Checkpoint) -> dict[str, Target]:
    """Targets in the fused layout; CheckpointError for experts that are missing or there twice."""
    targets: dict[str, Target] = {}
    groups: dict[tuple[str, str], dict[str, dict[int, str]]] = defaultdict(dict)
    for name in checkpoint.tensors:
        match = _PER_EXPERT.fullmatch(name)
        if match is None:
            if _OF_AN_EXPERT.fullmatch(name):
                raise CheckpointError(
                    "a tensor of an expert", got=name,
                    expected="weights and biases of gate, up and down projections",
                    remedy="Dequantise the checkpoint first, or keep its layout",
                )  # fmt: skip
            targets[name] = _whole(name, checkpoint.entry(name))
            continue
        experts = groups[match["block"], match["kind"]].setdefault(_ROLE[match["word"]], {})
        expert = int(match["expert"])
        if expert in experts:
            _refuse("an expert's projection", f"both {experts[expert]} and {name}", "one of them")
        experts[expert] = name
    for (block, kind), roles in groups.items():
        for target_name, target in _fused_group(checkpoint, block, kind, roles):
            if target_name in targets:
                _refuse("fused and single experts", f"{target_name} beside them", "one layout")
            targets[target_name] = target
    check_once(checkpoint, targets)
    return targets


def split(checkpoint: Checkpoint, spelling: str) -> dict[str, Target]:
    """Targets in the per-expert layout, in the words of SPELLINGS[spelling]."""
    targets: dict[str, Target] = {}
    for name in checkpoint.tensors:
        match = _FUSED.fullmatch(name)
        parts = (
            [(name, _whole(name, checkpoint.entry(name)))]
            if match is None
            else _split_one(checkpoint, name, match, SPELLINGS[spelling])
        )
        for target_name, target in parts:
            if target_name in targets or (match and target_name in checkpoint.tensors):
                _refuse("fused and single experts", f"{target_name} beside {name}", "one layout")
            targets[target_name] = target
    check_once(checkpoint, targets)
    return targets


def check_once(checkpoint: Checkpoint, targets: dict[str, Target]) -> None:
    """CheckpointError unless the targets use every byte of every source exactly once."""
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for target in targets.values():
        for piece in target.pieces:
            used[piece.source].append((piece.start, piece.end))
    for name, source in checkpoint.tensors.items():
        position = 0
        for start, end in sorted(used.pop(name, [])):
            if start != position:
                _refuse("a source tensor", f"bytes of {name} used twice or not at all", "once")
            position = end
        if position != source.entry.num_bytes:
            _refuse("a source tensor", f"bytes of {name} that nothing uses", "each used once")


def _fused_group(
    checkpoint: Checkpoint, block: str, kind: str, roles: dict[str, dict[int, str]]
) -> Iterator[tuple[str, Target]]:
    """The fused tensors of one block's weights, or of its biases."""
    if not {"up", "down"} <= roles.keys():
        _refuse(f"projections of {block}", some_of(roles), "up and down, and gate where there is")
    num_experts = 1 + max(max(experts) for experts in roles.values())
    missing = {
        f"the {role} {kind} of expert {expert}"
        for role, experts in roles.items()
        for expert in _first_absent(experts, num_experts)
    }
    if missing:
        _refuse(f"experts 0 to {num_experts - 1} of {block}", f"no {some_of(missing)}", "all")
    suffix = "" if kind == "weight" else "_bias"
    upper = [role for role in ("gate", "up") if role in roles]
    for word, parts in (("gate_up_proj" if len(upper) == 2 else "up_proj", upper),
                        ("down_proj", ["down"])):  # fmt: skip
        names = [roles[role][expert] for expert in range(num_experts) for role in parts]
        first = checkpoint.entry(names[0])
        for name in names:
            entry = checkpoint.entry(name)
            if entry[:2] != first[:2] or len(entry.shape) != (2 if kind == "weight" else 1):
                _refuse(
                    f"an expert of {block}", f"{name} of {entry.dtype} {list(entry.shape)}",
                    f"{first.dtype} {list(first.shape)}, as {names[0]}",
                )  # fmt: skip
        shape = (num_experts, len(parts) * first.shape[0], *first.shape[1:])
        pieces = tuple(Piece(name, 0, first.num_bytes) for name in names)
        yield f"{block}.{word}{suffix}", Target(first.dtype, shape, pieces)


def _first_absent(experts: dict[int, str], num_experts: int) -> list[int]:
    """The lowest few ids below num_experts that are not there; an id may be absurdly large."""
    absent = (expert for expert in range(num_experts) if expert not in experts)
    return list(islice(absent, 3))


def _split_one(
    checkpoint: Checkpoint, name: str, match: re.Match[str], words: dict[str, str]
) -> Iterator[tuple[str, Target]]:
    """The single experts' tensors of one fused tensor."""
    entry = checkpoint.entry(name)
    kind = "bias" if name.endswith("_bias") else "weight"
    _check_output_major(checkpoint, name, match["block"])
    roles = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}
    parts = roles[match["word"]]
    num_experts, rows, *rest = entry.shape
    if rows % len(parts) or num_experts == 0:
        _refuse("fused experts", f"{name} of shape {list(entry.shape)}", "(E, 2n, d), E >= 1")
    step = entry.num_bytes // (num_experts * len(parts))
    for index in range(num_experts * len(parts)):
        expert, part = divmod(index, len(parts))
        piece = Piece(name, index * step, (index + 1) * step)
        shape = (rows // len(parts), *rest)
        target = Target(entry.dtype, shape, (piece,))
        yield f"{match['block']}.{expert}.{words[parts[part]]}.{kind}", target


def _check_output_major(checkpoint: Checkpoint, name: str, block: str) -> None:
    """Refuses fused experts of another order, as gpt-oss's (E, d, 2n) with interleaved gates."""
    shapes = {
        word: checkpoint.entry(f"{block}.{word}").shape
        for word in ("gate_up_proj", "up_proj", "down_proj")
        if f"{block}.{word}" in checkpoint.tensors
    }
    down = shapes.pop("down_proj", ())
    ups = [(shape, 2 if word == "gate_up_proj" else 1) for word, shape in shapes.items()]
    if len(down) == 3 and len(ups) == 1:
        (up, halves), (num_experts, d, n) = ups[0], down
        if up == (num_experts, halves * n, d):
            return
    _refuse(
        f"fused experts of {block}", f"{name} among shapes {[*shapes.values(), down]}",
        "(E, 2n, d) or (E, n, d) up, and (E, d, n) down",
    )  # fmt: skip


def _whole(name: str, entry: Entry) -> Target:
    return Target(entry.dtype, entry.shape, (Piece(name, 0, entry.num_bytes),))


def _refuse(what: str, got: object, expected: object) -> None:
    raise CheckpointError(what, got=got, expected=expected, remedy=_REMEDY)
