"""The check that work goes on with the inputs that it began with."""

import pytest

from plopfast.support.errors import ConfigError, TrainingError
from plopfast.support.inputs import check_same, differences

KEPT = {"lr": 0.1, "rank": None, "the train file": "a" * 64, "the weights": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("changed", "phrases"),
    [
        ({}, []),
        ({"lr": 0.2}, ["lr was 0.1, is 0.2"]),
        ({"rank": 3}, ["rank was None, is 3"]),
        ({"the train file": "b" * 64}, ["the train file"]),
        ({"the weights": [1.0, 2.5], "lr": 1}, ["lr was 0.1, is 1", "the weights"]),
        ({"seed": 1}, ["seed was None, is 1"]),
    ],
    ids=str,
)
def test_differences(changed, phrases):
    assert differences(KEPT, {**KEPT, **changed}) == phrases


def test_an_input_that_is_gone_is_a_difference():
    assert differences(KEPT, {key: KEPT[key] for key in ("lr", "rank", "the weights")}) == ["the train file"]


def test_the_error_says_where_what_and_how_to_mend_it():
    check_same(KEPT, dict(KEPT), "somewhere")
    with pytest.raises(ConfigError, match=r"^runs/one: .*other inputs: lr was 0.1, is 9\. .* --overwrite"):
        check_same(KEPT, {**KEPT, "lr": 9}, "runs/one")
    with pytest.raises(TrainingError):
        check_same(KEPT, {}, "x", TrainingError)
