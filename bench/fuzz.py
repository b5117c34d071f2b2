"""Damaged files, odd options, and kills at every write: how many cases were tried, and which faults they found.

    python bench/fuzz.py --cases 2500 --kills 600 --jobs 2

Takes the options of tests/fuzz, which it runs: `--cases` are those of files and of options each.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

FUZZ = Path(__file__).parents[1] / "tests" / "fuzz"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "found.json"
        run = subprocess.run(
            [sys.executable, str(FUZZ), *sys.argv[1:], "--json", str(kept)], stdout=subprocess.PIPE, text=True
        )
        if kept.exists():
            measure.save("fuzz", run.stdout.rstrip(), json.loads(kept.read_text()))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
