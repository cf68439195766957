"""How files are damaged: a part of `damage.py`.

Each kind writes a damaged file in place of a sound one. What fits every file comes first, then what knows JSON,
safetensors and npy. What would run code, if a reader did that, makes a folder whose name is in `CANARY`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CANARY = "METACONTROLLER_CANARY"
"""The environment variable that names a folder which is there as soon as code from a file was run."""
CANARY_MODULE = "torture_canary"
CANARY_SOURCE = f"import os\nos.makedirs(os.environ[{CANARY!r}], exist_ok=True)\ndef make(*_):\n    return None\n"


class Case(NamedTuple):
    """path: of the file to damage. content: what it held. other: the content of another sound file. chance: draws."""

    path: Path
    content: bytes
    other: bytes
    chance: random.Random


Kind = Callable[[Case], bytes | None]
"""Returns the damaged content, or None where it has put something else there itself."""


# -- any file ---------------------------------------------------------------------------------------------------------


def cut(case: Case) -> bytes:
    return case.content[: case.chance.randrange(len(case.content))]


def flip_bits(case: Case) -> bytes:
    changed = bytearray(case.content)
    for _ in range(case.chance.choice([1, 1, 1, 2, 8])):
        changed[case.chance.randrange(len(changed))] ^= 1 << case.chance.randrange(8)
    return bytes(changed)


def drop_piece(case: Case) -> bytes:
    start = case.chance.randrange(len(case.content))
    return case.content[:start] + case.content[start + case.chance.randrange(1, 64) :]


def insert_piece(case: Case) -> bytes:
    start = case.chance.randrange(len(case.content) + 1)
    return case.content[:start] + case.chance.randbytes(case.chance.randrange(1, 64)) + case.content[start:]


def swap_pieces(case: Case) -> bytes:
    size = max(1, min(64, len(case.content) // 4))
    first, second = sorted(case.chance.sample(range(len(case.content)), 2)) if len(case.content) > 1 else (0, 0)
    second = max(second, first + size)
    a, b = case.content[first : first + size], case.content[second : second + size]
    return case.content[:first] + b + case.content[first + size : second] + a + case.content[second + size :]


def repeat_tail(case: Case) -> bytes:
    return case.content + case.content[case.chance.randrange(len(case.content)) :]


def zero_piece(case: Case) -> bytes:
    start, size = case.chance.randrange(len(case.content)), case.chance.choice([1, 16, 512])
    return case.content[:start] + bytes(len(case.content[start : start + size])) + case.content[start + size :]


def noise(case: Case) -> bytes:
    return case.chance.randbytes(case.chance.randrange(len(case.content) + 1))


def nothing(case: Case) -> bytes:
    return b""


def another_file(case: Case) -> bytes:
    return case.other


def a_pickle(case: Case) -> bytes:
    return pickle.dumps(_Payload(), protocol=case.chance.choice([0, 2, 4]))


class _Payload:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (os.environ[CANARY],)


def fifo(case: Case) -> None:
    case.path.unlink()
    os.mkfifo(case.path)


def device(case: Case) -> None:
    case.path.unlink()
    case.path.symlink_to(case.chance.choice(["/dev/zero", "/dev/urandom", "/dev/null"]))


def link_loop(case: Case) -> None:
    case.path.unlink()
    case.path.symlink_to(case.path)


def link_out(case: Case) -> None:
    """To a sound copy that is not in the folder."""
    outside = case.path.parents[2] / "outside"
    outside.write_bytes(case.content)
    case.path.unlink()
    case.path.symlink_to(outside)


def folder(case: Case) -> None:
    case.path.unlink()
    case.path.mkdir()


def huge(case: Case) -> None:
    """A terabyte of zeros after the content, of which none is on the disk."""
    os.truncate(case.path, 2**40)


ANY: list[Kind] = [cut, flip_bits, drop_piece, insert_piece, swap_pieces, repeat_tail, zero_piece, noise]
ANY += [cut, flip_bits, nothing, another_file, a_pickle, fifo, device, link_loop, link_out, folder, huge]


# -- JSON -------------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**70,
    -(2**70),
    1e300,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "x" * 999,
]
ODD += ["/etc/passwd", "\x00", "\ud800", f"{CANARY_MODULE}:make", [], {}, [[]], {"": {}}, [1] * 5000, [2**40, 2**40]]


def odd_value(case: Case) -> bytes:
    """One value, at any depth, replaced."""
    return _edited(case, lambda place, key: place.__setitem__(key, case.chance.choice(ODD)))


def dropped_value(case: Case) -> bytes:
    return _edited(case, lambda place, key: place.__delitem__(key))


def near_value(case: Case) -> bytes:
    """A number, a word or a truth value that might have been meant."""

    def change(place: Any, key: Any) -> None:
        value = place[key]
        if isinstance(value, bool):
            place[key] = not value
        elif isinstance(value, int | float):
            place[key] = case.chance.choice([value + 1, -value, value * 10, value / 2, str(value)])
        else:
            place[key] = f"{value}x" if isinstance(value, str) else [value]

    return _edited(case, change)


def more_keys(case: Case) -> bytes:
    return _edited(
        case, lambda place, key: place.update(more=1) if isinstance(place, dict) else place.append(place[key])
    )


def key_twice(case: Case) -> bytes:
    text = case.content.decode(errors="replace")
    at = text.find("{") + 1
    key = text[at:].split(":", 1)[0]
    return (text[:at] + f"{key}: {json.dumps(case.chance.choice(ODD))}, " + text[at:]).encode(errors="replace")


def deep(case: Case) -> bytes:
    """Nested beyond any recursion, alone or as the value of a key."""
    nest = b"[" * 100_000 + b"]" * case.chance.choice([0, 100_000])
    return case.chance.choice([nest, b'{"a":' * 100_000, case.content.rstrip()[:-1] + b', "deep": ' + nest + b"}"])


def many_digits(case: Case) -> bytes:
    return (
        case.content.rstrip()[:-1]
        + b', "n": '
        + case.chance.choice([b"9" * 100_000, b"1e999", b"-" + b"7" * 5000])
        + b"}"
    )


def _edited(case: Case, change: Callable[[Any, Any], Any]) -> bytes:
    """JSON, or a line of it, with a change at a random place; bits are flipped in what is none."""
    lines = case.content.splitlines(keepends=True) if case.path.suffix == ".jsonl" else [case.content]
    index = case.chance.randrange(len(lines))
    try:
        value = json.loads(lines[index])
        _change(value, change, case.chance)
        lines[index] = json.dumps(value).encode() + b"\n"
    except (ValueError, RecursionError):
        return flip_bits(case)
    return b"".join(lines)


def _change(value: Any, change: Callable[[Any, Any], Any], chance: random.Random) -> None:
    places = [value]
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        inner = [key for key in keys if isinstance(value[key], dict | list) and value[key]]
        if not inner or chance.random() < 0.3:
            break
        value = value[chance.choice(inner)]
        places.append(value)
    if keys:
        change(value, chance.choice(keys))


JSON: list[Kind] = [odd_value, odd_value, dropped_value, dropped_value, near_value, near_value, more_keys, key_twice]
JSON += [deep, many_digits]


def line_twice(case: Case) -> bytes:
    lines = case.content.splitlines(keepends=True)
    lines.insert(case.chance.randrange(len(lines) + 1), case.chance.choice(lines))
    return b"".join(lines)


def lines_swapped(case: Case) -> bytes:
    lines = case.content.splitlines(keepends=True)
    first, second = case.chance.randrange(len(lines)), case.chance.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def line_dropped(case: Case) -> bytes:
    lines = case.content.splitlines(keepends=True)
    del lines[case.chance.randrange(len(lines))]
    return b"".join(lines)


JSONL: list[Kind] = [line_twice, lines_swapped, line_dropped, odd_value, dropped_value, near_value, deep]


# -- tensors ----------------------------------------------------------------------------------------------------------


def not_a_number(case: Case) -> bytes:
    """NaN or an infinity in place of some four bytes of the second half, as a float of 32 bits would stand there."""
    start = (
        case.chance.randrange(len(case.content) // 2, max(len(case.content) - 4, len(case.content) // 2) + 1) // 4 * 4
    )
    value = struct.pack("<f", case.chance.choice([float("nan"), float("inf"), -float("inf")]))
    return case.content[:start] + value + case.content[start + 4 :]


def _header_changed(case: Case, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A safetensors file with another header before the same data."""
    size = int.from_bytes(case.content[:8], "little")
    header = json.loads(case.content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + case.content[8 + size :]


def tensor_entry(case: Case) -> bytes:
    """Another dtype, shape, or place in the file, for one tensor."""

    def change(header: dict[str, Any]) -> None:
        entry = header[case.chance.choice([name for name in header if name != "__metadata__"])]
        key = case.chance.choice(["dtype", "shape", "data_offsets"])
        odd: dict[str, list[Any]] = {
            "dtype": ["F64", "I32", "BF16", "U8", "BOOL", "F8_E4M3", "X", None],
            "shape": [
                [],
                [-1],
                [2**40],
                [2**40, 2**40],
                [0],
                list(reversed(entry["shape"])),
                [1, *entry["shape"]],
                "x",
            ],
            "data_offsets": [[0, 2**60], [2**60, 2**61], [4, 0], [0, 4], [-4, 4], "x", []],
        }
        entry[key] = case.chance.choice(odd[key])

    return _header_changed(case, change)


def tensor_names(case: Case) -> bytes:
    """Two tensors that change their names, or one that is gone or has another."""

    def change(header: dict[str, Any]) -> None:
        names = [name for name in header if name != "__metadata__"]
        first, second = case.chance.choice(names), case.chance.choice(names)
        header[first], header[second] = header[second], header[first]
        if first == second:
            header[case.chance.choice(["../x", "", "x" * 10_000, "module.more"])] = header.pop(first)

    return _header_changed(case, change)


def tensor_metadata(case: Case) -> bytes:
    """What our header says, changed: arguments, class, format, step."""

    def change(header: dict[str, Any]) -> None:
        metadata = header.get("__metadata__", {})
        for key, text in metadata.items():
            inner = Case(Path("m.json"), text.encode(), case.other, case.chance)
            metadata[key] = (case.chance.choice(JSON)(inner) or b"").decode(errors="replace")
        if not metadata or case.chance.random() < 0.1:
            header["__metadata__"] = case.chance.choice([{}, {"x": "y"}, {"metacontroller": "[" * 10_000}])

    return _header_changed(case, change)


def header_size(case: Case) -> bytes:
    size = case.chance.choice([0, 1, 2**63 - 1, 2**64 - 1, 10**8, len(case.content)])
    return size.to_bytes(8, "little") + case.content[8:]


SAFETENSORS: list[Kind] = [not_a_number, not_a_number, tensor_entry, tensor_entry, tensor_names, tensor_metadata]
SAFETENSORS += [tensor_metadata, header_size]


def npy_header(case: Case) -> bytes:
    """Another type, order or shape before the same data; Python objects too."""
    start = case.content.find(b"{")
    end = case.content.find(b"\n", start)
    text = case.content[start:end].decode(errors="replace")
    ways = [("'<f4'", "'<f8'"), ("'<i8'", "'|O'"), ("'<f4'", "'|O'"), ("'<i8'", "'<f8'"), ("'<i8'", "'<u8'")]
    ways += [("'<f4'", "'<i4'"), ("False", "True"), ("(", "(9999999999999, "), ("(", "(-1, "), ("{", "{'more': 1, ")]
    ways += [("(", "(" * 300), ("descr", "other"), ("'<i8'", "'<M8[s]'"), ("'<f4'", "'<c8'")]
    old, new = case.chance.choice([way for way in ways if way[0] in text])
    text = text.replace(old, new, 1).rstrip()
    padded = text.ljust(end - start)[: max(end - start, len(text))]
    prefix = case.content[: start - 2] + len(padded + "\n").to_bytes(2, "little")
    return prefix + padded.encode() + case.content[end:]


def npy_of_objects(case: Case) -> bytes:
    """An array of Python objects that make the canary when they are unpickled."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps([_Payload()])


NPY: list[Kind] = [npy_header, npy_header, npy_of_objects, not_a_number]

BY_SUFFIX: dict[str, list[Kind]] = {".json": JSON, ".jsonl": JSONL, ".safetensors": SAFETENSORS, ".npy": NPY}


def damage(case: Case) -> str:
    """Puts a damaged file in place of the sound one; returns the kind."""
    own = BY_SUFFIX.get(case.path.suffix, [])
    kind = case.chance.choice(own if own and case.chance.random() < 0.5 else ANY)
    content = kind(case)
    if content is not None:
        case.path.write_bytes(content)
    return kind.__name__
