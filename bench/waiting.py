"""What waiting OpenMP threads cost when another process keeps one of two cores busy: matrix products, ACTIVE and PASSIVE.

    python bench/waiting.py [--repeats 5]

Each figure is one process's mean time of a product of 512 x 576 by 576 x 1536 (float32) on the same two cores; ways are
interleaved. "busy": a Python loop spins on the first of the two cores meanwhile. Cores that anything else kept busy
before each repeat are printed and saved: above some 0.2 the figures are not of this load alone.
"""

import argparse
import contextlib
import os
import subprocess
import sys

import measure

from plopfast import machine

WAYS = {
    "ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"},
    "unset": {"OMP_NUM_THREADS": "2"},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}
LOOP = """
import time, torch
x, w, seconds = torch.randn(512, 576), torch.randn(1536, 576), []
end = time.perf_counter() + 1
while time.perf_counter() < end:
    began = time.perf_counter()
    for _ in range(10):
        x @ w.T
    seconds.append((time.perf_counter() - began) / 10)
print(sum(seconds) / len(seconds))
"""


def product_s(way: str) -> float:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", LOOP], env=clean | WAYS[way], capture_output=True, check=True)
    return float(done.stdout)


@contextlib.contextmanager
def spinning(core: int):
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)  # inherited by the processes below
    lines, figures = [f"{'':<8}" + "".join(f"{way + ', ms':>15}" for way in WAYS) + f"{'ACTIVE / PASSIVE':>28}"], {}
    strangers: list[float] = []
    for load in ("idle", "busy"):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            strangers.append(machine.busy_cores())
            for way in WAYS:
                with spinning(cores[0]) if load == "busy" else contextlib.nullcontext():
                    seconds[way].append(product_s(way))
        medians = {way: sorted(values)[len(values) // 2] * 1e3 for way, values in seconds.items()}
        median, low, high = ratio = measure.ratios(seconds, "ACTIVE", "PASSIVE")
        figures[load] = {"median_ms": medians, "ACTIVE / PASSIVE": ratio, "seconds": seconds}
        shown = f"{median:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{load:<8}" + "".join(f"{medians[way]:>15.2f}" for way in WAYS) + f"{shown:>28}")
    lines.append(f"cores busy with other work, before each repeat: at most {max(strangers):.1f}")
    measure.save("waiting", "\n".join(lines), {**figures, "other_work_cores": strangers})


if __name__ == "__main__":
    main()
