"""An error at any step of a public function leaves everything as it was found, and the same call can be made again.

What may be otherwise is declared in calls_of_*.py (`halfway`). Some steps of each call are tried here, drawn by a seed, with
an error that no code expects and with Ctrl-C; `-m slow` tries up to 400 of them, evenly spread.
"""

import random
import re

import pytest
from face_calls import CASES, World
from planted_errors import PlantedError, PlantedInterrupt, is_planted, planted
from snapshot import differences, own_scratch, seen, snapshot

RETURNING = [case for case in CASES if not case.raises]


def undeclared(before, after, allowed):
    return {p: w for p, w in differences(before, after).items() if not any(re.search(a, p) for a in allowed)}


def try_steps(case, folder, tokenizer, choose):
    """Makes the call without an error, and then once for each step that `choose` takes of all, with an error there."""
    model = lambda: folder / f"of-{len(list(folder.iterdir()))}"  # noqa: E731
    home = model()
    home.mkdir()
    with own_scratch(home):
        call, _ = case.start(World(home, tokenizer))
        call()  # what is loaded and cached at the first call is none of the steps
    home = model()
    home.mkdir()
    with own_scratch(home):
        world = World(home, tokenizer)
        call, _ = case.start(world)
        with planted(0) as steps:
            result = call()
        expected = seen((result, case.look(world)), times=False)
        world = None
        for number in choose(len(steps)):
            at, had = number, 0
            while had is not None:
                if world is None or case.changes or had:
                    home = model()
                    home.mkdir()
                    with own_scratch(home):
                        world = World(home, tokenizer)
                        call, arguments = case.start(world)
                with own_scratch(home):
                    had = _fail_once(case, world, call, arguments, at, expected)
                # something may be cached by now, so that there are fewer steps: then the one that is as far in
                at, before = number * (had or 0) // len(steps), at
                assert had is None or 0 < at < before, f"{had} of {len(steps)} steps are left"


def _fail_once(case, world, call, arguments, number, expected):
    """Checks an error at a step. Returns None, or the number of all steps where these are fewer, so that none was raised."""
    error = PlantedInterrupt if number % 2 else PlantedError
    before = snapshot(world.model, world.folder, arguments)
    raised = None
    with planted(number, error) as steps:
        try:
            call()
        except (Exception, PlantedInterrupt) as caught:
            raised = caught
    if raised is None and len(steps) < number:
        return len(steps)
    where = f"{error.__name__} at step {number}, {steps[-1]}"
    assert is_planted(raised), f"{where}: {raised!r} came instead"
    del raised
    left = undeclared(before, snapshot(world.model, world.folder, arguments, since=before), case.halfway)
    assert not left, f"{where}: not as found: {dict(list(left.items())[:6])}"
    if case.anew:
        world = World(world.folder, world.tokenizer)
        call, _ = case.start(world)
    again = seen((call(), case.look(world)), times=False)
    assert relative(again, world) == relative(expected, world), f"{where}: another result the second time"


def relative(what, world):
    return re.sub(rf"{re.escape(str(world.folder.parent))}/of-\d+", "HOME", repr(what))


@pytest.mark.parametrize("case", RETURNING, ids=str)
def test_an_error_at_some_steps(case, tmp_path, tokenizer):
    few = 1 if case.dear else 4

    def choose(steps):
        draw = random.Random(str(case))
        return sorted({steps, *draw.sample(range(1, steps + 1), min(few, steps))} - {0})

    try_steps(case, tmp_path, tokenizer, choose)


@pytest.mark.slow
@pytest.mark.parametrize("case", RETURNING, ids=str)
def test_an_error_at_steps_all_over(case, tmp_path, tokenizer):
    try_steps(case, tmp_path, tokenizer, lambda steps: range(1, steps + 1, 1 + steps // 400))
