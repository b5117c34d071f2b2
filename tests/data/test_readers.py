"""Files to rows: every format of files, each hostile line with its place, what is skipped and what is said."""

import builtins
import gc
import json
import os
import sys

import pytest

import plopfast as pf
from plopfast.data.readers import READERS, absolute
from plopfast.data.rows import DEMO
from plopfast.support.errors import ConfigError, DataError

GOOD = '{"prompt": "a", "completion": "b"}'
PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "é\n", "completion": 'c "d", e'}]
HOSTILE = {
    "surrogate": (b'{"text": "\\ud800"}', "lone surrogate"),
    "nested 1,500": (b'{"text": "a", "x": ' + b"[" * 1500 + b"]" * 1500 + b"}", "100 deep"),
    "nested 100,000": (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "100 deep"),
    "digits": (b'{"text": "a", "x": ' + b"7" * 5000 + b"}", "an integer of 5,000 digits"),
    "twice": (b'{"text": "a", "text": "b"}', "the key 'text' comes twice"),
    "NaN": (b'{"text": "a", "x": NaN}', "NaN is not JSON"),
    "infinity": (b'{"text": "a", "x": -Infinity}', "-Infinity is not JSON"),
    "a string": (b'"text"', "expected a JSON object, got str"),
    "an array": (b'[{"text": "a"}]', r"got list; a file that is one array is named \.json"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not UTF-8 .byte 0xe9, the line's byte 11"),
    "UTF-8 of a surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "Extra data, column 14"),
    "broken off": (b'{"text": "a', "not valid JSON"),
    "no kind": (b'{"txt": "a"}', r"got the keys \['txt'\]"),
}


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def read(*paths, **options):
    return [row for _, row in pf.read_rows(paths, **options).rows]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lines_are_named_with_their_place(tmp_path, name):
    line, message = HOSTILE[name]
    path = write(tmp_path / "d.jsonl", GOOD, line, GOOD)
    for reading in (pf.read_jsonl, pf.read_rows):
        with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{message}"):
            reading(path)
    rows = pf.read_rows(path, bad_rows="skip")
    assert [where[-2:] for where, _ in rows.rows] == [":1", ":3"] and len(rows.bad) == 1 and ":2: " in rows.bad[0]


def test_lines_that_are_odd_but_good(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + '{"text": "a\u2028b\u0085"}\r\n\r\n \t{"text": "\\ud83d\\ude00"} \n'.encode()
        + b'{"text": ""}'
    )
    rows = pf.read_jsonl(path)
    assert [row["text"] for _, row in rows] == ["a\u2028b\u0085", "\U0001f600", ""]
    assert [where.rpartition(":")[2] for where, _ in rows] == ["1", "3", "4"]


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"d{suffix.upper()}"
    if suffix in (".jsonl", ".ndjson"):
        write(path, *map(json.dumps, PAIRS))
    elif suffix == ".json":
        path.write_text("\ufeff" + json.dumps(PAIRS, indent=1))
    elif suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(PAIRS), path)
    else:
        tab = "\t" if suffix == ".tsv" else ","
        write(path, f"\ufeffprompt{tab}completion\r", f"a{tab}b\r", "\r", f'"é\n"{tab}"c ""d"", e"\r')
    rows = pf.read_rows(path)
    assert [row for _, row in rows.rows] == PAIRS
    first, second = {".jsonl": (":1", ":2"), ".ndjson": (":1", ":2"), ".csv": (":2", ":4"), ".tsv": (":2", ":4")}.get(
        suffix, (", row 1", ", row 2")
    )
    assert [where for where, _ in rows.rows] == [f"{path}{first}", f"{path}{second}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}', "expected an array of objects.*named .jsonl"),
        (f"[{GOOD}, 3]", "row 2: expected a JSON object, got int"),
        (f'[{GOOD},\n {{"text": "a", "text": "b"}}]', "row 2: the key 'text' comes twice"),
        (f"[{GOOD},]", "row 2: not valid JSON"),
        (f"[{GOOD}", "row 1: expected a comma or the array's end after it: line 1, column 36 .the end of the file"),
        (f"[{GOOD}\n{GOOD}]", "row 1: expected a comma.* line 2, column 1"),
        (f"[{GOOD}] x", "expected nothing after the array's end: line 1, column"),
        ("[" + "[" * 100_000 + "]" * 100_000 + "]", "row 1: .*100 deep"),
        (f'[{GOOD},\n{{"text": }}]', "row 2: not valid JSON .*line 2, column 10"),
        ("[]", "no rows"),
        ("", "no rows"),
    ],
    ids=lambda value: value[:30],
)
def test_arrays_that_are_broken(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError, match=rf"d\.json(:|,) ?{message}"):
        pf.read_rows(tmp_path / "d.json")


