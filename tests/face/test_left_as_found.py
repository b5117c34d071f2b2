"""Every public function leaves what it was given, the process and the folder as it found them, returning or raising.

What a function is there to change is declared beside its call in calls_of_*.py, and nothing else may differ.
"""

import re

import pytest
from face_calls import CASES, World
from snapshot import as_found, differences, own_scratch, snapshot

import plopfast as pf

FIRST = [r"^warning filters$", r"^logging$"]  # what packages that a first call imports may change
VALUES = {"PlopfastError", "BackendError", "TrainResult", "Use"}  # nothing that they are given can be wrong


def test_the_whole_public_face_is_called():
    returning, raising = ({c.name for c in CASES if bool(c.raises) == wanted} for wanted in (False, True))
    assert set(pf.__all__) - returning == set(), "add a call to calls_of_*.py"
    assert set(pf.__all__) - VALUES - raising - {"unload", "unmerge_adapter"} == set(), (
        "add a call that raises to calls_of_*.py"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_left_as_found(case, tmp_path, tokenizer):
    for home, more in (tmp_path / "first", FIRST), (tmp_path / "then", []):
        home.mkdir()
        with own_scratch(home):
            made_once(case, World(home, tokenizer), more)


def made_once(case, world, more):
    call, arguments = case.start(world)
    before = snapshot(world.model, world.folder, arguments)
    with as_found(world.model, world.folder, arguments, [*case.changes, *more]):
        if case.raises:
            with pytest.raises(case.raises):
                call()
        else:
            kept = call()  # noqa: F841  # so that nothing is freed early
    left = differences(before, snapshot(world.model, world.folder, arguments, since=before))
    for change in () if case.raises else case.changes:
        assert any(re.search(change, place) for place in left), f"{change} is declared, and does not happen"
