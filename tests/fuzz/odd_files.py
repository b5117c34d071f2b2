"""Changes a file in place: torn, flipped, of another kind, a directory, a pipe, a link to itself; JSON and tensors from
within. Returns what was done, and whether no reader may accept it."""

import json
import os
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import odd_json


@dataclass
class Change:
    """`broken`: the file is none of its kind any more. `where` and `raw`: the place in its JSON, and the text now there."""

    what: str
    broken: bool = False
    where: odd_json.Path = ()
    raw: str = ""


def change(rng: random.Random, path: Path, swaps: list[Path]) -> Change:
    """Makes one change to the file; `swaps` are files of other kinds that may take its place."""
    inside = {".json": _json, ".jsonl": _json_lines, ".safetensors": _tensors}.get(path.suffix)
    if inside and rng.random() < 0.7:
        return inside(rng, path)
    whole = rng.choice(WHOLE)
    if whole is swap:
        return swap(rng, path, swaps)
    return whole(rng, path)


def _json(rng: random.Random, path: Path) -> Change:
    text, what, where, raw = odd_json.change(rng, json.loads(path.read_text()))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return Change(what, where=where, raw=raw)


def _json_lines(rng: random.Random, path: Path) -> Change:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    what = rng.choice(("change", "change", "change", "half", "twice", "drop"))
    if what == "change":
        lines[at], what, *_ = odd_json.change(rng, json.loads(lines[at]))
    elif what == "half":
        lines[at] = lines[at][: rng.randrange(len(lines[at]))]
    else:
        lines[at : at + 1] = [lines[at]] * 2 if what == "twice" else []
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    return Change(f"line {at + 1}: {what}")


def _tensors(rng: random.Random, path: Path) -> Change:
    """A safetensors file: 8 bytes of length, a JSON header, the tensors' bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.choice(("header", "header", "drop", "rename", "nan", "inf", "length", "metadata", "shape"))
    if kind == "length":
        length = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        return Change(f"header length {length}", broken=True)
    what, text = f"{kind} {name}", ""
    if kind == "header":
        text, what, *_ = odd_json.change(rng, header)
    elif kind == "metadata":
        facts = header.get("__metadata__") or {"format": "pt"}
        key = rng.choice([*facts])
        if facts[key].startswith("{") and rng.random() < 0.8:
            facts[key], what, *_ = odd_json.change(rng, json.loads(facts[key]))
        else:
            facts[key] = json.loads(rng.choice(odd_json.TEXTS))
        header["__metadata__"], what = facts, f"metadata {key}: {what}"
    elif kind == "drop":
        del header[name]  # its bytes stay, which the format does not allow
    elif kind == "rename":
        header[name + ".x"] = header.pop(name)
    elif kind == "shape":
        header[name]["shape"] = [*reversed(header[name]["shape"])]
    elif header[name]["dtype"] == "F32":
        begin, end = header[name]["data_offsets"]
        value = struct.pack("<f", float("nan" if kind == "nan" else "-inf"))
        values[begin:end] = value * ((end - begin) // 4)
    text = text or odd_json.dump(header)
    head = text.encode("utf-8", errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(head)) + head + values)
    return Change(f"tensors: {what}", broken=kind == "drop", raw=kind if kind in ("nan", "inf", "rename") else "")


def torn(rng: random.Random, path: Path) -> Change:
    data = path.read_bytes()
    keep = rng.randrange(max(1, len(data.rstrip()) - 1))
    path.write_bytes(data[:keep])
    return Change(f"{keep} of {len(data)} bytes", broken=path.suffix in (".json", ".safetensors"))


def flipped(rng: random.Random, path: Path) -> Change:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return Change("bits flipped")


def replaced(rng: random.Random, path: Path) -> Change:
    """The whole content is something else."""
    what, data = rng.choice((
        ("empty", b""), ("NUL bytes", bytes(64)), ("a zip's magic", b"PK\x03\x04" + bytes(60)), ("a pickle", b"\x80\x04K\x01."),
        ("Latin-1", b'{"caf\xe9": 1}'), ("blanks", b" \n\n\t"), ("deep", b"[" * 200_000), ("digits", b"9" * 5000),
    ))  # fmt: skip
    path.write_bytes(data)
    return Change(what, broken=path.suffix in (".json", ".safetensors"))


def recoded(rng: random.Random, path: Path) -> Change:
    codec = rng.choice(("utf-16", "utf-8-sig", "utf-32"))
    path.write_bytes(path.read_bytes().decode("latin-1").encode(codec))
    return Change(codec, broken=path.suffix == ".safetensors")


def no_file(rng: random.Random, path: Path) -> Change:
    """Something else than a file is there, or nothing."""
    if os.geteuid() and rng.random() < 0.2:  # root may read all
        path.chmod(0)
        return Change("no permission", broken=True)
    path.unlink()
    what = rng.choice(("directory", "link to itself", "pipe", "broken link", "missing", "link to a directory"))
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what == "broken link":
        path.symlink_to("nowhere")
    elif what == "link to a directory":
        path.symlink_to(path.parent)
    return Change(what, broken=what not in ("missing", "broken link"))


def swap(rng: random.Random, path: Path, swaps: list[Path]) -> Change:
    other = rng.choice(swaps)
    shutil.copyfile(other, path)
    return Change(f"the content of {other.name}", broken=other.suffix != path.suffix)


WHOLE = (torn, torn, flipped, flipped, replaced, recoded, no_file, no_file, swap)
