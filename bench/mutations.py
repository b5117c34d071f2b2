"""Do the tests notice faults? The code is broken in several hundred ways, one at a time, and its tests must fail.

    python bench/mutations.py                                   # every fault of bench/faults, on all cores
    python bench/mutations.py --only lora                       # those of lora.toml, or of a file: --only layer
    python bench/mutations.py --sample 30 --seed $(git rev-parse HEAD)   # some, drawn by the seed

Works on copies of the checkout. Each fault of bench/faults/WING.toml replaces one text of one file once, and names the
tests that should see it; they run up to the first failure, within TIMEOUT seconds (a fault that makes them hang is seen).
A fault marked `equivalent` changes nothing that anyone can see, for the reason given: it must stay green. Before any
fault, all those files of tests must be green (a sample leaves that out). Prints each fault with the test that caught it,
and exits with 1 if one survives.

Tests start in a process that has torch and transformers loaded, but nothing of plopfast: that saves 6 s a fault.
"""

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest


ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "bench" / "faults"
COPIED = ("plopfast", "kernels", "tests", "bench", "docs", "README.md", "CHANGELOG.md", "SECURITY.md", "setup.cfg", "pyproject.toml")  # fmt: skip
TIMEOUT = 300
LOADED = ("torch", "torch._inductor.config", "peft", "pytest", "transformers.models.llama.modeling_llama")
COPY: "Copy"  # of this process
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "-rfE"]


@dataclass(frozen=True)
class Fault:
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]  # as for pytest
    wing: str
    interpreted: bool = False
    equivalent: str = ""  # why nobody can see it


def read_faults() -> list[Fault]:
    """The faults of bench/faults. Raises ValueError where a text does not stand in its file exactly once."""
    faults = []
    for path in sorted(FAULTS.glob("*.toml")):
        found = tomllib.loads(path.read_text())
        for entry in found.pop("fault"):
            entry = {**found, **entry}  # what stands above the first fault holds for each that does not say otherwise
            fault = Fault(**{**entry, "tests": tuple(entry["tests"]), "wing": path.stem})
            count = (ROOT / fault.file).read_text().count(fault.old)
            if count != 1:
                raise ValueError(f"{path.name}: {fault.what}: {fault.old!r} stands {count} times in {fault.file}")
            faults.append(fault)
    return faults


class Copy:
    """A copy of the checkout, and the tests in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)

    def run(self, tests: tuple[str, ...], interpreted: bool) -> tuple[bool, str]:
        """(whether the tests pass, the first failure's name and message)"""
        log = self.root / "log.txt"
        pid = os.fork()
        if pid == 0:
            self._become_pytest(tests, interpreted, log)
        ended, status = _wait(pid)
        if not ended:
            return False, f"{' '.join(tests)} did not end in {TIMEOUT} s"
        text = log.read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return False, f"{' '.join(tests)} were ended by signal {-code}"
        unloaded = code == 2 or "while loading conftest" in text
        if code not in (0, 1) and not unloaded:
            raise RuntimeError(f"pytest {' '.join(tests)} ended with {code}:\n{text[-2000:]}")
        said = re.findall(r"^(?:FAILED|ERROR) (tests.*?)(?: - (.*))?$", text, re.M)
        name, message = said[0] if said else (text[-100:], "")
        return code == 0, f"{name.removeprefix('tests/')} {message}"[:150]

    def _become_pytest(self, tests: tuple[str, ...], interpreted: bool, log: Path) -> None:
        """In a child process: runs the tests and ends."""
        os.setsid()  # so that a hanging test goes with all that it started
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        os.chdir(self.root)
        os.environ |= {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
        os.environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.root)}
        if interpreted:  # Triton looks at it when it is imported
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *OPTIONS, "--confcutdir=tests/gpu", *tests])
        try:
            import pytest

            sys.path[0], sys.dont_write_bytecode, tempfile.tempdir = str(self.root), True, None
            code = int(pytest.main([*OPTIONS, *tests]))
        except BaseException:
            traceback.print_exc()
            code = 3
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> tuple[bool, int]:
    """(whether the process ended in time, its status)"""
    limit = time.monotonic() + TIMEOUT
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return True, status
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    return False, os.waitpid(pid, 0)[1]


