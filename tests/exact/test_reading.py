"""Files of random rows, written in every format and read back: the rows, their places and what is said of them."""

import csv
import gc
import json
import os
import random

import pytest

import plopfast as pf
from plopfast.data.formats import COLUMNS, OPTIONAL, USES, Renaming, format_of
from plopfast.data.readers import absolute
from plopfast.data.rows import read_jsonl
from plopfast.support.errors import ConfigError, DataError

TEXTS = (
    "a",
    "two words",
    'a "quoted" one',
    "a, b",
    "line\nbreak",
    "tab\there",
    "\u2028 separated",
    "é中😀",
    " blank ",
    "\ufeff",
)
TALK = (
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [{"role": "assistant", "content": "b"}],
)
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
VALUES = {  # what a column can hold, also what it should not
    "prompt": (*TEXTS[:2], "", TALK[0], None, 7, []), "completion": (*TEXTS[:2], "", TALK[1], None),
    "messages": (*TALK, "text", [], None, [{"content": "no role"}], [TALK[0][0], {"content": "no role"}]),
    "conversations": (TURNS, [{"role": "user", "content": "q"}], "x", [], [{"from": "human"}]),
    "instruction": ("do", "", None, 3), "output": ("done", "", 4), "input": ("it",), "text": ("words", "", None, 5),
    "id": (1,), "system": ("be",),
}  # fmt: skip


def plain_kind(row):
    """The kind of a row by the table of kinds in README: the first that fits."""

    def talk(value):
        return (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        )

    def turns(value):
        ok = isinstance(value, list) and value
        return ok and all(isinstance(t.get("role"), str) or {"from", "value"} <= t.keys() for t in value)

    def text(*names):
        return all(isinstance(row.get(name), str) for name in names)

    fits = {
        "pair": text("prompt", "completion"),
        "chat": talk(row.get("prompt")) and talk(row.get("completion")),
        "messages": talk(row.get("messages")),
        "sharegpt": turns(row.get("conversations")),
        "alpaca": text("instruction", "output"),
        "text": text("text"),
    }
    return next((kind for kind, it_fits in fits.items() if it_fits), None)


def test_the_first_kind_that_fits():
    rng, seen = random.Random(0), {}
    for _ in range(4000):
        names = rng.sample(sorted(VALUES), rng.randint(1, 5))
        row = {name: rng.choice(VALUES[name]) for name in names}
        kind = plain_kind(row)
        assert format_of(row) == kind, row
        seen[kind] = seen.get(kind, 0) + 1
    assert set(seen) == {*USES, None} and min(seen.values()) > 5, seen


def good_rows(rng, count, flat=False):
    rows = []
    for _ in range(count):
        kind = rng.choice(("pair", "text", "alpaca") if flat else ("pair", "text", "alpaca", "chat", "messages"))
        if kind in ("pair", "text", "alpaca"):
            names = {"pair": ("prompt", "completion"), "text": ("text",), "alpaca": ("instruction", "output")}[kind]
            row = {name: rng.choice(TEXTS) for name in names}
        else:
            row = {"prompt": TALK[0], "completion": TALK[1]} if kind == "chat" else {"messages": TALK[0]}
        if rng.random() < 0.4:
            row["id"] = rng.randint(0, 9)
        rows.append(dict(rng.sample(sorted(row.items(), key=str), len(row))))
    return rows


def write_lines(rng, path, rows, bad=()):
    """JSON lines with blank lines, a BOM, and line ends of either kind; returns where each row is."""
    text, places, line = "\ufeff" * rng.randint(0, 1), [], 1
    for row in rows:
        for _ in range(rng.choice((0, 0, 1, 2))):
            text, line = text + rng.choice(("\n", " \t\r\n")), line + 1
        text += (row if isinstance(row, str) else json.dumps(row, ensure_ascii=rng.random() < 0.5)) + rng.choice(
            ("\n", "\r\n")
        )
        places, line = [*places, f"{path}:{line}"], line + 1
    path.write_bytes((text if rng.random() < 0.5 else text.rstrip()).encode())
    return places


def write_array(rng, path, rows, bad=()):
    blanks = (" ", "\n", "\r\n\t", "")
    parts = [f"{rng.choice(blanks)}{json.dumps(row)}{rng.choice(blanks)}" for row in rows]
    path.write_text(f"{rng.choice(blanks)}[{','.join(parts)}]{rng.choice(blanks)}")
    return [f"{path}, row {number}" for number in range(1, len(rows) + 1)]


