"""What may change when work is resumed: either the result is that of work which was never interrupted, or it is refused."""

import os
import signal

import pytest
from promises import PROMISES
from torch.optim import optimizer

from plopfast.cli.commands import COMMANDS
from plopfast.cli.options import names_of

FREE = {  # nothing that is learned depends on them
    "device", "threads", "timeout", "allow_overlap", "checkpointing", "offload", "save_every", "keep", "log_to",
    "search_trials",
}  # fmt: skip
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
def whole(shop):
    return shop.outcome("train")


def other(name, command="train"):
    """A value of an option that the work did not begin with."""
    promises = [promise for promise in PROMISES[name] if command in promise.reaches]
    return (promises or PROMISES[name])[-1].other


def test_resumed_as_it_is(shop, stopped, whole):
    found = shop.outcome("train", "--resume", start=stopped, bare=True)
    assert not {name for name in RESULTS if found[name] != whole[name]}


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_goes_on_as_it_began(shop, stopped, whole, name):
    found = shop.outcome("train", other(name), "--resume", start=stopped, bare=True)
    if name in FREE - HERE:
        assert not {key for key in RESULTS if found[key] != whole[key]}
    else:
        assert "refused" in found
        again = shop.outcome("train", "--resume", start=found["folder"], bare=True)
        assert not {key for key in RESULTS if again[key] != whole[key]}, "the refusal has changed the folder"


@pytest.fixture(scope="module")
def stopped_run(shop):
    return interrupted(shop, "run", None, *shop.words("run"))


@pytest.mark.parametrize("name", sorted({*names_of(COMMANDS["run"])} - FREE))
def test_a_run_refuses_other_settings(shop, stopped_run, name):
    assert "refused" in shop.outcome("run", other(name, "place"), "--resume", start=stopped_run, bare=True)
