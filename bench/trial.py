"""The trial of five placements and three seeds on the default model and the WordNet demo, unattended.

    python bench/trial.py [--steps 60]

Target on 2 cores: under 45 minutes. The table is saved, whatever it shows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plopfast.support import threads

threads.set_waiting_policy()

import measure

TARGET_MINUTES = 45
OPTIONS = "--arms plop,plop-inverse,attn,mlp,all --seeds 0,1,2 --lrs 5e-4,1e-3,2e-3 --max-steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    options = [*OPTIONS.split(), str(arguments.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "plopfast", "trial", *options, "--out", str(folder)]
        began = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        minutes = (time.perf_counter() - began) / 60
        trial = json.loads((folder / "trial.json").read_text())
        decision = json.loads((folder / "scores.json").read_text())["decision"]
    trial["command"] = " ".join(["plopfast", "trial", *options])  # its own names a temporary folder
    for data in trial["data"].values():
        data["file"] = Path(data["file"]).name
    table = f"{done.stdout.rstrip()}\n{minutes:.1f} minutes in all; target: under {TARGET_MINUTES}"
    figures = {"minutes": round(minutes, 2), "target_minutes": TARGET_MINUTES, "decision": decision, "trial": trial}
    measure.save("trial", table, figures)
    if minutes >= TARGET_MINUTES:
        sys.exit(f"{minutes:.1f} minutes: over the target")


if __name__ == "__main__":
    main()
