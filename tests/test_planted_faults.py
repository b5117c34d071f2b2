"""The faults that `bench/mutations.py` plants fit the code as it is, and the instrument tells red from green."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

from _pytest.mark.expression import Expression

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))
mutations = importlib.import_module("mutations")

NAME = "test_of_nearest.py"
TESTED = """
from plopfast.support import errors

def test_of_nearest():
    assert errors.nearest("rank", ["rank", "alpha"])
"""


def test_every_fault_fits_the_code_and_names_tests():
    faults = mutations.read_faults()
    for fault in faults:
        files = [t for t in fault.tests if t.startswith("tests/")]
        assert files and all((ROOT / t.split("::")[0]).exists() for t in files), fault
        assert fault.old != fault.new, fault
        if "-k" in fault.tests:
            Expression.compile(fault.tests[fault.tests.index("-k") + 1])
    assert len({(f.file, f.old, f.new) for f in faults}) == len(faults)


FAULTS = """
tests = ["tests/NAME"]
file = "plopfast/support/errors.py"

[[fault]]
what = "seen"
old = "def nearest("
new = "def nearest(less, "

[[fault]]
what = "not seen"
old = 'cutoff=0.5'
new = 'cutoff=0.4'

[[fault]]
what = "seen, though it is called equivalent"
old = "def nearest("
new = "def nearest(more, "
equivalent = "nobody calls it"
"""


def test_the_instrument_tells_red_from_green(tmp_path):
    mutations.Copy(tmp_path)
    for path in (tmp_path / "bench" / "faults").iterdir():
        path.unlink()
    (tmp_path / "bench" / "faults" / "support.toml").write_text(FAULTS.replace("NAME", NAME))
    (tmp_path / "tests" / NAME).write_text(TESTED)
    before = (tmp_path / "plopfast/support/errors.py").read_bytes()
    command = [sys.executable, "bench/mutations.py", "--only", "errors", "--sample", "3", "--jobs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    ends = dict(re.findall(r"^errors +(.*?)  +(.*)", done.stdout, re.M))
    assert ends["seen"].startswith(f"{NAME}::test_of_nearest"), done.stderr
    assert ends["not seen"].startswith("SURVIVED")
    assert ends["seen, though it is called equivalent"].startswith("NOT EQUIVALENT")
    assert done.returncode == 1
    assert (tmp_path / "plopfast/support/errors.py").read_bytes() == before