def test_bad_rows_of_an_array_can_be_skipped(tmp_path):
    (tmp_path / "d.json").write_text(f'[{{"x": NaN}}, {GOOD}, 3, {{"text": "\\ud800"}}]')
    rows = pf.read_rows(tmp_path / "d.json", bad_rows="skip")
    assert len(rows.rows) == 1 and [message.partition(": ")[0][-5:] for message in rows.bad] == [
        "row 1",
        "row 3",
        "row 4",
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["prompt,completion", "a,b", "c"], ":3: expected 2 cells, as in the header .* got 1"),
        (["prompt,completion", "a,b,c"], ":2: expected 2 cells, as in the header .* got 3"),
        (["prompt,completion", '"a\nb",c', "x"], ":4: expected 2 cells"),
        (["prompt,prompt", "a,b"], ":1: the header names 'prompt' twice"),
        (["prompt,completion", 'a,"b" c'], ":2: not valid CSV"),
        (["prompt,completion", "a,b", 'a,"b'], ":3: not valid CSV"),
        (["a dog,animal", "a cat,animal"], r":2: expected a row like .* got the keys \['a dog', 'animal'\]"),
        ([b"prompt,completion", b"\xe9,b"], ":2: not UTF-8"),
        (["prompt,completion"], ": no rows"),
        (
            ["prompt;completion", "a;b"],
            ":1: the header is one column, 'prompt;completion': cells are .* by commas in a .csv file, not by ';'",
        ),
        (["prompt\tcompletion", "a\tb"], r":1: the header is one column, .* not by '\\t'"),
        ([b"prompt,completion\ra,b\r"], ":1: a carriage return without a line feed"),
        (["messages", "no json"], ":2: messages: expected a list"),
    ],
    ids=str,
)
def test_tables_that_are_broken(tmp_path, lines, message):
    with pytest.raises(DataError, match=rf"d\.csv{message}"):
        pf.read_rows(write(tmp_path / "d.csv", *lines))


def test_a_long_cell_and_json_in_a_cell(tmp_path):
    chat = json.dumps([{"role": "user", "content": "x" * 200_000}]).replace('"', '""')
    (row,) = read(write(tmp_path / "d.csv", "messages,tools", f'"{chat}",'))
    assert len(row["messages"][0]["content"]) == 200_000 and "tools" not in row


