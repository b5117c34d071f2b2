"""Runs tests/gpu in the checked interpreter, in processes of their own, as Triton reads TRITON_INTERPRET on import."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists for Linux only")
FILES = sorted(set((ROOT / "tests" / "gpu").glob("test_*.py")) - {ROOT / "tests" / "gpu" / "test_grouped_heads.py"})
LIMIT_S = 1800


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(name of a file -> its cases, pytest's exit code, what it printed)"""
    path = tmp_path_factory.mktemp("interpreted") / "found.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = ["-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={path}", *map(str, FILES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    output = done.stdout + done.stderr
    assert path.exists(), output[-6000:]
    cases = {}
    for case in ElementTree.parse(path).iter("testcase"):
        cases.setdefault(case.get("classname").split(".")[2], []).append(case)
    return cases, done.returncode, output


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file, found):
    cases, _, output = found
    wrong = [(case.get("name"), part.tag, part.get("message")) for case in cases.get(file.stem, ()) for part in case]
    assert cases.get(file.stem) and not wrong, f"{wrong}\n{output[-6000:]}"


def test_nothing_fails_or_is_left_out(found):
    _, code, output = found
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", output.strip().splitlines()[-1])}
    left_out = {"skipped", "xfailed", "xpassed", "deselected"} & set(counts)
    assert code == 0 and counts.get("passed", 0) > 0 and not left_out, output[-6000:]


def test_there_is_a_file_for_each_kernel():
    linears = {"gemm", "shrink", "expand", "grads", "reduce", "nf4", "scaled", "mask", "segments"}
    assert linears | {"norm", "gate", "rotary", "cross_entropy"} <= {file.stem.removeprefix("test_") for file in FILES}
