"""Settings that reach their target: every option of every command changes what it promises, and nothing else."""

import pytest
from promises import ALIKE, AROUND, MADE, PROMISES, STAGES, Promise, words_of
from workshop import ACCEPTED, REFUSED, differences

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import names_of

CASES = [
    (command, name, promise, set(reaches.split()))
    for name, promises in PROMISES.items()
    for promise in promises
    for command, reaches in promise.reaches.items()
]
SLOW = (
    "audit",
    "estimate",
    "grpo",
    "run",
    "multi",
    "trial",
    "search",
)  # half a second and more; test_handed_on.py covers them quickly


def test_every_option_has_a_promise():
    offered = {(command, name) for command, entry in COMMANDS.items() for name in names_of(entry)}
    promised = {(command, name) for command, name, *_ in CASES}
    derived = {(command, name) for command, name in offered if command in (*STAGES, *ALIKE, "doctor")}
    assert offered - promised - derived == set(), "say in promises.py what these options change"
    assert promised - offered == set(), "promised of no option"
    for command, other in ALIKE.items():
        assert {*names_of(COMMANDS[command])} <= {name for one, name in promised if one == other}
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


def reached(command: str, promise: Promise) -> tuple[set[str], set[str]]:
    """What a whole must change by what its stages promise, and what else it may, as later stages rest on earlier ones."""
    by_stage = {stage: {*promise.reaches.get(stage, "").split()} - {"said"} for stage in STAGES[command]}
    touched = [stage for stage, of in by_stage.items() if of]
    if not touched:
        return set(), set()
    if ends := by_stage[touched[0]] & {REFUSED, ACCEPTED}:
        return ends, set()
    must = set().union(*by_stage.values()) - {REFUSED}  # eval alone is refused: for an adapter that is not this run's
    if command in ("run", "multi"):
        order = [stage for stage in MADE if stage in ("estimate", *STAGES[command])]
        later = order[order.index(touched[0]) + 1 :]
        may = {
            "passes",
            "multi",
            *promise.reaches.get("estimate", "").split(),
        }  # of what the run has, not of the defaults
        return must, may.union(*(MADE[stage].split() for stage in later))
    own = {*MADE["score"].split()} & must if command == "trial" else set()
    inside = {command} if must - own - AROUND else set()  # the files of its trainings
    return own | inside | (must & AROUND if command == "trial" else set()), {"passes", *[command] * bool(own)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in STAGES for name in names_of(COMMANDS[command])]
)
def test_a_whole_promises_what_its_stages_do(outcome, command: str, name: str):
    """An option changes what the stages make together where it changes what they make, and what rests on that."""
    stages = {command, *STAGES[command]}  # a promise for others alone, such as grpo, says nothing here
    promises = [promise for promise in PROMISES[name] if promise.like is None and stages & promise.reaches.keys()]
    if any(command in promise.reaches for promise in promises):
        return  # said there, and tested above
    others = [reached(command, promise)[0] for promise in promises]  # without what goes with them
    for promise in promises:
        also = words_of(command, promise.also)
        if command == "search" and any(word.startswith("--budget") for word in also):
            continue  # it refuses one
        must, may = reached(command, promise)
        one, other = outcome(command, *also, *promise.base.split()), outcome(command, *also, *promise.other.split())
        found = differences(one, other)
        if command == "search" and not found & {REFUSED, ACCEPTED}:
            must, may = must | {"search"}, may | AROUND  # search.json keeps the settings
        assert must <= found <= may.union(must, *others)
