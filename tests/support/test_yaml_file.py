"""Settings as YAML: what they mean is what the same settings mean as JSON, and what JSON refuses is refused, with the line."""

import json

import pytest

from plopfast.cli.options import parse, settings_of
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError, FileError
from plopfast.support.settings_file import load_settings, read_mapping
from plopfast.support.strict_json import DEEPEST
from plopfast.support.strict_yaml import LARGEST, parse_yaml


@pytest.fixture
def written(tmp_path):
    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_bytes(text.encode(errors="surrogatepass"))
        return path

    return write


SETTINGS = {
    "train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl", "lr": 5e-4, "rank": 8, "alpha": 16, "rslora": True, "dora": False,
    "epochs": None, "model": "no", "columns": "prompt=question", "arms": "plop, all", "lrs": "5e-4,1e-3", "seeds": "0,1,2",
    "budget": "", "log_to": "none", "bad_rows": "skip", "reward": "regex:^\\d+: \"é\U0001f600\"#1$", "clip": 1e-30,
}  # fmt: skip
BY_HAND = r"""
# comments, and plain words as people write them
train:
  - a.jsonl
  - b.jsonl
test: c.jsonl
lr: 5e-4
rank: 8
alpha: 16
rslora: true
dora: False
epochs:
model: no
columns: prompt=question
arms: plop, all
lrs: 5e-4,1e-3
seeds: 0,1,2
budget: ""
log_to: none
bad_rows: skip
reward: 'regex:^\d+: "é😀"#1$'
clip: 1E-30
"""


@pytest.mark.parametrize(
    "text",
    [
        BY_HAND,
        "---\n" + BY_HAND + "...\n",
        "%YAML 1.2\n---\n" + BY_HAND,
        "settings:\n" + BY_HAND.replace("\n", "\n  "),
        BY_HAND.replace("\n", "\r\n"),
        "\ufeff" + BY_HAND,
        json.dumps(SETTINGS),  # all JSON is YAML: as one line, ...
        json.dumps(SETTINGS, indent=2, ensure_ascii=False),
    ],
    ids=["plain", "markers", "directive", "settings", "crlf", "bom", "json", "json indented"],
)
@pytest.mark.parametrize("ending", [".yaml", ".yml", ".YAML"])
def test_the_same_settings_make_the_same_run(text, ending, written):
    file, as_json = written(text, f"a{ending}"), written(json.dumps(SETTINGS), "a.json")
    assert load_settings(file) == load_settings(as_json)
    found = settings_of(parse(["run", "--config", str(file), "--k", "2"]))
    assert found == settings_of(parse(["run", "--config", str(as_json), "--k", "2"])) != RunConfig()
    assert (found.lr, found.model, found.train, found.k) == (5e-4, "no", ("a.jsonl", "b.jsonl"), 2)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("5e-4", 5e-4), ("1e3", 1000.0), ("+.5E+2", 50.0), ("1.", 1.0), ("-0", 0), ("12", 12), ("+1", 1), ("010", 10), ("0o17", 15),
        ("0xFf", 255), ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("OFF", "OFF"), ("y", "y"), ("true", True), ("False", False),
        ("TRUE", True), ("tRue", "tRue"), ("null", None), ("~", None), ("", None), ("none", "none"), ("1_000", "1_000"),
        ("12:30", "12:30"), ("12:30:45.5", "12:30:45.5"), ("2026-01-31", "2026-01-31"), ("0b11", "0b11"), ("=", "="), ("nan", "nan"), ("Infinity", "Infinity"),
        ("1e", "1e"), (".", "."), ("1.2.3", "1.2.3"), ("'5e-4'", "5e-4"), ('"12"', "12"), ("'null'", "null"), ('"\\u00e9\\n"', "é\n"),
        ('"\\ud83d\\ude00"', "\U0001f600"), ("|\n  a\n  b\n", "a\nb\n"), (">\n  1\n  2\n", "1 2\n"), ("[1, no, []]", [1, "no", []]), ("{b: {}}", {"b": {}}),
        ("'<<'", "<<"), ("<<", "<<"), ("a # b", "a"), ("a#b", "a#b"), ("'*a'", "*a"),
    ],
    ids=str,
)  # fmt: skip
def test_plain_words_mean_what_yaml_1_2_says(words, value):
    (found,) = parse_yaml(f"a: {words}").values()
    assert found == value and type(found) is type(value)


