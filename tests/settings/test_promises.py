"""Settings that reach their target: every option of every command changes what it promises, and nothing else."""

import pytest
from promises import PROMISES, STAGES, Promise, words_of
from workshop import differences

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import names_of

CASES = [
    (command, name, promise, set(reaches.split()))
    for name, promises in PROMISES.items()
    for promise in promises
    for command, reaches in promise.reaches.items()
]
SLOW = ("audit", "estimate", "trial", "search")  # half a second and more; test_handed_on.py covers them quickly


def test_every_option_has_a_promise():
    offered = {(command, name) for command, entry in COMMANDS.items() for name in names_of(entry)}
    promised = {(command, name) for command, name, *_ in CASES}
    derived = {(command, name) for command, name in offered if command in (*STAGES, "doctor")}
    assert offered - promised - derived == set(), "say in promises.py what these options change"
    assert promised - offered == set(), "promised of no option"
    of_stages = {name for command, name in promised if command in ("score", "place", "train", "eval")}
    own = {name for command, name in promised if command in STAGES}
    assert {name for command, name in derived if command in STAGES} <= of_stages | own


@pytest.mark.parametrize(
    ("command", "promise", "reaches"),
    [
        pytest.param(
            command,
            promise,
            reaches,
            id=f"{command}-{promise.other}-{promise.also}",
            marks=[pytest.mark.slow] * (command in SLOW),
        )
        for command, name, promise, reaches in CASES
    ],
)
def test_an_option_changes_what_it_promises(outcome, command: str, promise: Promise, reaches: set[str]):
    also = words_of(command, promise.also)
    one = outcome(command, *also, *promise.base.split())
    other = outcome(command, *also, *promise.other.split())
    found = differences(one, other)
    assert (found if "passes" in reaches or not reaches else found - {"passes"}) == reaches


@pytest.mark.parametrize(
    ("command", "promise"),
    [
        pytest.param(command, promise, id=f"{command}-{promise.other}", marks=[pytest.mark.slow] * (command in SLOW))
        for command, _, promise, _ in CASES
        if promise.like is not None
    ],
)
def test_an_option_does_what_other_words_do(outcome, command: str, promise: Promise):
    """Such as skipping a bad row: the same artefacts are made of a file without it."""
    one = outcome(command, *words_of(command, promise.also), *promise.other.split())
    assert not differences(one, outcome(command, *words_of(command, promise.like)))


def test_a_step_that_is_skipped_teaches_nothing(shop):
    """A training that ends with the spoiled row is the one that ends before that row, where it is sound."""

    def trained(name: str, steps: int):
        file = shop.root / f"{name}.jsonl"
        words = (f"--train={file}", "--nonfinite=skip", "--schedule=constant", "--warmup=0", "--batch-rows=3")
        return shop.outcome("train", *words, f"--max-steps={steps}", f"--eval-every={steps}")

    (skipped,) = [record["step"] for record in trained("nan", 15)["metrics"] if record.get("skipped")]
    with_it, without = trained("nan", skipped), trained("sound", skipped - 1)
    assert skipped > 1 and with_it["adapter"] == without["adapter"]
    assert trained("sound", skipped)["adapter"] != without["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in STAGES for name in names_of(COMMANDS[command])]
)
def test_a_whole_promises_what_its_stages_do(outcome, command: str, name: str):
    """Where an option changes a stage's files, it changes what the stages make together."""
    for promise in PROMISES[name]:
        reached = set().union(*(promise.reaches.get(stage, "").split() for stage in STAGES[command]))
        also = words_of(command, promise.also)
        found = differences(
            outcome(command, *also, *promise.base.split()), outcome(command, *also, *promise.other.split())
        )
        assert (found & {command, *reached} != set()) if reached else not found
