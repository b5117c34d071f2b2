"""A snapshot sees what it is for: one disturbance after the other is seen, named, and no longer there once it is undone."""

import contextlib
import csv
import gc
import logging
import os
import random
import re
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from face_world import World
from snapshot import differences, snapshot
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode

from plopfast.kernels import dispatch


def layer(w, number=0):
    return w.model.model.layers[number]


def put(get, set_, value):
    """Sets something, and puts what was there back."""

    def disturb(w, undo):
        undo.callback(set_, get())
        set_(value)

    return disturb


def attribute(of, name, value):
    def disturb(w, undo):
        undo.callback(setattr, of(w), name, getattr(of(w), name))
        setattr(of(w), name, value(w))

    return disturb


def hook(register):
    return lambda w, undo: undo.callback(register(w).remove)


def entered(context):
    return lambda w, undo: undo.enter_context(context())


def a_value(w, undo):
    undo.callback(w.model.lm_head.weight.data.copy_, w.model.lm_head.weight.detach().clone())
    w.model.lm_head.weight.data[0, 0].add_(1)


def a_buffer(w, undo):
    rotary = w.model.model.rotary_emb
    undo.callback(rotary.inv_freq.copy_, rotary.inv_freq.clone())
    rotary.inv_freq[0] += 1


def an_attribute(w, undo):
    undo.callback(delattr, layer(w).mlp, "forward")
    layer(w).mlp.forward = layer(w).mlp.forward


def a_backward_hook(w, undo):
    undo.callback(setattr, layer(w), "_is_full_backward_hook", layer(w)._is_full_backward_hook)
    undo.callback(layer(w).register_full_backward_hook(lambda *_: None).remove)


def a_module(w, undo):
    undo.callback(setattr, layer(w), "mlp", layer(w).mlp)
    layer(w).mlp = layer(w, 1).mlp


def a_thread(w, undo):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    undo.callback(thread.join)
    undo.callback(stop.set)
    thread.start()


def an_open_file(w, undo):
    undo.callback(os.close, os.open(w.folder, os.O_RDONLY))


def a_new_folder(w, undo):
    undo.callback((w.folder / "new").rmdir)
    (w.folder / "new").mkdir()


def an_argument(w, undo):
    undo.callback(w.given[0]["a"].pop)
    w.given[0]["a"].append(2)


def a_timer(w, undo):
    undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_REAL, 10_000)


def a_logger(w, undo):
    undo.callback(logging.getLogger("plopfast").setLevel, logging.getLogger("plopfast").level)
    logging.getLogger("plopfast").setLevel(3)


def a_tuned_row(w, undo):
    undo.callback(dispatch.use_table, dict(dispatch.TABLE))
    dispatch.use_table({"a card": ("fused", None)})


def draws(get, set_, draw):
    def disturb(w, undo):
        undo.callback(set_, get())
        draw()

    return disturb


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