@pytest.mark.parametrize("suffix, write", [("jsonl", write_lines), ("NDJSON", write_lines), ("json", write_array)])
def test_json_is_read_as_it_was_written(tmp_path, suffix, write):
    rng = random.Random(1)
    for number in range(25):
        rows, path = good_rows(rng, rng.choice((1, 2, 9))), tmp_path / f"{number}.{suffix}"
        places = write(rng, path, rows)
        found = pf.read_rows(path)
        assert found.rows == list(zip(places, rows, strict=True))
        assert found.read == len(rows) and found.bad == []
        if write is write_lines:
            assert read_jsonl(path) == found.rows
        check_counts(found)


def check_counts(found):
    kinds = [plain_kind(row) for _, row in found.rows]
    assert dict(found.formats) == {kind: kinds.count(kind) for kind in kinds}
    unused = [name for kind, (_, row) in zip(kinds, found.rows, strict=True) for name in row if name not in USES[kind]]
    assert dict(found.unused) == {name: unused.count(name) for name in unused}
    part = found.part(found.rows[1::2])
    assert part.rows == found.rows[1::2] and part.read == found.read and sum(part.formats.values()) == len(part.rows)


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_tables_are_read_as_they_were_written(tmp_path, suffix, delimiter):
    rng, limit = random.Random(2), csv.field_size_limit()
    for number in range(20):
        path, names = tmp_path / f"{number}.{suffix}", rng.choice((("prompt", "completion"), ("id", "text"), ("text",)))
        rows = [{name: rng.choice(TEXTS[:-1]) for name in names} for _ in range(rng.choice((1, 2, 7)))]
        if number == 0:
            rows[0][names[0]] = "long " * 50_000
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(
                file, delimiter=delimiter, lineterminator=rng.choice(("\n", "\r\n")), quoting=csv.QUOTE_ALL
            )
            writer.writerow(f" {name} " for name in names)
            places = []
            for row in rows:
                file.flush()
                line = path.read_bytes().count(b"\n") + 1
                places.append(f"{path}:{line}")
                writer.writerow(row.values())
        assert pf.read_rows(path).rows == list(zip(places, rows, strict=True))
        assert csv.field_size_limit() == limit, "the limit of other readers is as before"
    for wrong in ("text,text\na,b\n", "prompt,completion\na\n", "prompt,completion\na,b,c\n", "a;b\n1;2\n"):
        (tmp_path / "wrong.csv").write_text(wrong)
        with pytest.raises(DataError):
            pf.read_rows(tmp_path / "wrong.csv")
        assert csv.field_size_limit() == limit


def test_more_rows_than_a_batch_of_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [[{"role": "user", "content": str(i), "name": None if i % 2 else "n"}, *TALK[1]] for i in range(2100)]
    tools = [None if i % 3 else [{"name": "f"}] for i in range(2100)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"messages": talk, "tools": tools}), path)
    found = pf.read_rows(path).rows
    assert [where for where, _ in found] == [f"{path}, row {i}" for i in range(1, 2101)]
    for number, (_, row) in enumerate(found):
        named = {} if number % 2 else {"name": "n"}
        assert row["messages"] == [{"role": "user", "content": str(number), **named}, *TALK[1]], "without nulls"
        assert ("tools" in row) == (number % 3 == 0)


BAD = ("{", "[1]", "7", "null", '{"prompt": 1}', '{"other": "x"}', '{"text": null}', '{"text": "a", "text": "b"}')


def test_bad_rows_are_refused_or_left_out_one_by_one(tmp_path):
    rng = random.Random(3)
    for number in range(30):
        rows = good_rows(rng, rng.randint(1, 6))
        mixed = rows + [rng.choice(BAD) for _ in range(rng.randint(1, 4))]
        rng.shuffle(mixed)
        path = tmp_path / f"{number}.jsonl"
        places = write_lines(rng, path, mixed)
        found = pf.read_rows(path, bad_rows="skip")
        is_bad = [isinstance(row, str) for row in mixed]
        assert found.rows == [(p, r) for p, r, b in zip(places, mixed, is_bad, strict=True) if not b]
        assert [line.split(": ")[0] for line in found.bad] == [p for p, b in zip(places, is_bad, strict=True) if b]
        assert found.read == len(mixed) == len(found.rows) + len(found.bad)
        with pytest.raises(DataError) as error:
            pf.read_rows(path)
        assert str(error.value).startswith(f"{places[is_bad.index(True)]}: "), "the first bad row"
    write_lines(rng, tmp_path / "bad.jsonl", BAD)
    write_lines(rng, tmp_path / "good.jsonl", rows)
    for sources in (["bad.jsonl"], ["good.jsonl", "bad.jsonl"], ["bad.jsonl", "good.jsonl"]):
        with pytest.raises(DataError):  # a source without a good row is a mistake, whatever the others hold
            pf.read_rows([tmp_path / name for name in sources], bad_rows="skip")


