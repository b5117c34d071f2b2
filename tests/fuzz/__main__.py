"""Fuzzes plopfast's command line: python tests/fuzz [--cases 5000] [--seed 0] [--jobs 2] [--area files|options|kills]

Each case is a number. Prints how the cases of an area ended, and each distinct fault with the seeds of its cases; run one
alone with `--area AREA --case SEED`. Exit code 1 if there is any fault.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import faulthandler
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), *(str(HERE.parent / name) for name in ("", "data", "report"))]
AREAS = ("files", "options", "kills")
STUCK_S = 30  # a case that not even the alarm ends


def main() -> int:
    parser = argparse.ArgumentParser(
        "tests/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="cases of each area but kills")
    parser.add_argument("--kills", type=int, default=1 << 30, help="places to kill at (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--case", type=int, help="one case alone, with all that is known of it")
    parser.add_argument("--json", type=Path, help="write the counts and faults there")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(*given.worker)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        import corpus

        corpus.make(folder / "corpus")
        if given.case is not None:
            if given.area == "kills":
                prepare_kills(folder)
            print(json.dumps(one(given.area, given.case, folder), indent=1).replace("\\n", "\n"))
            return 0
        areas = [given.area] if given.area else [*AREAS]
        results = {}
        for area in areas:
            if area == "kills":
                given.cases = min(given.kills, len(prepare_kills(folder, given.kills < 100)) - given.seed)
            results[area] = spread(area, folder, given)
    return report(results, given.json)


def one(area: str, seed: int, folder: Path) -> dict:
    """Runs a case; returns what is known of it."""
    place = folder / f"case-{area}-{seed}"
    if area == "kills":
        import kill_points

        point = json.loads((folder / "points.json").read_text())[seed]
        outcome = kill_points.run(point, folder, place)
    else:
        import file_cases
        import option_cases

        outcome = {"files": file_cases, "options": option_cases}[area].run(seed, folder / "corpus", place)
    argv = [text if len(text) < 100 else text[:60] + "..." for text in outcome.argv]
    return {
        "seed": seed, "argv": argv, "code": outcome.code, "fault": outcome.fault, "detail": outcome.detail,
        "err": outcome.err[-1500:], "seconds": round(outcome.seconds, 2),
    }  # fmt: skip


def prepare_kills(folder: Path, quick: bool = False) -> list:
    """Finds the points; each is a case."""
    import kill_points

    kill_points.warm(folder)
    return kill_points.points(folder, quick)


def work(area: str, first: str, step: str, end: str, made: str) -> int:
    """Runs cases first, first + step, ... before end; prints two lines of JSON for each, one when it begins."""
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    real = os.fdopen(os.dup(1), "w")
    if area == "kills":
        import kill_points

        own = Path(tempfile.mkdtemp(dir=made))
        (own / "corpus").symlink_to(Path(made) / "corpus")
        kill_points.warm(own)
    for seed in range(int(first), int(end), int(step)):
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        print(json.dumps({"begun": seed}), file=real, flush=True)
        print(json.dumps(one(area, seed, Path(made))), file=real, flush=True)
        faulthandler.cancel_dump_traceback_later()
    return 0


def spread(area: str, folder: Path, given: argparse.Namespace) -> list[dict]:
    """Runs the cases in `given.jobs` processes."""
    end = given.seed + given.cases

    def share(job: int) -> list[dict]:
        """One that dies is a fault of its case, and another process goes on after it."""
        at, found = given.seed + job, []
        while at < end:
            log = folder / f"log-{area}-{at}"
            command = [sys.executable, str(HERE), "--worker", area, str(at), str(given.jobs), str(end), str(folder)]
            with (
                log.open("w") as err,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True) as worker,
            ):
                for line in worker.stdout:
                    value = json.loads(line)
                    at = value.get("begun", at)
                    if "fault" in value:
                        found.append(value)
            if worker.returncode:
                told = log.read_text(errors="replace")
                place = next((line.strip() for line in told.splitlines() if "/plopfast/" in line), "?")
                found.append({"seed": at, "argv": [], "code": worker.returncode, "fault": f"died or stuck: {place}", "detail": told[-2000:], "err": "", "seconds": STUCK_S})  # fmt: skip
                shutil.rmtree(folder / f"case-{area}-{at}", ignore_errors=True)
            at += given.jobs
        return found

    with ThreadPool(given.jobs) as pool:
        return [value for found in pool.map(share, range(given.jobs)) for value in found]


def report(results: dict[str, list[dict]], path: Path | None) -> int:
    """Prints the table and the faults."""
    counts, faults = {}, defaultdict(list)
    for area, found in results.items():
        kinds = Counter(
            value["fault"].split(":")[0] or ("accepted" if value["code"] == 0 else "refused") for value in found
        )
        counts[area] = {"cases": len(found), **kinds, "slowest_s": max((v["seconds"] for v in found), default=0)}
        for value in found:
            if value["fault"]:
                faults[area, value["fault"]].append(value)
    for area, count in counts.items():
        print(f"{area}: {', '.join(f'{name} {number}' for name, number in count.items())}")
    for (area, fault), values in sorted(faults.items()):
        first = values[0]
        detail = first["detail"].strip().splitlines()
        print(f"\n{area}: {fault} ({len(values)}; --case {', '.join(str(v['seed']) for v in values[:4])})")
        print(f"  plopfast {' '.join(first['argv'])}"[:300])
        for line in (detail[:1] + detail[-1:]) if detail else first["err"].strip().splitlines()[-1:]:
            print(f"  {line}"[:300])
    if path:
        path.write_text(json.dumps({"counts": counts, "faults": {f"{a}: {f}": [v["seed"] for v in vs] for (a, f), vs in faults.items()}}, indent=1))  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
