# SPDX-License-Identifier: Apache-2.0
"""Malformed checkpoints: refused with nothing written, or read exactly as they are."""

import json
import random
import struct

import models
import pytest

from penstock.checkpoint import Checkpoint, CheckpointError, convert

NUM_MUTANTS = 200


def file_of(header, data=b"", length=None):
    """A safetensors file of this header (bytes, or an object to be written as JSON)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin, end, shape=(1,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE = {
    "empty": (b"", "a file of 0 bytes"),
    "no header": (b"\1\2\3", "a file of 3 bytes"),
    "header of nothing": (file_of(b"", length=0), "a header of 0 bytes"),
    "header past the end": (file_of({}, length=10**6), "a header of 1000000 bytes"),
    "header of 2^64 - 1": (file_of({}, length=2**64 - 1), "a header of 18446744073709551615"),
    "no JSON": (file_of(b"{nonsense}"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "not JSON"),
    "no object": (file_of(b"[1, 2]"), "a list"),
    "deep nesting": (file_of(b"[" * 200_000), "not JSON"),
    "a key twice": (file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12"),
                    "'a' is there twice"),
    "a number of many digits": (
        file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}'),
        "not JSON"),
    "NaN as a size": (file_of(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}'),
                      "NaN is no JSON number"),
    "truncated": (file_of({"a": entry(0, 8, (8,))}, b"1234"), "a file of"),
    "data left over": (file_of({"a": entry(0, 1)}, b"12"), "a file of"),
    "overlap": (file_of({"a": entry(0, 2, (2,)), "b": entry(1, 3, (2,))}, b"123"), "overlapping"),
    "gap": (file_of({"a": entry(0, 1), "b": entry(2, 3)}, b"123"), "after a gap"),
    "negative offset": (file_of({"a": entry(-1, 0)}, b"1"), "with offsets"),
    "backwards": (file_of({"a": entry(1, 0)}, b"1"), "with offsets"),
    "offsets past 2^64": (file_of({"a": entry(2**64, 2**64 + 1)}, b"1"), "after a gap"),
    "huge shape, tiny data": (file_of({"a": entry(0, 1, (2**62, 2**62))}, b"1"), "1 bytes for"),
    "a product that wraps to 4": (file_of({"a": entry(0, 4, (2**32 + 2, 2**31 + 2))}, b"1234"),
                                  "4 bytes for"),
    "a size that is true": (file_of({"a": entry(0, 1, (True,))}, b"1"), "of shape"),
    "a size that is 1.0": (file_of({"a": entry(0, 1, (1.0,))}, b"1"), "of shape"),
    "unknown dtype": (file_of({"a": entry(0, 1, (1,), "F7")}, b"1"), "of dtype 'F7'"),
    "wrong dtype": (file_of({"a": entry(0, 1, (1,), "F64")}, b"1"), "8, from its dtype F64"),
    "a part missing": (file_of({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "data_offsets"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_files_are_refused_with_the_byte(tmp_path, case):
    content, says = HOSTILE[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"at byte \d+: got") as error:
        Checkpoint(path)
    assert says in str(error.value)


def test_odd_files_that_are_right(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"b": entry(0, 0, (0, 5)), "a": entry(0, 1, ())}, b"x"))
    checkpoint = Checkpoint(path)
    assert bytes(checkpoint.bytes_of("a")) == b"x" and bytes(checkpoint.bytes_of("b")) == b""
    many = {f"t{i}": entry(i, i + 1) for i in range(20_000)}
    path.write_bytes(file_of(many, b"y" * 20_000))
    assert len(Checkpoint(path).tensors) == 20_000


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor"):
        Checkpoint(tmp_path)


INDEX = "model.safetensors.index.json"
INDICES = {
    "no JSON": lambda index: "{",
    "no map": lambda index: "{}",
    "a path upwards": lambda index: json.dumps(index).replace("model-00001", "../model-00001"),
    "a shard that is not there": lambda index: json.dumps(index).replace("00001-of", "00009-of"),
    "a tensor in another shard": lambda index: json.dumps(index).replace("00001-of", "00002-of", 1),
    "a tensor that is nowhere": lambda index: json.dumps(index).replace(".gate.", ".gat."),
    "a key twice": lambda index: '{"weight_map": {"a": "b", "a": "b"}}',
}


@pytest.mark.parametrize("case", INDICES)
def test_wrong_indices_are_refused(tmp_path, case):
    source = models.write(tmp_path / "source", models.per_expert(layers=1), 2)
    index = source / INDEX
    index.write_text(INDICES[case](json.loads(index.read_text())))
    before = models.snapshot(tmp_path)
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out", to="fused")
    assert models.snapshot(tmp_path) == before


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    source = models.write(tmp_path / "source", models.per_expert(layers=1), 2)
    first, second = sorted(source.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="which another shard holds too"):
        Checkpoint(source)


def mutate(source, rng):
    """Damage one file of a checkpoint in one of the ways that files come to harm."""
    path = rng.choice(sorted(source.glob("*.safetensors*")))
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0] if path.suffix == ".safetensors" else 0
    kind = rng.choice(["truncate", "length", "header", "digit", "data", "remove", "append", "swap"])
    if kind == "truncate":
        del content[rng.randrange(len(content)) :]
    elif kind == "length":
        content[rng.randrange(8)] = rng.randrange(256)
    elif kind == "header":
        content[rng.randrange(min(header or len(content), len(content)))] = rng.randrange(256)
    elif kind == "digit":  # shapes, offsets and expert ids stay numbers, but others
        digits = [i for i in range(8, header or len(content)) if chr(content[i]).isdigit()]
        content[rng.choice(digits)] = ord(str(rng.randrange(10)))
    elif kind == "data":  # legitimate: any bits are a number, NaN payloads too
        content[rng.randrange(header, len(content))] = rng.randrange(256)
    elif kind == "append":
        content += rng.randbytes(rng.randrange(1, 64))
    elif kind == "swap":
        content = bytearray(rng.choice(sorted(source.glob("*.safetensors"))).read_bytes())
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(content)


def test_mutants_are_refused_cleanly_or_converted_exactly(tmp_path):
    rng = random.Random(31)
    tensors = models.per_expert(layers=1)
    refused = 0
    for number in range(NUM_MUTANTS):
        room = tmp_path / str(number)
        source = models.write(room / "source", tensors, 2)
        mutate(source, rng)
        before = models.snapshot(room)
        try:
            convert(source, room / "out", to="fused")
        except CheckpointError as error:
            assert str(error)
            assert models.snapshot(room) == before
            refused += 1
            continue
        # Accepted: then the safetensors package reads the same, and back it comes bit by bit.
        assert {k: v for k, v in models.snapshot(room).items() if not k.startswith("out")} == before
        convert(room / "out", room / "back", to="per_expert")
        assert models.read(room / "back") == models.read(source)
    assert 100 < refused < NUM_MUTANTS
