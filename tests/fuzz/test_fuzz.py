"""Some hundred cases of tests/fuzz, in a process of its own, as it forks. More: PLOPFAST_FUZZ_CASES=5000 pytest tests/fuzz,
or `python tests/fuzz`, which tells more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = int(os.environ.get("PLOPFAST_FUZZ_CASES", "50"))
KILLS = int(os.environ.get("PLOPFAST_FUZZ_KILLS", str(CASES // 7)))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """area -> the counts of how its cases ended; and what was printed."""
    path = tmp_path_factory.mktemp("fuzz") / "found.json"
    command = [sys.executable, HERE, "--cases", CASES, "--kills", KILLS, "--json", path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert path.exists(), done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.mark.parametrize(("area", "cases"), [("files", CASES), ("options", CASES), ("kills", KILLS)])
def test_no_case_ends_in_a_traceback_a_hang_or_a_wrong_result(told, area, cases):
    found, printed = told
    faults = [name for name in found["faults"] if name.startswith(area)]
    assert not faults, printed
    assert found["counts"][area]["cases"] >= cases
    assert set(found["counts"][area]) <= {"cases", "accepted", "refused", "slowest_s"}


JUDGED = {  # the body of a command line -> how its fault begins
    "raise ValueError('x')": "traceback: ValueError",
    "while True: pass": "hang: Hang",
    "return 0": "accepted: rank is -1",
    "return 3": "exit code 3",
    "return 2": "0 error lines",
    "print('plopfast: error: no', file=sys.stderr); return 2": "",
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """body -> the fault that is seen"""
    program = f"""
import json, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]
import calling
calling.HANG_S, found = 0.2, {{}}
for body in {list(JUDGED)!r}:
    scope = {{"sys": sys}}
    exec(f"def main(argv):\\n    {{body}}", scope)
    calling.main.main = scope["main"]
    found[body] = calling.call(["run"], calling.Path({str(tmp_path_factory.mktemp("judged"))!r}), "rank is -1").fault
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("body", JUDGED)
def test_each_kind_of_fault_is_seen(judged, body):
    found, fault = judged[body].strip(), JUDGED[body]
    assert found.startswith(fault) and bool(found) == bool(fault)