@pytest.mark.parametrize(
    "wrong", ['[{"text": "a"}] x', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}', '{"text": "a"}', "[1"]
)
def test_what_is_no_array(tmp_path, wrong):
    path = tmp_path / "rows.json"
    path.write_text(wrong)
    with pytest.raises(DataError):
        pf.read_rows(path, bad_rows="skip")


def test_several_sources_one_after_the_other_and_none_twice(tmp_path, monkeypatch):
    rng, monkey_rows = random.Random(4), []
    for name in ("a.jsonl", "b.json", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = good_rows(rng, 3)
        write = write_array if name.endswith(".json") else write_lines
        monkey_rows += zip(write(rng, tmp_path / name, rows), rows, strict=True)
    sources = [tmp_path / name for name in ("a.jsonl", "b.json", "sub/c.jsonl")]
    assert pf.read_rows(sources).rows == monkey_rows
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for twice in ("../a.jsonl", "../sub/../a.jsonl", str(tmp_path / "a.jsonl"), "../link.jsonl"):
        with pytest.raises(DataError):
            pf.read_rows([tmp_path / "a.jsonl", twice])
        with pytest.raises(DataError):
            pf.read_rows([twice, tmp_path / "b.json", "../a.jsonl"])
    assert absolute("c.jsonl") == os.path.realpath("c.jsonl")
    assert absolute("..:train") == f"{os.path.realpath('..')}:train" and absolute("owner/name:x") == "owner/name:x"


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_before(tmp_path, on):
    write_lines(random.Random(5), tmp_path / "good.jsonl", [{"text": "a"}])
    (tmp_path / "bad.jsonl").write_text("{")
    (gc.enable if on else gc.disable)()
    try:
        pf.read_rows(tmp_path / "good.jsonl")
        assert gc.isenabled() == on
        with pytest.raises(DataError):
            pf.read_rows(tmp_path / "bad.jsonl")
        assert gc.isenabled() == on
    finally:
        gc.enable()


def test_columns_are_renamed_as_in_a_plain_dict():
    """Also where they swap names, or the row has a column of the new name already."""
    rng = random.Random(6)
    for _ in range(400):
        targets = rng.sample(COLUMNS, rng.randint(1, 3))
        pool = ["question", "answer", "x", *COLUMNS]
        sources = rng.sample(pool, len(targets))
        renaming = Renaming(",".join(f" {t} = {s} " for t, s in zip(targets, sources, strict=True)))
        row = {name: rng.randint(0, 99) for name in rng.sample(pool, rng.randint(0, 8))}
        kept = dict(row)
        needed = [s for t, s in zip(targets, sources, strict=True) if t not in OPTIONAL]
        if not set(needed) <= row.keys():
            with pytest.raises(ValueError):
                renaming.apply(row)
        else:
            expected = {t: row[s] for t, s in zip(targets, sources, strict=True) if s in row}
            expected |= {name: value for name, value in row.items() if name not in {*targets, *sources}}
            assert renaming.apply(row) == expected and row == kept, "the caller's row stays"
        if set(sources) <= row.keys():
            renaming.check_seen()
        else:
            with pytest.raises(ConfigError):
                renaming.check_seen()
        for kind, uses in USES.items():
            if set(targets) <= uses:
                renaming.check(kind)
            else:
                with pytest.raises(ValueError):
                    renaming.check(kind)
    for wrong in ("prompt", "prompt=", "=x", "prompt=a,prompt=b", "prompt=a,text=a", "promt=a", "", ",", "prompt=a,"):
        with pytest.raises(ConfigError):
            Renaming(wrong)


def test_columns_of_json_text_become_values(tmp_path):
    path = tmp_path / "rows.jsonl"
    tools, messages = [{"name": "f"}], TALK[0]
    rows = [
        {"messages": json.dumps(messages), "tools": json.dumps(tools)}, {"messages": messages, "tools": " "},
        {"conversations": json.dumps(TURNS)}, {"instruction": "i", "output": "o", "history": json.dumps([["q", "a"]])},
        {"prompt": TALK[0], "completion": TALK[1], "chat_template_kwargs": '{"a": 1}'},
        {"prompt": "p", "completion": "c", "tools": "as it is"},
    ]  # fmt: skip
    write_lines(random.Random(7), path, rows)
    assert [row for _, row in pf.read_rows(path).rows] == [
        {"messages": messages, "tools": tools}, {"messages": messages}, {"conversations": TURNS},
        {"instruction": "i", "output": "o", "history": [["q", "a"]]},
        {"prompt": TALK[0], "completion": TALK[1], "chat_template_kwargs": {"a": 1}},
        {"prompt": "p", "completion": "c", "tools": "as it is"},
    ]  # fmt: skip
