"""Runs tests/gpu in the checked interpreter. Each file has its own process, as Triton reads TRITON_INTERPRET on import."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists for Linux only")
FILES = sorted(set((ROOT / "tests" / "gpu").glob("test_*.py")) - {ROOT / "tests" / "gpu" / "test_grouped_heads.py"})


def run(file):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = ["-p", "no:cacheprovider", "--confcutdir=tests/gpu", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs():
    with ThreadPoolExecutor(2) as pool:  # each process computes on one core
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file, runs):
    done = runs[file].result()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", output.strip().splitlines()[-1])}
    left_out = {"skipped", "xfailed", "xpassed", "deselected"} & set(counts)
    assert counts.get("passed", 0) > 0 and not left_out, output[-6000:]


def test_there_is_a_file_for_each_kernel():
    linears = {"gemm", "shrink", "expand", "grads", "reduce", "nf4", "scaled", "mask"}
    assert linears | {"norm", "gate", "rotary", "cross_entropy"} <= {file.stem.removeprefix("test_") for file in FILES}
