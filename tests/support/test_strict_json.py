"""The parser refuses what Python's own lets through, and says what."""

import pytest

from plopfast.support.strict_json import DEEPEST, StrictJSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ('{"x": {"b": 1, "a": 1, "a": 1}}', "the key 'a' comes twice"),
        ('["\\ud800"]', r"lone surrogate \\ud800"),
        ('{"\\udfff!": 1}', r"lone surrogate \\udfff"),
        ("[" * 1500 + "]" * 1500, "more than 100 deep"),
        ('{"a":' * 1500 + "1" + "}" * 1500, "more than 100 deep"),
        ("[" * 100_000 + "]" * 100_000, "more than 100 deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "more than 100 deep"),
        ("9" * 5000, "an integer of 5,000 digits"),
        ("-" + "9" * 2000, "digits"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e999", "1e999 is too large"),
        ("{} {}", "Extra data, column 3"),
        ('{"a": }', "not valid JSON .*column 7"),
        ('"a\nb"', "Invalid control character"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_refused(text, message):
    json = StrictJSON()
    with pytest.raises(ValueError, match=message):
        json.parse(text)
    assert json.parse('{"a": 1}') == {"a": 1}, "nothing is left of the error"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d\\ude00 \\\\ud800"', "\U0001f600 \\ud800"),  # a pair, and a backslash that is text
        ("[" * DEEPEST + "]" * DEEPEST, None),
        ("[" + ",".join(["[]"] * 300) + "]", [[]] * 300),
        ("9" * 1000, 10**1000 - 1),
        ('{"a": {"a": -1.5e3}}', {"a": {"a": -1500.0}}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not(text, value):
    found = StrictJSON().parse(text)
    assert value is None or found == value


def test_keys_are_kept_once():
    json = StrictJSON()
    (one,), (two,) = json.parse('{"a key": 1}'), json.parse('{"a key": 2}')
    assert one is two