flash = torch.backends.cuda
DISTURBANCES = {  # the places, as a regular expression -> what changes them and nothing else
    r"^model .* training$": attribute(lambda w: layer(w).mlp, "training", lambda w: True),
    r"^model .*_hooks$": hook(lambda w: layer(w).mlp.register_forward_pre_hook(lambda *_: None)),
    r"^model .*_(hooks|hooks_with_kwargs|hooks_always_called)$": hook(
        lambda w: layer(w).mlp.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    ),
    r"^model .* (_backward_hooks|\._is_full_backward_hook)$": a_backward_hook,
    r"^model .* \.\w+$": an_attribute,
    r"^model [\w.()]+ is$|^model model\.layers\.0\.mlp\b": a_module,
    r"^model .* requires_grad$": attribute(lambda w: w.model.lm_head.weight, "requires_grad", lambda w: False),
    r"^model .* gradient$": attribute(lambda w: layer(w, 1).input_layernorm.weight, "grad", lambda w: None),
    r"^model .* parameter \w+ values$": a_value,
    r"^model .* buffer \w+ values$": a_buffer,
    r"^model .* (parameter|buffer) \w+ (is|requires_grad)$": attribute(
        lambda w: w.model.lm_head, "weight", lambda w: torch.nn.Parameter(w.model.lm_head.weight.detach(), False)
    ),
    r"^model config\b": attribute(lambda w: w.model.config, "use_cache", lambda w: False),
    r"^model generation_config\b": attribute(lambda w: w.model.generation_config, "use_cache", lambda w: False),
    r"^model$": attribute(lambda w: w, "model", lambda w: torch.nn.Sequential()),
    r"^default dtype$": put(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    r"^(default device|torch modes)$": entered(lambda: torch.device("meta")),
    r"^torch modes$": entered(Mode),
    r"^grad mode$": entered(torch.no_grad),
    r"^saved tensors hooks$": entered(lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)),
    r"^deterministic$": put(lambda: False, torch.use_deterministic_algorithms, True),
    r"^precision$": put(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    r"^torch threads$": put(torch.get_num_threads, torch.set_num_threads, 7),
    r"^attention$": put(flash.flash_sdp_enabled, flash.enable_flash_sdp, False),
    r"^autocast$": entered(lambda: torch.autocast("cpu")),
    r"^generator of torch$": draws(torch.get_rng_state, torch.set_rng_state, lambda: torch.rand(1)),
    r"^generator of numpy$": draws(np.random.get_state, np.random.set_state, np.random.rand),
    r"^generator of random$": draws(random.getstate, random.setstate, random.random),
    r"^warning filters$": put(
        lambda: warnings.filters[:], lambda filters: warnings.filters.__setitem__(slice(None), filters), []
    ),
    r"^logging$": a_logger,
    r"^working folder$": put(os.getcwd, os.chdir, "/"),
    r"^signal handlers$": put(
        lambda: signal.getsignal(signal.SIGUSR1), lambda what: signal.signal(signal.SIGUSR1, what), lambda *_: None
    ),
    r"^interval timer$": a_timer,
    r"^csv limit$": put(csv.field_size_limit, csv.field_size_limit, 77),
    r"^longest integer$": put(sys.get_int_max_str_digits, sys.set_int_max_str_digits, 7777),
    r"^recursion limit$": put(sys.getrecursionlimit, sys.setrecursionlimit, 7777),
    r"^tuning table$": a_tuned_row,
    r"^garbage collection$": put(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), False),
    r"^threads$": a_thread,
    r"^streams$": attribute(lambda w: sys, "excepthook", lambda w: print),
    r"^sys.path$": put(lambda: sys.path[:], lambda paths: sys.path.__setitem__(slice(None), paths), ["/nowhere"]),
    r"^environment \w+$": lambda w, undo: (
        undo.callback(os.environ.pop, "PLOPFAST_TEST"),
        os.environ.update(PLOPFAST_TEST="1"),
    ),
    r"^hooks of all modules ": hook(lambda w: nn_module.register_module_forward_pre_hook(lambda *_: None)),
    r"^open file ": an_open_file,
    r"^folder ": a_new_folder,
    r"^argument ": an_argument,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """One for all: each test puts back what it disturbs."""
    world = World(tmp_path_factory.mktemp("world"), tokenizer)
    world.given = [{"a": [1]}]
    (world.folder / "rows").write_text("one")
    return world


@pytest.mark.parametrize("place", DISTURBANCES)
def test_a_disturbance_is_seen(place, world):
    before = snapshot(world.model, world.folder, (world.given,))
    with contextlib.ExitStack() as undo:
        DISTURBANCES[place](world, undo)
        found = differences(before, snapshot(world.model, world.folder, (world.given,), since=before))
        assert found and ("model" in found or all(re.search(place, name) for name in found)), found
    assert not differences(before, snapshot(world.model, world.folder, (world.given,), since=before))


def test_every_place_has_a_disturbance(world):
    places = snapshot(world.model, world.folder, (world.given,))
    assert [name for name in places if not any(re.search(place, name) for place in DISTURBANCES)] == []
    unused = [place for place in DISTURBANCES if not any(re.search(place, name) for name in places)]
    assert all("hook" in place for place in unused), unused


def test_threads_of_a_pool_that_was_left_get_time_to_end(monkeypatch):
    before, go_on = snapshot(), threading.Event()
    pool = ThreadPoolExecutor(1)
    pool.submit(go_on.wait)
    pool.shutdown(wait=False)
    (thread,) = pool._threads
    join = thread.join
    monkeypatch.setattr(thread, "join", lambda timeout: None)
    assert "threads" in differences(before, snapshot(since=before)), "it goes on"
    monkeypatch.setattr(thread, "join", lambda timeout: (go_on.set(), join(timeout)))
    assert "threads" not in differences(before, snapshot()), "before the first snapshot, too"
