"""Rows and prompts that splits share are counted, with the first places."""

import pytest
from test_formats import KINDS

from plopfast.data.overlap import overlaps, prompt_of
from plopfast.data.rows import DEMO, read_jsonl


def placed(split, *rows):
    return [(f"{split}:{number}", row) for number, row in enumerate(rows, 1)]


def pair(prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, **more}


def test_counts_and_first_places():
    train = placed("train", pair("x", "1"), pair("a", "1", id=1), pair("a", "1"), pair("b", "2"), {"text": "t"})
    test = placed(
        "test", pair("c", "1"), pair("b", "3"), pair("a", "1", id=2), {"text": "t"}, pair("a", "1"), pair("", "1")
    )
    (found,) = overlaps({"train": train, "test": test})
    assert (found.rows, found.prompts, found.total) == (3, 3, 6), "columns that are not used make no difference"
    assert found.same_row == ("train:2", "test:3") and found.same_prompt == ("train:2", "test:3") and found
    assert str(found).startswith("test:3: the same row as train:2; of 6 test rows, 3 are train rows too, and 3 have")
    (found,) = overlaps({"train": train[3:4], "test": test})
    assert (found.rows, found.prompts) == (0, 1) and "test:2: the same prompt as train:4" in str(found)
    (found,) = overlaps({"train": train[:1], "test": test})
    assert not found and found.same_row is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_compared(kind):
    (found,) = overlaps({"train": placed("train", KINDS[kind]), "test": placed("test", KINDS[kind] | {"id": 1})})
    assert found.rows == 1 and found.prompts == (kind != "text")


def test_what_a_prompt_is():
    ask, answer = KINDS["messages"]["messages"]
    turns = KINDS["sharegpt"]["conversations"]
    assert prompt_of({"messages": [ask, answer]}) == prompt_of({"messages": [ask, {**answer, "content": "b"}]})
    assert prompt_of({"messages": [ask, answer, ask, answer]}) != prompt_of({"messages": [ask, answer]})
    assert prompt_of({"messages": [ask, answer, ask]}) == prompt_of({"messages": [ask, answer]})
    assert prompt_of({"conversations": turns}) != prompt_of({"conversations": turns, "system": "s"})
    for name in ("input", "system", "history"):
        assert prompt_of(KINDS["alpaca"]) != prompt_of(KINDS["alpaca"] | {name: "s"})
    nothing = [
        {"text": "a"},
        pair("", "a"),
        {"messages": [answer]},
        {"messages": [ask]},
        {"instruction": "", "output": "a"},
    ]
    assert [prompt_of(row) for row in nothing] == [None] * 5


def test_the_demo_has_no_overlap():
    assert not any(overlaps({split: read_jsonl(path) for split, path in DEMO.items()}))


def test_the_same_conversation_in_other_forms():
    said = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q?"}], "name": None}, said[1]]
    forms = [
        {"messages": parts},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q?", "output": "A"},
        {"prompt": said[:1], "completion": said[1:]},
    ]
    for form in forms:
        (found,) = overlaps({"train": [("a:1", {"messages": said})], "test": [("b:1", form)]})
        assert (found.rows, found.prompts) == (1, 1), form
        assert not overlaps({"train": [("a:1", {"messages": said[:1]})], "test": [("b:1", form)]})[0].rows


def test_every_answered_prompt_of_a_training_row_counts():
    said = [
        {"role": role, "content": text}
        for role, text in (("user", "Q"), ("assistant", "A"), ("user", "Q2"), ("assistant", "A2"))
    ]
    (found,) = overlaps({"train": [("a:1", {"messages": said})], "test": [("b:1", {"messages": said[:2]})]})
    assert (found.rows, found.prompts, found.same_prompt) == (0, 1, ("a:1", "b:1"))
    (other,) = overlaps({"train": [("b:1", {"messages": said[:2]})], "test": [("a:1", {"messages": said})]})
    assert not other, "A2 is new there"
