"""Every kind of row is recognised, columns are renamed, and a row of no kind is told what would be one."""

import pytest

import plopfast as pf
from plopfast.data.formats import COLUMNS, FORMATS, NAMES, USES, Renaming, format_of, recognise
from plopfast.support.errors import ConfigError, DataError
from plopfast.support.strict_json import StrictJSON

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
KINDS = {
    "pair": {"prompt": "q", "completion": "a"},
    "chat": {"prompt": [ASK], "completion": [ANSWER]},
    "messages": {"messages": [ASK, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a", "input": ""},
    "text": {"text": "q"},
}


@pytest.mark.parametrize("kind", USES)
def test_each_kind_is_recognised_and_named(kind):
    assert format_of(KINDS[kind]) == kind and recognise(dict(KINDS[kind]), StrictJSON()) == kind
    assert KINDS[kind].keys() <= USES[kind] <= set(COLUMNS) and kind in NAMES
    assert all(f'"{column}"' in FORMATS for column in KINDS[kind])


def test_the_first_kind_that_fits_wins():
    row = {}
    for kind in reversed(USES):
        row |= KINDS[kind]
        assert format_of(row) == kind
    assert format_of(KINDS["messages"] | {"prompt": "q"}) == "messages"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"messages": ["text"]},
        {"conversations": [{"from": "human", "value": None}]},
        {"prompt": "q", "completion": [ANSWER]},
        {"instruction": "q"},
        {"text": 3},
        {},
    ],
    ids=str,
)
def test_rows_of_no_kind(row):
    assert format_of(row) is None
    with pytest.raises(ValueError, match=r"expected a row like .*conversations.* got the keys \[.*--columns"):
        recognise(row, StrictJSON())


def test_a_wrong_type_is_named():
    with pytest.raises(ValueError, match=r"got the keys \['completion', 'prompt'\] \(completion is a number\)"):
        recognise({"prompt": "q", "completion": 3}, StrictJSON())
    with pytest.raises(ValueError, match="prompt is null, completion is true"):
        recognise({"prompt": None, "completion": True}, StrictJSON())


def test_a_message_may_lack_its_content():
    assert format_of({"messages": [ASK, {"role": "assistant", "tool_calls": []}]}) == "messages"


def test_columns_that_hold_json_as_text():
    row = {"messages": '[{"role": "user", "content": "q"}]', "tools": '[{"name": "f"}]', "documents": " "}
    assert recognise(row, StrictJSON()) == "messages"
    assert row == {"messages": [ASK], "tools": [{"name": "f"}]}
    for kind in ("chat", "messages", "sharegpt"):
        row = KINDS[kind] | {"tools": "[1]"}
        assert recognise(row, StrictJSON()) == kind and row["tools"] == [1]
    row = KINDS["pair"] | {"tools": "a hammer"}
    assert recognise(row, StrictJSON()) == "pair" and row["tools"] == "a hammer", "not a column of this kind"
    with pytest.raises(ValueError, match=r"^tools: expected a list .* as text: not valid JSON"):
        recognise(KINDS["messages"] | {"tools": "a hammer"}, StrictJSON())
    with pytest.raises(ValueError, match=r"^conversations: .*the key 'from' comes twice"):
        recognise({"conversations": '[{"from": "a", "from": "b"}]'}, StrictJSON())


def test_renaming():
    renaming = Renaming("prompt=question, completion=answer")
    row = {"question": "q", "answer": "a", "id": 7, "prompt": "another"}
    assert renaming.apply(row) == {"prompt": "q", "completion": "a", "id": 7}
    assert Renaming("prompt=completion,completion=prompt").apply(KINDS["pair"]) == {"prompt": "a", "completion": "q"}
    with pytest.raises(ValueError, match=r"no column 'answer', which --columns names; the row has \['question'\]"):
        renaming.apply({"question": "q"})
    with pytest.raises(ValueError, match="names text, but the row is read as prompt and completion as text"):
        Renaming("text=story").check("pair")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("promt=q", "got 'promt'; did you mean 'prompt'"),
        ("prompt=q,prompt=r", "'prompt' comes twice"),
        ("prompt=q,completion=q", "'q' comes twice"),
        ("prompt", "expected pairs such as .* got 'prompt'"),
        ("prompt=", "expected pairs"),
        ("", "expected pairs"),
        ("prompt=q,", "expected pairs"),
    ],
)
def test_renamings_that_cannot_be(columns, message, tmp_path):
    with pytest.raises(ConfigError, match=f"columns: .*{message}|columns: {message}"):
        pf.read_rows(tmp_path, columns=columns)


def test_optional_columns_may_be_missing_in_some_rows(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"q": "1", "a": "2", "c": "3"}\n{"q": "1", "a": "2"}\n')
    columns = "instruction=q,input=c,output=a"
    rows = pf.read_rows(path, columns=columns).rows
    assert [row.get("input") for _, row in rows] == ["3", None]
    with pytest.raises(ConfigError, match="no row has a column 'd'"):
        pf.read_rows(path, columns=columns.replace("input=c", "input=d"))
    with pytest.raises(DataError, match=r"d\.jsonl:1: no column 'x'"):
        pf.read_rows(path, columns="instruction=x,output=a")
