"""The default run as a newcomer sees it: `plopfast run`, N times, each in its own process.

    python bench/default_run.py [--repeats 3]

Targets on 2 cores: at most 240 s, test accuracy from about 0.5 to at least 0.80. The first repeat starts without a
kept conversion of the GGUF file, as on a fresh machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plopfast.support import threads

threads.set_waiting_policy()

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PLOPFAST_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
        for repeat in range(arguments.repeats):
            folder = Path(scratch) / f"run{repeat}"
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "plopfast", "run", "--out", str(folder)], env=environment, check=True)
            wall = time.perf_counter() - began
            evaluation, stages, placement = (
                json.loads((folder / f"{name}.json").read_text()) for name in ("eval", "stages", "placement")
            )
            for stage in stages.values():
                stage.pop("command")  # names a temporary folder
            runs.append({"wall_s": round(wall, 1), "eval": evaluation, "stages": stages, "types": placement["types"]})
    lines = [f"{'run':<14}{'seconds':>8}  {'base':>7} {'tuned':>7}  " + "  ".join(f"{s:>6}" for s in runs[0]["stages"])]
    for repeat, run in enumerate(runs):
        accuracy = [run["eval"][who]["accuracy"] for who in ("base", "tuned")]
        stages = "  ".join(f"{s['seconds']:>6.1f}" for s in run["stages"].values())
        name = "fresh cache" if repeat == 0 else f"again {repeat}"
        lines.append(f"{name:<14}{run['wall_s']:>8.1f}  {accuracy[0]:>7.4f} {accuracy[1]:>7.4f}  {stages}")
    lines.append(f"median {statistics.median(r['wall_s'] for r in runs):.1f} s; targets 240 s, accuracy 0.80")
    peak = max(s["peak_mib"] for run in runs for s in run["stages"].values())
    lines.append(f"adapters on {', '.join(runs[0]['types'])}; peak resident memory {peak:.0f} MiB")
    measure.save("default_run", "\n".join(lines), {"runs": runs})


if __name__ == "__main__":
    main()
