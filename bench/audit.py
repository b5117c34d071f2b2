"""The audit of the default model on the WordNet demo: stability, controls, other criteria and their cost.

python bench/audit.py [--prompts 200]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from plopfast.support import threads

threads.set_waiting_policy()

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    options = ["--score-prompts", str(parser.parse_args().prompts)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "plopfast", "audit", *options, "--out", scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        audit = json.loads((Path(scratch) / "audit.json").read_text())
    measure.save("audit", done.stdout.rstrip(), {"audit": audit})


if __name__ == "__main__":
    main()
