"""What may change when work is resumed: either the result is that of work which was never interrupted, or it is refused."""

import os
import re
import signal

import pytest
from promises import PROMISES, name_of, words_of
from torch.optim import optimizer
from workshop import REFUSED, artefacts, differences

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import names_of, parse, settings_of
from plopfast.support.config import FREE

HERE = {"device", "offload"}  # free, but this machine has none other
RESULTS = ("adapter", "adapter_config", "metrics")
TRAINED = names_of(COMMANDS["train"])


def interrupted(shop, command, start, *words):
    """A folder in which a command was stopped after its second step."""
    steps = []

    def stop(*_):
        steps.append(0)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    hook = optimizer.register_optimizer_step_post_hook(stop)
    try:
        path = shop.folder(start)
        code, _ = shop.quietly(command, *words, "--out", path)
    finally:
        hook.remove()
    assert code == 130 and (path / "checkpoints").exists()
    return path.name


@pytest.fixture(scope="module")
def stopped(shop):
    return interrupted(shop, "train", "placed", *shop.words("train"))


@pytest.fixture(scope="module")
def whole(outcome):
    return outcome("train")


def other(name, command):
    """The last promise of an option, for such a command if there is one."""
    return ([promise for promise in PROMISES[name] if command in promise.reaches] or PROMISES[name])[-1]


def refused_for(name, found):
    """Whether the command says that the folder's own settings have another value of this one."""
    where, _, why = found.get(REFUSED, "").partition(f"{found['folder']}/config.json")
    return where and re.search(rf"[:;] {name}\b", why)  # not as part of a file's name


def test_resumed_as_it_is(shop, stopped, whole):
    found = shop.outcome("train", "--resume", start=stopped, bare=True)
    assert not {name for name in RESULTS if found[name] != whole[name]}


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_goes_on_as_it_began(shop, outcome, stopped, whole, name):
    promise = other(name, "train")
    if name in FREE - HERE:
        also = [word for word in words_of("train", promise.also) if name_of(word) in FREE]
        found = shop.outcome("train", *also, promise.other, "--resume", start=stopped, bare=True)
        assert not {key for key in RESULTS if found[key] != whole[key]}
        return
    words = (*words_of("train", promise.also), promise.other)
    found = shop.outcome("train", *words, "--resume", start=stopped, bare=True)
    impossible = promise.reaches.get("train") == REFUSED  # here
    assert REFUSED in found and (impossible or REFUSED not in outcome("train", *words))
    assert name in FREE or refused_for(name, found)
    again = shop.outcome("train", "--resume", start=found["folder"], bare=True)
    assert not {key for key in RESULTS if again[key] != whole[key]}, "the refusal has changed the folder"


@pytest.fixture(scope="module")
def stopped_run(shop):
    return interrupted(shop, "run", None, *shop.words("run"))


@pytest.mark.parametrize("name", sorted({*names_of(COMMANDS["run"])} - FREE))
def test_a_run_refuses_other_settings(shop, stopped_run, name):
    promise = other(name, "place")
    words = [word.format(shop=shop) for word in (*words_of("run", promise.also), promise.other)]
    assert settings_of(parse(["run", *words])), "it could begin so"
    found = shop.outcome("run", *words, "--resume", start=stopped_run, bare=True)
    assert refused_for(name, found)
    assert not differences(*(artefacts(shop.root / folder) for folder in (stopped_run, found["folder"])))
