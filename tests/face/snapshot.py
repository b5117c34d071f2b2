"""What a caller can see of a model, of the process, of a folder and of arguments, taken before and after a call.

A snapshot maps a place ("model layers.0.mlp.up_proj training") to what was there. `differences` names the places where two of
them differ, so a test says which of them a function is for, and everything else must be as it was found.
"""

import contextlib
import csv
import gc
import hashlib
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from plopfast.kernels import dispatch

TIMES = ("seconds", "tokens_per_s")  # what differs from call to call


def values_of(tensor):
    """A short name of a tensor's values, shape and dtype."""
    plain = tensor.detach().cpu().contiguous()
    held = plain.view(torch.uint8) if plain.numel() and plain.dim() else plain
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha1(held.numpy().tobytes()).hexdigest()}"


def seen(value, times=True):
    """What a value holds, all the way down, in a form that compares. `times`: with what a clock measured."""
    if isinstance(value, torch.Tensor):
        return values_of(value)
    if isinstance(value, nn.Module):
        return {name: values_of(tensor) for name, tensor in value.state_dict().items()}
    if hasattr(value, "backend_tokenizer"):
        return value.backend_tokenizer.to_str(), repr(value.special_tokens_map), value.padding_side, value.chat_template
    if isinstance(value, dict):
        return [(seen(k), seen(v, times)) for k, v in value.items() if times or k not in TIMES]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(seen(item, times) for item in value)]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    fields = getattr(value, "__dict__", None) or {n: getattr(value, n) for n in getattr(value, "__slots__", ())}
    if fields and type(value).__module__.split(".")[0] == "plopfast":
        return type(value).__name__, seen(fields, times)
    return repr(value)


def of_model(model):
    found = {"model": id(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        at = f"model {name or '(itself)'}"
        found |= {f"{at} is": (id(module), type(module)), f"{at} training": module.training}
        for key, value in vars(module).items():
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                if value:  # torch makes some of these dicts when they are first used
                    found[f"{at} {key}"] = [(number, getattr(h, "__func__", h)) for number, h in value.items()]
            elif key not in ("_parameters", "_buffers", "_modules", "training"):
                plain = isinstance(value, str | int | float | bool | type(None))
                found[f"{at} .{key}"] = value if plain else (id(value), type(value))
        for kind, tensors in ("parameter", module._parameters), ("buffer", module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    where = f"{at} {kind} {key}"
                    found |= {f"{where} is": id(tensor), f"{where} values": values_of(tensor)}
                    found |= {f"{where} requires_grad": tensor.requires_grad}
                    grad = tensor.grad if tensor.is_leaf else None
                    found |= {f"{where} gradient": None if grad is None else (id(grad), values_of(grad))}
    for name in ("config", "generation_config"):
        if (config := getattr(model, name, None)) is not None:
            found |= {f"model {name}": json.dumps(config.to_dict(), sort_keys=True, default=str)}
            found |= {f"model {name} {key}": repr(value) for key, value in vars(config).items()}
    return found


def of_process():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    modules = {name: value for name, value in vars(nn_module).items() if name.startswith("_global_")}
    found = {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "precision": (torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "attention": tuple(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "math", "mem_efficient", "cudnn")),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "torch modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "saved tensors hooks": repr(torch._C._autograd._top_saved_tensors_default_hooks(False)),
        "generator of torch": values_of(torch.get_rng_state()),
        "generator of numpy": repr(np.random.get_state()),
        "generator of random": repr(random.getstate()),
        "warning filters": list(warnings.filters),
        "logging": {name: (log.level, list(log.handlers), log.propagate, log.disabled)
                    for name in ("", "plopfast", "transformers") for log in [logging.getLogger(name)]},
        "working folder": Path.cwd(),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "garbage collection": gc.isenabled(),
        "interval timer": [left > 0 for left in signal.getitimer(signal.ITIMER_REAL)],
        "csv limit": csv.field_size_limit(),
        "longest integer": sys.get_int_max_str_digits(),
        "recursion limit": sys.getrecursionlimit(),
        "tuning table": dict(dispatch.TABLE),
        "threads": {t for t in threading.enumerate() if type(t).__name__ != "TMonitor"},
        "streams": (id(sys.stdin), id(sys.stdout), id(sys.stderr), sys.excepthook),
        "sys.path": list(sys.path),
    }  # fmt: skip
    found |= {f"environment {name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    found |= {f"hooks of all modules {name}": repr(value) for name, value in modules.items()}
    return found | {f"open file {number} {target}": True for number, target in _open_files()}


def _open_files():
    for entry in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        with contextlib.suppress(OSError):  # the listing's own is gone
            if not (target := str(entry.readlink())).startswith(("/proc", "anon_inode")):
                yield entry.name, target


def of_folder(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        name = f"folder {path.relative_to(folder)}"
        what = path.read_bytes() if path.is_file() else "a folder"
        found[name] = oct(path.lstat().st_mode), path.readlink() if path.is_symlink() else what
    return found


def snapshot(model=None, folder=None, arguments=(), since=None):
    """`since`: the snapshot before, whose threads are known. Those of pools that were left to end get time to do so."""
    gc.collect()  # garbage with an open file must not go between two snapshots
    for thread in set(threading.enumerate()) - (since["threads"] if since else set()):
        if thread.name.startswith("ThreadPoolExecutor"):  # transformers leaves one when it has read the weights
            thread.join(10)
    found = of_process()
    if model is not None:
        found |= of_model(model)
    if folder is not None:
        found |= of_folder(folder)
    for number, argument in enumerate(arguments):
        for place, value in _places(argument, f"argument {number}"):
            found[place] = value
    return found


def _places(argument, at):
    if isinstance(argument, nn.Module):
        return
    yield at, (id(argument), seen(argument))


def differences(before, after):
    """The places that differ, with what was there (`...` for nothing)."""
    places = {**before, **after}
    changed = {p: (before.get(p, ...), after.get(p, ...)) for p in places if before.get(p, ...) != after.get(p, ...)}
    # a removed object's number may be another's by now, so what is gone or new is named by the other entries alone
    return {place: (repr(old)[:100], repr(new)[:100]) for place, (old, new) in changed.items()}


@contextlib.contextmanager
def as_found(model=None, folder=None, arguments=(), changes=()):
    """Checks that what happens inside changes the places that match `changes` (regular expressions) alone, also if it raises."""
    before = snapshot(model, folder, arguments)
    try:
        yield
    finally:
        left = differences(before, snapshot(model, folder, arguments, since=before))
        undeclared = {place: what for place, what in left.items() if not any(re.search(c, place) for c in changes)}
        assert not undeclared, (
            f"{len(undeclared)} places are not as they were found: {dict(list(undeclared.items())[:8])}"
        )


@contextlib.contextmanager
def own_scratch(folder):
    """Puts the system's folder for temporary files in `folder`, so that a snapshot of it sees what is left there."""
    (folder / "temporary").mkdir(exist_ok=True)
    held, tempfile.tempdir = tempfile.tempdir, str(folder / "temporary")
    try:
        yield
    finally:
        tempfile.tempdir = held
