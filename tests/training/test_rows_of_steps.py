"""Which rows each step takes: all of an epoch once, the same ones after a resume, the longest too."""

from itertools import islice

import pytest
from plain_training import rows_of

import plopfast as pf
from plopfast.training.plan import Plan


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"batch_rows": 3}, {"packing": True}, {"seed": 4}], ids=str)
def test_a_resumed_plan_goes_on(settings):
    plan = Plan(rows_of(20), [], pf.TrainConfig(max_steps=5, batch_tokens=40, **settings))
    groups = list(islice(plan.groups(), 40))
    for step in (0, 1, 3):
        assert list(islice(plan.groups(step), 10)) == groups[step * plan.groups_in_step :][:10]


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"batch_rows": 2}], ids=str)
def test_an_epoch_has_every_row_once(settings):
    rows, orders = rows_of(23), []
    for seed in (0, 1):
        plan = Plan(rows, [], pf.TrainConfig(epochs=2.0, batch_tokens=25, seed=seed, **settings))
        groups = list(islice(plan.groups(), plan.max_steps))
        assert sorted(i for group in groups for i in group) == sorted([*range(23)] * 2)
        orders.append(groups)
    assert orders[0] != orders[1]


def test_the_longest_row_just_fits():
    rows = rows_of(6)
    longest = max(len(row.tokens) for row in rows)
    assert Plan(rows, [], pf.TrainConfig(batch_tokens=longest)).batch_tokens == longest
    with pytest.raises(pf.PlopfastError):
        Plan(rows, [], pf.TrainConfig(batch_tokens=longest - 1))
