"""Rewards that are included: what they give 1 for, what they refuse; and functions, which only their names' files hold."""

import json
import re
import sys

import pytest

from plopfast.integrations.rewards import (
    Exact,
    FitsSchema,
    Matches,
    Number,
    absolute,
    answer_of,
    built_in,
    last_number,
    load_function,
)
from plopfast.support.errors import ConfigError, FileError
from plopfast.support.grpo_settings import names_code

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("reward", "text", "answer", "right"),
    [
        (Exact(), " animal\n", "animal", True), (Exact(), "an animal", "animal", False), (Exact(), "Animal", "animal", False),
        (Exact(), "12", 12, True), (Exact(), "", "", True),
        (Number(), "3 and 4", "4", True), (Number(), "4 and 3", "4", False), (Number(), "none", "4", False),
        (Number(), "so 1,024.", "1024", True), (Number(), "-7", "7", False), (Number(), "7.0", "7", True),
        (Number(), "-7", -7, True), (Number(), "7", "it is 3, no, 7", True), (Number(), "1e400", "4", False),
        (Number(0.01), "3.14", "3.1416", True), (Number(0.001), "3.14", "3.1416", False), (Number(1), "5", "4", True),
        (Matches("^b"), "bab", None, True), (Matches("^b"), "ab", None, False),
        (Matches("<a>{answer}</a>$"), "it is <a>1+1</a>", "1+1", True), (Matches("<a>{answer}</a>$"), "<a>11</a>", "1+1", False),
        (Matches(r"\d{2}"), "12", None, True),
        (FitsSchema(SCHEMA), '{"n": 1}', None, True), (FitsSchema(SCHEMA), '{"n": 0}', None, False),
        (FitsSchema(SCHEMA), '```json\n{"n": 2}\n```', None, True), (FitsSchema(SCHEMA), 'see {"n": 2}', None, False),
        (FitsSchema(SCHEMA), '{"n": 1, "n": 2}', None, False), (FitsSchema(SCHEMA), "{}", None, False),
    ],
)  # fmt: skip
def test_what_is_right(reward, text, answer, right):
    columns = {} if answer is None else {"answer": [answer]}
    assert reward([text], **columns) == reward([chat(text)], **columns) == [float(right)]


def test_a_batch_is_judged_row_by_row():
    assert Exact()(["a", "b", "a"], answer=["a", "a", "b"], prompts=["p"] * 3, trainer_state=None) == [1.0, 0.0, 0.0]


def test_the_answer_is_a_column_or_the_completion_of_supervised_rows():
    assert Exact()([" x"], completion=["x "]) == [1.0]
    assert Exact()(["x", "y"], completion=["z", "y"], answer=["x", None]) == [1.0, 1.0]
    assert answer_of({"answer": 0, "completion": "x"}) == 0


def test_the_last_number_of_a_text():
    found = {
        "1,024 of 3.5e3": 3500.0,
        "no": None,
        "3.": 3.0,
        ".5": 0.5,
        "1,23": 23.0,
        "x-4": 4.0,
        "e5": 5.0,
        "": None,
        "=+2": 2.0,
        "3-4": 4.0,
        "=-7": -7.0,
        "(-1.5)": -1.5,
        "1,0245": 245.0,
    }
    assert {text: last_number(text) for text in found} == found


def test_rows_that_cannot_be_judged():
    for reward, row in (
        (Exact(), {"prompt": "p"}), (Exact(), {"answer": ["a"]}), (Exact(), {"answer": True}), (Number(), {"answer": "four"}),
        (Matches("{answer}"), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reward.name):
            reward.check(row)
    for reward in (Matches("a"), FitsSchema(SCHEMA)):
        reward.check({})
    Number().check({"answer": 4})


def test_a_name_gives_its_reward(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert built_in("exact") == Exact() and built_in("number") == Number() and built_in("number:0.5") == Number(0.5)
    assert built_in("regex:a:b") == Matches("a:b") and built_in(f"json:{file}").schema == SCHEMA


@pytest.mark.parametrize(
    "name", ["exactly", "exact:1", "number:", "number:-1", "number:x", "number:nan", "regex", "regex:", "regex:(", "json", "json:", "a:b"],
)  # fmt: skip
def test_odd_names(name):
    with pytest.raises(ConfigError, match="reward"):
        built_in(name)


def test_the_nearest_name_is_told():
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        built_in("exakt")


def test_schemas_that_are_none(tmp_path):
    file = tmp_path / "schema.json"
    with pytest.raises(FileError, match=re.escape(str(file))):
        built_in(f"json:{file}")
    for odd in ('{"type": "nothing"}', "[1]"):
        file.write_text(odd)
        with pytest.raises(ConfigError, match=re.escape(f"{file}: not a JSON schema")):
            built_in(f"json:{file}")


def test_a_schema_elsewhere_is_not_fetched(monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(ConfigError, match="cannot be applied"):
        FitsSchema({"$ref": "https://example.org/schema.json"})(["1"])


def test_without_jsonschema(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match="pip install jsonschema"):
        FitsSchema(SCHEMA)


def test_a_function_of_a_file_and_of_a_module(tmp_path, monkeypatch):
    file = tmp_path / "grading.py"
    file.write_text("def grade(completions, **_):\n    return [len(c) for c in completions]\n\nword = 'no function'\n")
    assert load_function(f"{file}:grade")(["abc"]) == [3]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_function("grading:grade")(["ab"]) == [2]
    for name, said in (
        (f"{file}:grad", "did you mean 'grade'"), (f"{file}:word", "no function"), (f"{file}:", "expected"), (f"{file}:a b", "expected"),
        (f"{tmp_path}/gone.py:grade", "no such file"), ("nothing_of_this_name:grade", "no module"), ("grade", "expected"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            load_function(name)


def test_a_files_own_errors_are_shown(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError):
        load_function(f"{tmp_path / 'broken.py'}:grade")


def test_what_is_code():
    assert [names_code(name) for name in ("a.py:f", "a.b:f", "exakt", "exact", "number:1", "regex:a:b", "json:a.py", None)] == [
        True, True, True, False, False, False, False, False,
    ]  # fmt: skip


def test_files_have_the_same_name_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a.py:f") == f"{tmp_path}/a.py:f" and absolute("json:s.json") == f"json:{tmp_path}/s.json"
    for name in ("exact", "number:0.1", "regex:a.py:f", "module:f", None):
        assert absolute(name) == name
