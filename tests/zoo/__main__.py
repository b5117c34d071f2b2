"""Tries families of models end to end: python tests/zoo [llama gpt2 ...] [--jobs 2] [--keep FILE]

With `--keep`, results are added to a file of JSON lines, and families that it has are not tried again: a run that was
killed goes on. Each family runs in a process of its own, that ends after LIMIT_S seconds at the latest, and prints one line of JSON. The
processes are forked from one that has torch, transformers and plopfast loaded, which saves 6 s each.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import json
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
LIMIT_S = 120


def main() -> int:
    parser = argparse.ArgumentParser("tests/zoo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types (default: all that transformers maps)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a file of results that is added to")
    given = parser.parse_args()
    import families
    import steps  # noqa: F401  # loads torch, PEFT and plopfast before the forks
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    every = families.names()
    if unknown := [name for name in given.families if name not in every]:
        parser.error(f"transformers {transformers.__version__} maps no causal language model {', '.join(unknown)}")
    tried = set()
    if given.keep and given.keep.exists():
        tried = {json.loads(line)["family"] for line in given.keep.read_text().splitlines()}
    run_all([name for name in given.families or sorted(every) if name not in tried], given.jobs, given.keep)
    return 0


def run_all(names, jobs, keep=None):
    """Runs families, `jobs` at a time. Prints each result as it comes, and adds it to the file `keep`."""
    waiting, running = list(names), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[start(name, Path(folder))] = name, time.monotonic()
            for pid, (name, began) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - began
                if not ended and seconds > LIMIT_S:
                    os.killpg(pid, signal.SIGKILL)
                    ended, status = os.waitpid(pid, 0)
                if ended:
                    del running[pid]
                    line = json.dumps({**result_of(name, Path(folder), status), "seconds": round(seconds, 1)})
                    print(line, flush=True)
                    if keep:
                        with keep.open("a") as file:
                            print(line, file=file)
            time.sleep(0.02)


def start(name, folder):
    """Forks a process that tries a family; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    code = 1
    try:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        import steps

        kept = folder / f"{name}.json"
        kept.with_suffix(".part").write_text(json.dumps(steps.run(name)))
        kept.with_suffix(".part").rename(kept)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def result_of(name, folder, status):
    """What the process left, or how it ended."""
    import families

    kept = folder / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    code = os.waitstatus_to_exitcode(status)
    said = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
    how = f"did not end in {LIMIT_S} s" if code == -signal.SIGKILL else f"the process ended with {code}: {said}"
    return {"family": name, "class": families.names()[name], "steps": {"build": f"CRASH: {how}"}, "facts": {}}


if __name__ == "__main__":
    sys.exit(main())