def plant(fault: Fault) -> dict[str, Any]:
    """Runs the tests with the fault, and mends it again."""
    began, path = time.perf_counter(), COPY.root / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.old, fault.new, 1))
    try:
        green, said = COPY.run(fault.tests, fault.interpreted)
    finally:
        path.write_text(text)
    row = {"wing": fault.wing, "file": fault.file, "fault": fault.what, "caught": not green, "by": said}
    return {**row, "equivalent": fault.equivalent, "seconds": round(time.perf_counter() - began, 1)}


def end_of(row: dict[str, Any]) -> str:
    if row["equivalent"]:
        return f"{'NOT EQUIVALENT, ' + row['by'] if row['caught'] else 'equivalent'}: {row['equivalent']}"
    return row["by"] if row["caught"] else "SURVIVED"


def make_copy(scratch: str) -> None:
    """Gives a worker the copy that it breaks."""
    global COPY
    root = Path(scratch) / str(os.getpid())
    root.mkdir()
    COPY = Copy(root)


def is_green(file: tuple[str, bool]) -> bool:
    green, said = COPY.run((file[0],), file[1])
    if not green:
        print(f"RED BEFORE ANY FAULT: {file[0]}: {said}", flush=True)
    return green


def plant_all(pool: concurrent.futures.Executor, faults: list[Fault]) -> list[dict[str, Any]]:
    began, rows = time.perf_counter(), []
    for row in pool.map(plant, faults):
        rows.append(row)
        left = (time.perf_counter() - began) / len(rows) * (len(faults) - len(rows)) / 60
        where = f"{Path(row['file']).stem:<14}{row['fault']:<46}"
        print(f"{where}{end_of(row)}  ({row['seconds']:.0f} s; {left:.0f} min left)", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a file of bench/faults, or one that the faults are in, without its ending")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="N faults, drawn by --seed; their tests are taken to be green"
    )
    parser.add_argument("--seed", default="0", help="what a sample is drawn by, such as a commit")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="copies that work at a time")
    given = parser.parse_args()
    every = read_faults()
    faults = [f for f in every if given.only in (None, f.wing, Path(f.file).stem)]
    if given.sample:
        faults = [f for f in faults if not f.interpreted]
        faults = random.Random(given.seed).sample(faults, min(given.sample, len(faults)))
    if not faults:
        parser.error(f"no fault is in {given.only}")

    for name in LOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert not any(name.split(".")[0] == "plopfast" for name in sys.modules), "tests must load their copy's own"
    # processes and not threads, as each forks
    forks = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as scratch,
        concurrent.futures.ProcessPoolExecutor(given.jobs, forks, make_copy, (scratch,)) as pool,
    ):
        of = (
            {}
            if given.sample
            else {(test, f.interpreted) for f in faults for test in f.tests if test.startswith("tests/")}
        )
        green = all([*pool.map(is_green, sorted(of))])
        rows = plant_all(pool, faults)
    wrong = [row for row in rows if row["caught"] == bool(row["equivalent"])]
    red = sum(row["caught"] for row in rows)
    equivalent = sum(not row["caught"] and bool(row["equivalent"]) for row in rows)
    last = f"{red} of {len(rows)} faults caught, {equivalent} equivalent, {len(rows) - red - equivalent} survived"
    print(last)
    if len(rows) == len(every) and not given.sample and green:
        save(rows, last)
    sys.exit(bool(wrong or not green))


def save(rows: list[dict[str, Any]], last: str) -> None:
    import measure  # loads plopfast, which the tests' processes must not have

    lines = [f"{Path(r['file']).stem:<14}{r['fault']:<50}{end_of(r).split(' ')[0]}" for r in rows]
    measure.save("mutations", "\n".join([*lines, last]), {"mutations": rows})


if __name__ == "__main__":
    main()
