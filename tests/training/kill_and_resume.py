"""A training that is killed again and again, and ends as the one that was not: a program of its own, for test_survive.py.

    python tests/training/kill_and_resume.py FOLDER SEED

One thread, so that it can fork: each trial is a child that trains and is killed at some moment, then children that
resume, until one ends. Prints a line for each trial, and exits with 1 where an end differs from the uninterrupted one.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import build, everywhere

import plopfast as pf
from plopfast.data.example import Example
from plopfast.lora import peft_files
from plopfast.support import files
from plopfast.support.errors import FileError
from plopfast.training import state
from plopfast.training.records import Records

STEPS = 18


def train(out):
    rows = [
        Example.after_prompt(tuple(3 + (7 * i + j * j) % 290 for j in range(8 + i % 9)), 3, None, f"row {i}")
        for i in range(40)
    ]
    model = build("llama")
    pf.inject(model, everywhere(model), dropout=0.2)
    config = pf.TrainConfig(
        max_steps=STEPS, batch_tokens=64, eval_every=6, save_every=2, accumulate=2, neftune=2.0, ema=0.5, lora_plus=4.0
    )
    trainer = pf.Trainer(model, config, rows[:32], rows[32:], out=out)
    trainer.fit(resume=bool(state.checkpoints(out / "checkpoints")))
    pf.save_adapter(model, out / "adapter")


def child(out, prepare=lambda: None):
    """Trains in a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        prepare()
        train(out)
        os._exit(0)
    except FileError as error:
        (out / "error").write_text(str(error))
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(4)


def result(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    data = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :], lines  # the header's order is the writer's whim


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_save(number, share):
    """Dies in the `number`-th save, when `share` of the bytes are written."""
    plain, calls = peft_files.save_file, []

    def torn(tensors, path, metadata):
        calls.append(path)
        plain(tensors, path, metadata)
        if len(calls) == number:
            Path(path).write_bytes(Path(path).read_bytes()[: int(share * Path(path).stat().st_size)])
            die()

    return lambda: setattr(state, "save_file", torn)


def after_rename(number):
    """Dies after the `number`-th save took its name, before the old ones and the temporary folder are removed."""
    plain, calls = files.shutil.rmtree, []

    def rmtree(path, **options):
        calls.append(path)
        if ".step-" in str(path) and len([c for c in calls if ".step-" in str(c)]) == number:
            die()
        plain(path, **options)

    return lambda: setattr(files.shutil, "rmtree", rmtree)


def in_log(number):
    """Dies with half a line of metrics.jsonl written."""
    plain, calls = Records.add, []

    def record(self, what):
        calls.append(what)
        if len(calls) == number:
            with self.path.open("a") as file:
                file.write(json.dumps(what)[:20])
            die()
        plain(self, what)

    return lambda: setattr(Records, "add", record)


def disk_full(number):
    """From the `number`-th save on no file may grow beyond 8 KiB."""
    plain, calls = peft_files.save_file, []

    def save(*arguments):
        calls.append(1)
        if len(calls) >= number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        plain(*arguments)

    return lambda: setattr(state, "save_file", save)


def main():
    folder, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    whole = folder / "whole"
    train(folder / "first")  # imports and whatever torch sets up at first use happen once, before the forks
    began = time.perf_counter()
    train(whole)
    seconds = time.perf_counter() - began
    want = result(whole)
    assert len(want[1]) == STEPS + 3
    moments = [in_save(1, 0.0), in_save(2, 0.5), in_save(4, 1.0), after_rename(2), after_rename(3), in_log(7)]
    trials = [("at a chosen moment", [moment]) for moment in moments]
    trials += [("at random moments", [None] * 2) for _ in range(3)]
    failed = False
    for i, (name, kills) in enumerate(trials):
        out = folder / f"trial{i}"
        for kill in kills:
            pid = child(out, kill or (lambda: None))
            if kill is None:
                time.sleep(rng.uniform(0.1, 0.9) * seconds)
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if os.WIFEXITED(status):
                assert kill is None and os.WEXITSTATUS(status) == 0, f"{name}: not killed ({status})"
                break
        if not (out / "adapter").exists():
            left = [path.stem for path in state.checkpoints(out / "checkpoints")]
            assert os.waitpid(child(out), 0)[1] == 0
        else:
            left = ["the end"]
        same = result(out) == want
        failed |= not same
        print(f"{name}, trial {i}: resumed from {left}: {'identical' if same else 'DIFFERENT'}")
    out = folder / "full"
    status = os.waitpid(child(out, disk_full(3)), 0)[1]
    assert os.WEXITSTATUS(status) == 3, status
    left = state.checkpoints(out / "checkpoints")
    assert "writing failed" in (out / "error").read_text() and [path.stem for path in left] == [
        "step-00000004",
        "step-00000002",
    ]
    assert not list((out / "checkpoints").glob(".*"))
    assert os.waitpid(child(out), 0)[1] == 0
    same = result(out) == want
    print(f"disk full, then room again: {'identical' if same else 'DIFFERENT'}")
    sys.exit(failed or not same)


if __name__ == "__main__":
    main()
