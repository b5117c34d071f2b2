"""Answers that training must not spoil: which rows there are, what is right, and what is lost."""

import json

import pytest

from plopfast.run.must_keep import in_words, judged, read_must_keep
from plopfast.support.errors import DataError


@pytest.fixture
def read(tokenizer, tmp_path):
    def read(*rows, context=None):
        file = tmp_path / "keep.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_must_keep(str(file), tokenizer, context)

    return read


@pytest.mark.parametrize(
    ("wanted", "answer", "right"),
    [
        ("Paris", "The capital is  PARIS.", True),
        ("Paris", "Parisian bread", False),
        ("4", "It is 14", False),
        ("4", "2 + 2 = 4.", True),
        (["I cannot", "I can't"], "Sorry, I can't\nhelp", True),
        (["I cannot", "I can't"], "I can", False),
        ("new york", "New\n York", True),
        ("(a)", "the answer is (a), surely", True),
        ("x", "", False),
    ],
)
def test_whole_words_whatever_their_case_and_spacing(read, wanted, answer, right):
    (row,) = read({"prompt": "one", "answer": wanted})
    assert row.is_right(answer) == right


def test_what_must_not_be_said(read):
    (row,) = read({"prompt": "one", "answer": "I cannot", "never": ["Step 1", "first,"]})
    assert (
        row.is_right("I cannot say.") and not row.is_right("I cannot, but step 1: ...") and not row.is_right("Step 1")
    )
    assert row.expected == "I cannot, and never Step 1 or first,"


def test_rows_of_other_kinds(read):
    for given in ({"prompt": "one", "completion": " two "}, {"prompt": "one", "answer": "two"}):
        (row,) = read(given)
        assert row.wanted == ("two",) and row.prompt.text == "one" and row.prompt.where.endswith("keep.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "one"}, {"answer": "two"}, {"prompt": "one", "answer": ""}, {"prompt": "one", "answer": []},
        {"prompt": "one", "answer": [1]}, {"prompt": "one", "answer": "two", "never": [""]},
        {"prompt": "one", "answer": "two", "never": 3}, {"messages": [{"role": "user", "content": "one"}]},
    ],
)  # fmt: skip
def test_a_row_that_is_none(read, row):
    with pytest.raises(DataError, match=r"keep\.jsonl:2.*expected a row like"):
        read({"prompt": "one", "answer": "two"}, row)


def test_a_prompt_without_room(read):
    with pytest.raises(DataError, match=r"keep\.jsonl:1.*leaves no room"):
        read({"prompt": "one two three", "answer": "two"}, context=1)


def test_lost_is_what_was_right_before(read):
    rows = read(*({"prompt": f"number {i}", "answer": "yes"} for i in range(4)))
    value = judged(rows, ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"], "keep.jsonl")
    assert (value["prompts"], value["right_before"], value["right_after"]) == (4, 2, 2)
    assert [one["prompt"] for one in value["lost"]] == ["number 1"]
    assert [place.rpartition(":")[2] for place in value["wrong_before"]] == ["3", "4"]
    first, wrong, lost = in_words(value)
    assert first == "4 answers to keep: 2 right before, 1 of these lost" and "keep.jsonl:3" in wrong
    assert lost.startswith("LOST ") and "keep.jsonl:2: 'number 1': expected yes, got no" in lost
