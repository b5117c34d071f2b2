"""The cost of OpenMP's spinning threads: a training step on idle cores, and beside a process that keeps one busy.

    python bench/waiting.py [--repeats 3]

One step of SmolLM2-135M (rank 16 on v, up, down; about 150 tokens, two threads), each setting in a process of its own,
interleaved. Medians of 12 steps, then ratios to no spinning within a repeat. `default` is what the command line sets.
Other work on the machine is printed; more than half a core of it spoils the first column.
"""

import argparse
import os
import statistics
import subprocess
import sys

import measure

from plopfast.support import threads

SETTINGS = {
    "no spinning": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "default": {},
    "10,000 turns": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}
STEPS = """
from plopfast.support import threads
threads.set_waiting_policy()
import statistics, time, torch
import plopfast as pf
from plopfast.data.rows import DEMO
torch.set_num_threads(2)
model, tokenizer = pf.load_model()
rows = pf.tokenize(pf.read_jsonl(DEMO["train"])[:128], tokenizer)
types = ("v_proj", "up_proj", "down_proj")
modules = {info.name: (16, 32.0) for info in pf.linear_modules(model) if info.type in types}
pf.inject(model, pf.Placement(modules, list(types), "explicit", 0))
trainer = pf.Trainer(model, pf.TrainConfig(batch_tokens=160, max_steps=14), rows)
trainer.fit()
print(statistics.median(record["seconds"] for record in trainer.history[2:]))
"""


def step_s(setting: str) -> float:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    run = [sys.executable, "-W", "ignore", "-c", STEPS]
    return float(subprocess.run(run, env=clean | SETTINGS[setting], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    seconds: dict[str, dict[str, list[float]]] = {where: {name: [] for name in SETTINGS} for where in ("idle", "busy")}
    others = []
    for _ in range(repeats):
        others.append(round(threads.busy_cores(seconds=0.5), 2))
        print(f"other processes keep {others[-1]} cores busy", flush=True)
        for where, found in seconds.items():
            spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if where == "busy" else None
            try:
                for name, values in found.items():
                    values.append(step_s(name))
            finally:
                if spinner:
                    spinner.kill()
    lines = [f"{'step / step without spinning':<30}{'idle cores':>24}{'one core busy':>24}"]
    for name in SETTINGS:
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*measure.ratios(seconds[w], name, "no spinning")) for w in seconds]
        lines.append(f"{name:<30}" + "".join(f"{cell:>24}" for cell in cells))
    medians = {where: {name: statistics.median(v) for name, v in found.items()} for where, found in seconds.items()}
    measure.save("waiting", "\n".join(lines), {"step_s": seconds, "median_s": medians, "other_cores": others})


if __name__ == "__main__":
    main()
