"""What a row asks, for people."""

import pytest

from plopfast.data.shown import prompt_for_people

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"prompt": "What is it?", "completion": " A finch"}, "What is it?"),
        ({"messages": [USER, SAID]}, "Hi"),
        (
            {"messages": [USER, SAID, {"role": "user", "content": "And?"}, SAID]},
            "user: Hi\nassistant: Hello\nuser: And?",
        ),
        ({"prompt": [USER], "completion": [SAID]}, "Hi"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "Hi"),
        ({"instruction": "Say it", "input": "", "output": "it"}, "Say it"),
        ({"text": "plain"}, ""),
        ({"messages": [{"role": "user", "content": 7}, SAID]}, ""),  # refused where it is learned
    ],
)
def test_the_question_of_each_kind_of_row(row, shown):
    assert prompt_for_people(row) == shown


def test_the_end_of_a_long_question():
    text = "".join(map(str, range(200)))
    assert prompt_for_people({"prompt": text, "completion": "x"}, most=9) == f"…{text[-9:]}"
    assert prompt_for_people({"prompt": text[:9], "completion": "x"}, most=9) == text[:9]
