"""Records of a training: what a resumed one keeps of them."""

import json

import pytest

from plopfast.training.records import Records

ADDED = [
    {"step": 1, "loss": 0.5},
    {"step": 2, "loss": 0.25},
    {"step": 2, "valid_loss": 0.125},
    {"step": 3, "loss": None},
]


@pytest.mark.parametrize("step", range(5))
def test_a_resumed_training_keeps_those_up_to_its_checkpoint(step, tmp_path):
    records = Records(tmp_path)
    records.begin(0)
    for record in ADDED:
        records.add(record)
    with records.path.open("a") as file:
        file.write('{"step": 1, "lo')  # cut short
    again = Records(tmp_path)
    again.begin(step)
    expected = [record for record in ADDED if record["step"] <= step]
    assert again.history == expected
    again.add({"step": step + 1, "loss": 9.0})
    kept = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert kept == [*expected, {"step": step + 1, "loss": 9.0}] == again.history
