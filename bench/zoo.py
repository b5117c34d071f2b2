"""Every class that transformers maps to causal language models, built tiny and tried end to end: what works, and what not.

    python bench/zoo.py --jobs 2 --keep zoo.jsonl       # goes on after a kill
    python bench/zoo.py --jobs 2 --name zoo_lowest      # with the lowest transformers that pyproject.toml allows
    python bench/zoo.py --only llama,gpt2

A family is built, scored, adapted, trained, saved, read by PEFT, merged, loaded and resumed; each step is held against a
plain account of its own (tests/zoo, which it runs). Prints a line for each step that is not ok.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import measure

ROOT = Path(__file__).parents[1]
STEPS = ("build", "score", "inject", "gradients", "train", "peft", "merge", "load", "resume")
MANY = 1 / 3  # of the layers' weights in experts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, with commas between")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument(
        "--keep", type=Path, help="a file of results that is added to; its families are not tried again"
    )
    parser.add_argument("--name", default="zoo", help="of the file in bench/results (default: zoo)")
    given = parser.parse_args()
    only = given.only.split(",") if given.only else []
    with tempfile.TemporaryDirectory() as folder:
        kept = given.keep or Path(folder) / "zoo.jsonl"
        command = [sys.executable, str(ROOT / "tests" / "zoo"), *only, "--jobs", str(given.jobs), "--keep", str(kept)]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code:
            return code
        rows = sorted(map(json.loads, kept.read_text().splitlines()), key=lambda row: row["family"])
    table = table_of(rows)
    if only:
        print(table)
    else:
        measure.save(given.name, table, {"families": rows})
    return 0


def kind_of(said: str) -> str:
    """ "ok", "refused", "WRONG" or "CRASH" """
    return said.split(":")[0]


def table_of(rows: list[dict]) -> str:
    """A line a family with a word a step, then one for each step that is not ok, then the counts."""
    letters = {"ok": ".", "refused": "r", "WRONG": "W", "CRASH": "C"}
    lines = [
        "steps: " + " ".join(STEPS) + "; . ok, r refused, W wrong, C crash; share of the layers' weights in 3-D experts"
    ]
    for row in rows:
        marks = "".join(letters[kind_of(row["steps"].get(step, "CRASH"))] for step in STEPS)
        share = row["facts"].get("share_in_experts")
        lines.append(f"{row['family']:<26}{row['class']:<40}{marks}  {'' if share is None else f'{share:.0%}'}")
    lines.append("")
    for row in rows:
        lines += [f"{row['family']}: {step}: {said}" for step, said in row["steps"].items() if said != "ok"]
    built = [row for row in rows if row["steps"]["build"] == "ok"]
    lines += ["", f"{len(built)} of {len(rows)} build"]
    for step in STEPS[1:]:
        counts = Counter(kind_of(row["steps"][step]) for row in built)
        lines.append(f"{step:<10}" + ", ".join(f"{counts[kind]} {kind}" for kind in letters if counts[kind]))
    green = sum(all(said == "ok" for said in row["steps"].values()) for row in rows)
    many = sum(row["facts"].get("share_in_experts", 0) > MANY for row in rows)
    return "\n".join(
        [*lines, f"{green} with every step ok; {many} with over a third of their layers' weights in experts"]
    )


if __name__ == "__main__":
    sys.exit(main())
