"""Every public function leaves what it was given, the process and the folder as it found them, returning or raising.

What a function is there to change is declared beside its call in calls_of_*.py, and nothing else may differ.
"""

import contextlib
import re

import pytest
import torch
from face_calls import CASES, World
from snapshot import as_found, differences, own_scratch, snapshot

import plopfast as pf

VALUES = {"PlopfastError", "BackendError", "TrainResult"}  # nothing that they are given can be wrong


def test_the_whole_public_face_is_called():
    returning, raising = ({c.name for c in CASES if bool(c.raises) == wanted} for wanted in (False, True))
    assert set(pf.__all__) - returning == set(), "add a call to calls_of_*.py"
    assert set(pf.__all__) - VALUES - raising - {"unload"} == set(), "add a call that raises to calls_of_*.py"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_left_as_found(case, tmp_path, tokenizer):
    with own_scratch(tmp_path):
        world = World(tmp_path, tokenizer)
        call, arguments = case.start(world)
        before = snapshot(world.model, tmp_path, arguments)
        with as_found(world.model, tmp_path, arguments, case.changes):
            if case.raises:
                with pytest.raises(case.raises):
                    call()
            else:
                kept = call()  # noqa: F841  # so that nothing is freed early
        left = differences(before, snapshot(world.model, tmp_path, arguments))
        for change in () if case.raises else case.changes:
            assert any(re.search(change, place) for place in left), f"{change} is declared, and does not happen"


def test_a_snapshot_sees_what_it_is_for(tmp_path, tokenizer):
    """One disturbance after the other is seen, and is named."""
    import os
    import random
    import signal
    import threading
    import warnings

    import numpy as np

    world = World(tmp_path, tokenizer)
    model, layer = world.model, world.model.model.layers[0]
    stop, rows = threading.Event(), [{"a": [1]}]
    disturbances = {
        "training": lambda: layer.mlp.train(),
        "forward_pre_hooks": lambda: layer.register_forward_pre_hook(lambda *_: None),
        "backward_hooks": lambda: layer.register_full_backward_hook(lambda *_: None),
        "forward": lambda: setattr(layer.mlp, "forward", layer.mlp.forward),
        " is": lambda: setattr(layer, "mlp", model.model.layers[1].mlp),
        "requires_grad": lambda: model.lm_head.weight.requires_grad_(False),
        "gradient": lambda: setattr(model.model.layers[1].input_layernorm.weight, "grad", None),
        "values": lambda: model.lm_head.weight.data[0, 0].add_(1),
        "config use_cache": lambda: setattr(model.config, "use_cache", False),
        "default dtype": lambda: torch.set_default_dtype(torch.float64),
        "deterministic": lambda: torch.use_deterministic_algorithms(True),
        "generator of torch": lambda: torch.rand(1),
        "generator of numpy": lambda: np.random.rand(),
        "generator of random": lambda: random.random(),
        "warning filters": lambda: warnings.filterwarnings("error", "never said"),
        "environment PLOPFAST_TEST": lambda: os.environ.update(PLOPFAST_TEST="1"),
        "working folder": lambda: os.chdir("/"),
        "signal handlers": lambda: signal.signal(signal.SIGUSR1, lambda *_: None),
        "threads": lambda: threading.Thread(target=stop.wait, daemon=True).start(),
        "open file": lambda: os.open(tmp_path, os.O_RDONLY),
        "folder new": lambda: (tmp_path / "new").mkdir(),
        "argument 0": lambda: rows[0]["a"].append(2),
    }
    held = torch.get_default_dtype(), os.getcwd(), warnings.filters[:], signal.getsignal(signal.SIGUSR1)  # noqa: PTH109
    files = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    try:
        for place, disturb in disturbances.items():
            before = snapshot(model, tmp_path, (rows,))
            disturb()
            found = differences(before, snapshot(model, tmp_path, (rows,)))
            assert any(place in name for name in found), place
    finally:
        stop.set()
        torch.set_default_dtype(held[0])
        torch.use_deterministic_algorithms(False)
        os.chdir(held[1])
        warnings.filters[:] = held[2]
        signal.signal(signal.SIGUSR1, held[3])
        os.environ.pop("PLOPFAST_TEST", None)
        for number in set(os.listdir("/proc/self/fd")) - files:  # noqa: PTH208
            with contextlib.suppress(OSError):
                os.close(int(number))
