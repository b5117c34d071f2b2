"""The default run as a newcomer sees it: `plopfast run`, N times, each in its own process.

    python bench/default_run.py [--repeats 3]

Targets on 2 cores: at most 90 s, test accuracy from about 0.5 to at least 0.80. Each run starts without a kept conversion of the
GGUF file, as on a fresh machine; `--warm` more runs follow with it. The load is the machine's mean over a minute, before and after.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plopfast.support import threads
from plopfast.support.ledger import Ledger

threads.set_waiting_policy()

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", type=int, default=1)
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(arguments.repeats + arguments.warm):
            fresh = repeat < arguments.repeats
            cache = f"{scratch}/cache{repeat if fresh else 0}"
            environment = {**os.environ, "PLOPFAST_CACHE": cache, "HF_HUB_OFFLINE": "1"}
            folder, load = Path(scratch) / f"run{repeat}", os.getloadavg()[0]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "plopfast", "run", "--out", str(folder)], env=environment, check=True)
            wall = time.perf_counter() - began
            evaluation, placement = (
                json.loads((folder / f"{name}.json").read_text()) for name in ("eval", "placement")
            )
            done = {name: stage for name, stage in Ledger(folder).done().items() if name != "run"}
            stages = {name: {key: stage[key] for key in ("seconds", "peak_mib")} for name, stage in done.items()}
            runs.append({
                "fresh": fresh, "wall_s": round(wall, 1), "load": [round(load, 2), round(os.getloadavg()[0], 2)],
                "eval": evaluation, "stages": stages, "types": placement["types"],
            })  # fmt: skip
            if fresh and repeat:
                shutil.rmtree(cache)
    names = list(runs[0]["stages"])
    lines = [f"{'run':<14}{'seconds':>8}{'load':>12}  {'base':>7} {'tuned':>7}  " + "  ".join(f"{s:>8}" for s in names)]
    for run in runs:
        accuracy = [run["eval"][who]["accuracy"] for who in ("base", "tuned")]
        stages = "  ".join(f"{run['stages'][name]['seconds']:>8.1f}" for name in names)
        kind, load = "fresh cache" if run["fresh"] else "again", "{} to {}".format(*run["load"])
        lines.append(f"{kind:<14}{run['wall_s']:>8.1f}{load:>12}  {accuracy[0]:>7.4f} {accuracy[1]:>7.4f}  {stages}")
    median = statistics.median(run["wall_s"] for run in runs if run["fresh"])
    lines.append(f"median of the fresh ones {median:.1f} s; targets 90 s, accuracy 0.80")
    peak = max(s["peak_mib"] for run in runs for s in run["stages"].values())
    lines.append(f"adapters on {', '.join(runs[0]['types'])}; peak resident memory {peak:.0f} MiB")
    measure.save("default_run", "\n".join(lines), {"runs": runs})


if __name__ == "__main__":
    main()
