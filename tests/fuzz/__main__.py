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
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), *(str(HERE.parent / name) for name in ("", "data", "report"))]

from calling import fork  # noqa: E402

AREAS = ("files", "options", "kills")
STUCK_S = 90  # a case that not even the alarm ends


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
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        import corpus
        import kill_points

        corpus.make(folder / "corpus")
        kill_points.warm(folder)
        areas = [given.area] if given.area else [*AREAS]
        points = kill_points.points(folder, quick=given.kills < 100) if "kills" in areas else []
        if given.case is not None:
            print(json.dumps(one(given.area, given.case, folder), indent=1).replace("\\n", "\n"))
            return 0
        cases = dict.fromkeys(AREAS, given.cases) | {"kills": min(given.kills, len(points) - given.seed)}
        results = {area: spread(area, folder, given, cases[area]) for area in areas}
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
    argv = [text.replace("\0", "NUL") for text in outcome.argv]
    argv = [text if len(text) < 100 else text[:60] + "..." for text in argv]
    return {
        "seed": seed, "argv": argv, "code": outcome.code, "fault": outcome.fault, "detail": outcome.detail,
        "err": outcome.err[-1500:], "seconds": round(outcome.seconds, 2),
    }  # fmt: skip


def spread(area: str, folder: Path, given: argparse.Namespace, cases: int) -> list[dict]:
    """Runs the cases in `given.jobs` processes."""
    end = given.seed + cases
    jobs = [
        fork(
            lambda job=job: supervise(area, range(given.seed + job, end, given.jobs), folder, folder / f"{area}-{job}")
        )
        for job in range(given.jobs)
    ]
    for pid in jobs:
        os.waitpid(pid, 0)
    lines = [line for job in range(given.jobs) for line in (folder / f"{area}-{job}").read_text().splitlines()]
    return [value for value in map(json.loads, lines) if "fault" in value]


def supervise(area: str, seeds: range, folder: Path, results: Path) -> None:
    """Has a process run the cases, and another go on after a case that ends the process, which is its fault."""
    results.touch()
    while seeds:
        log = results.with_suffix(f".{seeds[0]}.err")
        status = os.waitpid(fork(lambda here=seeds, err=log: work(area, here, folder, results, err)), 0)[1]
        if status == 0:
            return
        lines = results.read_text().splitlines()
        at = json.loads(lines[-1])["begun"] if lines else seeds[0]
        told = log.read_text(errors="replace")
        place = next((line.strip() for line in told.splitlines() if "/plopfast/" in line), "?")
        value = {"seed": at, "argv": [], "code": status, "fault": f"died or stuck: {place}", "detail": told[-2000:], "err": "", "seconds": STUCK_S}  # fmt: skip
        with results.open("a") as file:
            print(json.dumps(value), file=file)
        shutil.rmtree(folder / f"case-{area}-{at}", ignore_errors=True)
        seeds = seeds[seeds.index(at) + 1 :]


def work(area: str, seeds: range, folder: Path, results: Path, log: Path) -> None:
    """Runs cases; writes two lines of JSON for each, one when it begins."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.enable()
    for seed in seeds:
        faulthandler.dump_traceback_later(
            STUCK_S * (4 if area == "kills" else 1), exit=True
        )  # kills: commands in a row
        with results.open("a") as file:
            print(json.dumps({"begun": seed}), file=file, flush=True)
            print(json.dumps(one(area, seed, folder)), file=file)
        faulthandler.cancel_dump_traceback_later()


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
