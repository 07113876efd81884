"""What is done to a file: bits, bytes, lengths; values of JSON; headers of safetensors. All from one generator."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = [None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -1.0, "", "x", [], {}, [[]], {"a": 1}, [1, "a"]]
LARGE = [100_000, 10_000_000, 1_000_000_000, 2**31, 2**63, 10**30, 1e308, -(10**18)]
STRANGE = [
    float("nan"), float("inf"), "../canary.safetensors", "{canary}", "/etc/hostname", "..", "a\0b", "\ud800", "é" * 300,
    "(a+)+$", "[", [[[[[[[[]]]]]]]], list(range(1000)), "9" * 5000, {"": {"": ""}},
]  # fmt: skip


def _places(body: Any, path: tuple = ()) -> list[tuple]:
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    found = [(*path, key) for key, _ in items]
    for key, item in body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ():
        if len(found) < 2000:
            found += _places(item, (*path, key))
    return found


def change_json(text: str, rng: random.Random, canary: Path) -> str:
    """The text with one value, key or bracket changed."""
    body = json.loads(text)
    places = _places(body)
    kind = rng.choices(
        ["value", "large", "strange", "near", "delete", "rename", "twice", "deep", "top"], [6, 4, 4, 4, 2, 2, 1, 1, 1]
    )[0]
    if kind == "deep":
        return text.replace(":", ':{"a":' * 5000, 1) if rng.random() < 0.5 else "[" * 100_000
    if kind == "top" or not places:
        return json.dumps(rng.choice([[body], None, 3, "x", [], {}]))
    # Few places near the top, which decide, are as likely as the many below.
    depth = rng.choice(sorted({len(path) for path in places}))
    path = rng.choice([one for one in places if len(one) == depth])
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(key) + rng.choice(["", "_", "x"])] = parent.pop(key)
    elif kind == "twice" and isinstance(parent, dict):
        mark = "\x01again"
        parent[mark] = rng.choice(SMALL)
        return json.dumps(body).replace(json.dumps(mark), json.dumps(key))
    elif kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = old + rng.choice([-1, 1]) if isinstance(old, int) else old * rng.choice([0.5, 2, 1.0000001])
    else:
        pool = {"large": LARGE, "strange": STRANGE}.get(kind, SMALL)
        new = rng.choice(pool)
        parent[key] = str(canary) if new == "{canary}" else new
    return json.dumps(body)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a bit flipped, a byte set, a piece moved, a tail cut or added."""
    out, kind = bytearray(data), rng.choices(["flip", "set", "move", "cut", "add", "many"], [8, 3, 2, 1, 1, 1])[0]
    place = rng.randrange(len(out)) if out else 0
    # The first bytes, where headers are, are as likely as all others.
    place = rng.randrange(min(len(out), 512)) if out and rng.random() < 0.5 else place
    if kind == "cut" or not out:
        return bytes(out[:place])
    if kind == "add":
        return bytes(out) + rng.randbytes(rng.randrange(1, 20))
    if kind == "move":
        other, size = rng.randrange(len(out)), rng.randrange(1, 17)
        out[place : place + size] = data[other : other + size][: len(out[place : place + size])].ljust(
            len(out[place : place + size]), b"\0"
        )
        return bytes(out)
    for _ in range(rng.randrange(2, 9) if kind == "many" else 1):
        out[place] = rng.randrange(256) if kind == "set" else out[place] ^ 1 << rng.randrange(8)
        place = rng.randrange(len(out))
    return bytes(out)


def change_header(data: bytes, rng: random.Random, canary: Path) -> bytes:
    """A safetensors file with its header changed as JSON, or the length before it."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        length = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1, 10**8])
        return length.to_bytes(8, "little") + data[8:]
    header = change_json(data[8 : 8 + size].decode(), rng, canary).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def harm(folder: Path, rng: random.Random, canary: Path) -> tuple[str, str]:
    """Changes one file of the folder; says which, and how."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    ways: list[tuple[Path, str]] = [(file, "bytes") for file in files]
    ways += [(file, "json") for file in files if file.suffix in (".json", ".jsonl")] * 3
    ways += [(file, "header") for file in files if file.suffix == ".safetensors"] * 2
    file, way = rng.choice(ways)
    data = file.read_bytes()
    changes: dict[str, Callable[[], bytes]] = {
        "bytes": lambda: change_bytes(data, rng),
        "json": lambda: _lines(data, rng, canary, file.suffix).encode("utf-8", "surrogatepass"),
        "header": lambda: change_header(data, rng, canary),
    }
    file.write_bytes(changes[way]())
    return str(file.relative_to(folder)), way


def _lines(data: bytes, rng: random.Random, canary: Path, suffix: str) -> str:
    if suffix == ".json":
        return change_json(data.decode(), rng, canary)
    lines = data.decode().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = change_json(lines[number], rng, canary)
    return "\n".join(lines) + "\n"