def test_parquet_drops_the_nulls_that_arrow_adds(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    parquet.write_table(pa.Table.from_pylist([{"messages": messages, "tools": None}] * 3), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [{"messages": messages}] * 3
    write(tmp_path / "d.jsonl", '{"messages": [{"role": "assistant", "content": null}], "tools": null}')
    assert read(tmp_path / "d.jsonl") == [{"messages": [{"role": "assistant", "content": None}], "tools": None}]
    write(tmp_path / "broken.parquet", "PAR1")
    with pytest.raises(DataError, match=r"broken\.parquet: not a whole Parquet file"):
        read(tmp_path / "broken.parquet")
    with pytest.raises(DataError, match=r"absent\.parquet: no such data file"):
        read(tmp_path / "absent.parquet")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    write(tmp_path / "d.parquet", "")
    source = tmp_path / "d.parquet" if package == "pyarrow" else tmp_path
    with pytest.raises(DataError, match=rf"needs the package {package}: pip install 'plopfast\[data\]'"):
        read(source)


def test_lines_need_no_packages(tmp_path, monkeypatch):
    imports = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a: pytest.fail(name) if name in ("pyarrow", "datasets") else imports(name, *a),
    )
    assert read(write(tmp_path / "d.jsonl", GOOD))


def test_folders_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": name, "x": None}]) for name in ("train", "validation", "extra")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    parts["extra"].save_to_disk(tmp_path / "one")
    folder = str(tmp_path / "dict")
    assert read(folder) == [{"text": "train"}] and read(folder, split="valid") == [{"text": "validation"}]
    assert read(f"{folder}:extra") == [{"text": "extra"}] == read(tmp_path / "one")
    assert pf.read_rows(f"{folder}:extra").rows[0][0] == f"{folder}:extra, row 1"
    with pytest.raises(
        DataError, match="no split 'test'; it has train, validation, extra: choose one with .*dict:SPLIT"
    ):
        read(folder, split="test")
    with pytest.raises(DataError, match="without splits; leave out :train"):
        read(f"{tmp_path / 'one'}:train")
    with pytest.raises(DataError, match="dict:en:train: a folder of save_to_disk has no configs; leave out en:"):
        read(f"{folder}:en:train")
    with pytest.raises(DataError, match="dict:a:b:train: expected .*dict, .*dict:SPLIT or .*dict:CONFIG:SPLIT"):
        read(f"{folder}:a:b:train")


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    write(folder / "test.jsonl", '{"prompt": "c", "completion": "d"}')
    assert read(folder) == [json.loads(GOOD)] and read(folder, split="test")[0]["prompt"] == "c"
    images = tmp_path / "images"
    images.mkdir()
    write(images / "a.png", b"\x89PNG")
    with pytest.raises(DataError, match="holds data of the kind 'imagefolder'; read are json"):
        read(images)


def test_a_file_without_a_suffix_is_json_lines(tmp_path):
    write(tmp_path / "rows", *map(json.dumps, PAIRS))
    assert [row for _, row in pf.read_rows(tmp_path / "rows").rows] == PAIRS


def test_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.yaml", "a")
    write(tmp_path / "d.txt", "a")
    (tmp_path / "empty").mkdir()
    for source, message in {
        "absent/d.jsonl": "no such data file",
        "d.yaml": r"unknown kind of data file '\.yaml'; known are \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet, a folder",
        "d.txt": "unknown kind .* plain text goes to --unlabeled",
        "absent": "no such file or folder; known are .*owner/name:split",
        "a/b/c": "no such file or folder; known",
        "a/b:c:d:e": "no such file or folder; known",
    }.items():
        with pytest.raises(DataError, match=rf"^{source}: {message}"):
            read(source)


def test_a_hub_id_is_looked_up_only_where_no_such_path_exists(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    asked = []

    def ask(name, config):
        asked.append((name, config))
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset_builder", ask)
    for source, call in {
        "own/set": ("own/set", None),
        "own/set:dev": ("own/set", None),
        "own/set:en:dev": ("own/set", "en"),
    }.items():
        with pytest.raises(DataError, match=rf"^{source}: no such file or folder, and the hub's .* \(no network\)"):
            read(source)
        assert asked.pop() == call and absolute(source) == source
    (tmp_path / "own").mkdir()
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "own" / "set")
    assert read("own/set") == [{"text": "a"}] and not asked
    assert absolute("own/set") == str(tmp_path / "own" / "set") and absolute("own/x.jsonl") == str(
        tmp_path / "own" / "x.jsonl"
    )
    assert absolute("own/set:dev") == f"{tmp_path / 'own' / 'set'}:dev"


def test_several_files_with_renamed_columns(tmp_path):
    one = write(tmp_path / "a.jsonl", '{"q": "1", "a": "2", "id": 1}', '{"q": "3", "a": "4"}')
    two = write(tmp_path / "b.csv", "q,a,source", "5,6,s")
    rows = pf.read_rows([one, two], columns="prompt=q,completion=a")
    assert [row["prompt"] for _, row in rows.rows] == ["1", "3", "5"]
    assert rows.formats == {"pair": 3} and rows.unused == {"id": 1, "source": 1}
    assert rows.lines() == [
        "3 rows: prompt and completion as text", "columns that are not used: 'id' (1 row), 'source' (1 row)"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'question'"):
        pf.read_rows([one, two], columns="prompt=question,completion=a")
    with pytest.raises(DataError, match=r"empty\.csv: no rows"):
        pf.read_rows([one, write(tmp_path / "empty.csv", "q,a")], columns="prompt=q,completion=a")


def test_bad_rows_are_counted_with_the_first_reasons(tmp_path):
    path = write(tmp_path / "d.jsonl", *["{"] * 5, GOOD, '{"text": "a"}')
    rows = pf.read_rows(path, bad_rows="skip")
    said = rows.lines()
    assert said[0] == "2 rows: prompt and completion as text (1), plain text (1)"
    assert said[1].startswith("5 of 7 rows are bad and left out: ") and ":3: " in said[1] and ":4: " not in said[1]
    with pytest.raises(DataError, match=r"bad\.jsonl: all 2 rows are bad; the first: .*bad\.jsonl:1: not valid"):
        pf.read_rows([path, write(tmp_path / "bad.jsonl", "{", "{")], bad_rows="skip")
    with pytest.raises(ConfigError, match="bad_rows: expected error or skip, got 'drop'"):
        pf.read_rows(path, bad_rows="drop")
    with pytest.raises(ConfigError, match="split: expected train, valid or test, got 'validation'"):
        pf.read_rows(path, split="validation")
    with pytest.raises(DataError, match="sources: expected the name of a file or several, got none"):
        pf.read_rows([])


def test_part_counts_anew(tmp_path):
    rows = pf.read_rows(write(tmp_path / "d.jsonl", GOOD, '{"text": "a", "id": 1}'))
    part = rows.part(rows.rows[1:])
    assert part.formats == {"text": 1} and part.unused == {"id": 1} and len(part.rows) == 1


def test_the_demo_is_as_it_was():
    rows = pf.read_rows(DEMO["valid"])
    assert rows.rows == pf.read_jsonl(DEMO["valid"]) and rows.lines() == ["366 rows: prompt and completion as text"]


def test_the_collector_of_cycles_is_on_again_after_an_error(tmp_path):
    with pytest.raises(DataError):
        pf.read_rows(write(tmp_path / "d.jsonl", "{"))
    assert gc.isenabled()


@pytest.mark.parametrize("suffix", READERS)
def test_pipes_and_devices_are_no_data_files(tmp_path, suffix):
    """Reading one could last for ever."""
    os.mkfifo(pipe := tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=f"{pipe}: expected a file, got a pipe, socket or device"):
        read(pipe)


def test_lines_of_a_table_that_are_not_utf8_can_be_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\na,b\n\xe9,c\n"d\ne \xff\n\xff",g\nh,i\n')
    with pytest.raises(DataError, match=r"a\.csv:3: not UTF-8 .byte 0xe9"):
        read(path)
    found = pf.read_rows(path, bad_rows="skip")
    assert (
        [row["prompt"] for _, row in found.rows] == ["a", "h"] and len(found.bad) == 2 and "a.csv:5: " in found.bad[1]
    )
    path.write_bytes(b"pr\xe9mpt\na\n")
    with pytest.raises(DataError, match=r"a\.csv:1: not UTF-8"):
        pf.read_rows(path, bad_rows="skip")


def test_a_file_given_twice(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl: given twice for train"):
        pf.read_rows([path, "./a.jsonl"])


def test_names_and_columns_that_cannot_be():
    with pytest.raises(ConfigError, match="columns: expected text such as .* got {'prompt'"):
        pf.read_rows("a.jsonl", columns={"prompt": "question"})
    for name, shown in ("a\x00.jsonl", r"a\\x00"), ("a\x1b[0m.jsonl", r"a\\x1b"), ("\udcff.jsonl", r"\\udcff"):
        with pytest.raises(DataError, match=f"without control characters, got '{shown}"):
            pf.read_rows(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "---\nlicense_link: https://x.y\nconfigs:\n- config_name: default\n  data_files: http://127.0.0.1/x.jsonl\n---\n"),
        (".huggingface.yaml", "configs:\n- config_name: default\n  data_files: zip://a::http://127.0.0.1/x.zip\n"),
        ("README.md", "---\nconfigs: !!python/object/apply:os.system [true]\n---\n"),
    ],
)  # fmt: skip
def test_settings_of_a_folder_reach_nothing_outside(tmp_path, name, text):
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / name).write_text(text)
    with pytest.raises(DataError, match="outside of the folder|could not determine a constructor"):
        read(folder)