LAUGHS = "a: &a [ha, ha]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)
REFUSED = {
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' comes twice",
    "x:\n  b: 1\n  'b': 2": "line 3: the key 'b' comes twice",
    LAUGHS: "line 1: &a: anchors and aliases are not read",
    "a: 1\nb: *x": "line 2: .x: anchors and aliases are not read",
    "&k a: 1": "line 1: &k: anchors",
    "<<: {rank: 3}": "line 1: the key <<: merge keys are not read",
    "a: 1\n---\nb: 2": "line 2: a second document begins",
    "a: 1\n...\n---\n": "line 3: a second document begins",
    "a: !!python/object/apply:os.system [exit]": "line 1: the tag .*python/object/.*: tags are not read",
    "a: !!str 3": "line 1: the tag",
    "a: ! 3": "line 1: the tag !:",
    "%TAG ! tag:x:\n---\n!a b: 3": "line 3: the tag tag:x:a",
    "1: 2": "line 1: the key 1 is no text; put quotes",
    "a: 1\nnull: 2": "line 2: the key None is no text",
    "true: 2": "line 1: the key True is no text",
    "? [a]\n: 1": "the key .* is no text",
    "a: .nan": "line 1: .nan is no number",
    "a:\n- -.INF": "line 2: -.INF is no number",
    "a: 1e999": "line 1: the number 1e999 is too large",
    f"a: {'9' * 21}": "line 1: an integer of 21 digits; write it as a string",
    f"a: 0x{'f' * 5000}": "line 1: an integer of 5,002 digits",
    '\n"\\ud800": 1': r"line 2: the lone surrogate \\ud800",
    'a: "\\ude00\\ud83d"': r"line 1: the lone surrogate \\ude00",
    "a: 1\nb: \x1b[31m": r"line 2: the character '\\x1b', which YAML does not allow",
    "a: '\x00'": r"line 1: the character '\\x00'",
    "a: 1\nb: 'c\u2028'": r'line 2: the character U\+2028; write "\\u2028"',
    "a: 1\x85b: 2": r"line 1: the character U\+0085",
    "\ufeff\ufeffa: 1": r"line 1: the character U\+FEFF",
    'a: "\\UFFFFFFFF"': "line 1: not valid YAML",
    "a: \ud800": "cannot be read as UTF-8",
    "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1): "line 1: lists and objects more than 100 deep",
    "[" * 500_000: "more than 100 deep",
    "- " * 200_000: "more than 100 deep",
    '{"a": ' * 100_000: "more than 100 deep",
    "": "line 1: nothing in it",
    "\n# only this\n": "line 1: nothing in it",
    "a: 1\n\tb: 2": "line 2: not valid YAML .*column 1",
    "a: b: c": r"line 1: not valid YAML \(mapping values are not allowed here, column 5\)",
    "a: [1,\n2": "line 2: not valid YAML",
    "a: 'x": "line 1: not valid YAML",
    "%YAML 1.1\n---\na: 1": "line 1: %YAML 1.1 asks for other rules",
    "a: " + "x" * LARGEST: "characters, and YAML may have 1,048,576",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:25]))
def test_what_is_refused(text, written):
    """Each within a moment, also what grows without end under a reader that follows aliases."""
    path = written(text)
    with pytest.raises(FileError, match=REFUSED[text]) as caught:
        read_mapping(path)
    said = str(caught.value)
    assert said.startswith((f"{path}, line ", f"{path}: cannot be read as UTF-8")) and len(said) < len(str(path)) + 200


def test_as_deep_as_json():
    value = parse_yaml("[" * DEEPEST + "]" * DEEPEST)
    for _ in range(DEEPEST):
        (value,) = value or [None]
    assert value is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3", "unknown setting 'rnak'; did you mean 'rank'"),
        ("rank: three", "rank: expected int, got 'three'"),
        ("rank: '3'", "rank: expected int, got '3'"),
        ("dora: no", "dora: expected bool, got 'no'"),
        ("dora: 0", "dora: expected bool, got 0"),
        ("seeds: 0", "seeds: expected str, got 0; put quotes around it"),
        ("lr: 'x'", "lr: expected float, got 'x'$"),
        ("- rank: 3", "expected a YAML mapping of settings, got list"),
        ("---", "expected a YAML mapping of settings, got NoneType"),
        ("settings: 3", "expected a YAML mapping"),
    ],
)
def test_what_is_no_setting(text, message, written):
    path = written(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_ending_decides(written):
    assert read_mapping(written("[no, 1e1]", "jobs.yml")) == ["no", 10.0]
    assert read_mapping(written("[1e1]", "jobs.json")) == read_mapping(written("[1e1]", "jobs")) == [10.0]
    with pytest.raises(FileError, match="not valid JSON"):
        read_mapping(written("rank: 3", "a.json"))


def test_files_that_cannot_be_read(tmp_path, written):
    with pytest.raises(FileError, match=r"no\.yaml: no such file; it is written by you"):
        read_mapping(tmp_path / "no.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(FileError, match="expected a file, got a folder"):
        read_mapping(tmp_path / "folder.yaml")
    (path := written("")).write_bytes(b"a: \xff")
    with pytest.raises(FileError, match="cannot be read as UTF-8 text"):
        read_mapping(path)
