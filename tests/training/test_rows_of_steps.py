"""Which rows each step takes: all of an epoch once, the same ones after a resume, the longest too."""

import random
from itertools import islice

import pytest
from plain_training import rows_of

import plopfast as pf
from plopfast.data.example import Example
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


DRAWN = random.Random(0)
LENGTHS = [round(10 * 4 ** DRAWN.random()) for _ in range(96)]
SIZES = [{"batch_rows": 8}, {"batch_tokens": 160}]


def epochs_of(settings, seeds):
    """The steps of one epoch of 96 rows of 10 to 40 tokens, for each seed."""
    rows = [Example.after_prompt(range(3, 3 + length), length - 2, "x", "row") for length in LENGTHS]
    for seed in range(seeds):
        plan = Plan(rows, [], pf.TrainConfig(epochs=1, seed=seed, **settings))
        yield list(islice(plan.groups(), plan.max_steps))


@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_lengths_have_no_course_over_the_steps(settings):
    """Each step's mean length, over 400 seeds, is that of any other step; so are the first and the last one's."""
    means = [[sum(LENGTHS[i] for i in step) / len(step) for step in epoch] for epoch in epochs_of(settings, 400)]
    every = [mean for epoch in means for mean in epoch]
    middle = sum(every) / len(every)
    error = (sum((mean - middle) ** 2 for mean in every) / len(every) / len(means)) ** 0.5
    for of_step in zip(*(epoch[: min(map(len, means))] for epoch in means), strict=True):
        assert abs(sum(of_step) / len(of_step) - middle) < 4 * error


@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_each_row_is_as_often_in_the_first_step(settings):
    """A step is drawn alike from all rows: over 800 seeds, a row is in the first one as often as its group is one of many."""
    count = dict.fromkeys(range(96), 0)
    groups = 0
    for epoch in epochs_of(settings, 800):
        groups = len(epoch)
        for index in epoch[0]:
            count[index] += 1
    expected = 800 / groups
    assert all(abs(found - expected) < 5 * expected**0.5 for found in count.values())


@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_steps_have_little_padding(settings):
    for epoch in epochs_of(settings, 20):
        positions = sum(len(step) * max(LENGTHS[i] for i in step) for step in epoch)
        assert 1 - sum(LENGTHS) / positions < 0.06, "rows in random order have 35 %"


@pytest.mark.parametrize("count", [57, 65, 90])
def test_no_row_is_left_over_for_a_step_of_its_own(count):
    """Otherwise that row, always the longest, would count as much as eight others."""
    plan = Plan(rows_of(count), [], pf.TrainConfig())
    epoch = list(islice(plan.groups(), -(-count // 8)))
    assert sorted(i for step in epoch for i in step) == list(range(count))
    assert max(map(len, epoch)) - min(map(len, epoch)) <= 1 and max(map(len, epoch)) <= 8
