"""Reading and tokenising 200,000 short rows, in this checkout and in another: CPU and wall time, peak of allocated memory.

    git worktree add ../before 031a95e
    python bench/rows.py ../before [--ours .] [--rows 200000] [--repeats 5]

The rows are the demo's, numbered so that all differ, as pairs of strings and as messages. Each measurement is a process of
its own; the two checkouts take turns, and a ratio is that of neighbours in time. tracemalloc slows a process down, so the
peak is measured in runs of its own. Targets: reading no slower and in less memory than before; read and tokenised in at
most 0.6 of the time and the memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

import plopfast as pf
from plopfast.data.rows import DEMO

ROOT = Path(__file__).parent.parent
CHILD = """
import json, sys, time, tracemalloc
from pathlib import Path
file, folder, part, memory = sys.argv[1:]
import plopfast as pf, plopfast.data.labels, plopfast.data.rows
assert Path(pf.__file__).resolve().parent.parent == Path.cwd().resolve(), pf.__file__
tokenizer = None
if part == "tokenised":
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pf.tokenize([("warm up", {"text": "a dog"})], tokenizer)
if memory == "memory":
    tracemalloc.start()
cpu, wall = time.process_time(), time.perf_counter()
rows = pf.read_jsonl(file)
examples = pf.tokenize(rows, tokenizer) if tokenizer else rows
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
peak = tracemalloc.get_traced_memory()[1] / 2**20 if memory == "memory" else None
print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mib": peak, "rows": len(examples)}))
"""


def write_rows(folder: Path, count: int) -> dict[str, Path]:
    """Write the rows of both kinds; returns their files."""
    demo = [row for _, row in pf.read_jsonl(DEMO["train"])]
    paths = {"pairs": folder / "pairs.jsonl", "messages": folder / "messages.jsonl"}
    with paths["pairs"].open("w") as pairs, paths["messages"].open("w") as messages:
        for number in range(count):
            row = demo[number % len(demo)]
            prompt, answer = f"{number}. {row['prompt']}", row["completion"]
            pairs.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
            messages.write(json.dumps({"messages": turns}) + "\n")
    return paths


def run(checkout: Path, *arguments: object) -> dict[str, float]:
    """Measure once, in a process that imports plopfast from the checkout."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True, env=environment(checkout)
    )
    return json.loads(done.stdout)


def environment(checkout: Path) -> dict[str, str]:
    """The environment of a measurement: its own plopfast, and as many threads as there are cores."""
    return os.environ | {"PYTHONPATH": str(checkout.resolve()), "TOKENIZERS_PARALLELISM": "true"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout to compare with")
    parser.add_argument("--ours", type=Path, default=ROOT)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["read", "tokenised"], choices=["read", "tokenised"])
    parser.add_argument("--print", action="store_true", help="keep no result")
    arguments = parser.parse_args()
    checkouts = {"ours": arguments.ours, "before": arguments.before}
    lines = [f"{'':<20}{'ours: CPU s':>12}{'wall s':>8}{'MiB':>7}   ours / before: {'CPU':>5}{'wall':>7}{'MiB':>7}"]
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = write_rows(folder, arguments.rows)
        if "tokenised" in arguments.parts:
            pf.load_model()[1].save_pretrained(folder / "tokenizer")
        for part in arguments.parts:
            for kind, file in files.items():
                call = (file, folder / "tokenizer", part)
                times = [
                    {who: run(at, *call, "time") for who, at in checkouts.items()} for _ in range(arguments.repeats)
                ]
                peaks = {who: run(at, *call, "memory")["peak_mib"] for who, at in checkouts.items()}
                ours = {what: statistics.median(one["ours"][what] for one in times) for what in ("cpu_s", "wall_s")}
                ratios = {
                    what: measure.ratios(
                        {who: [one[who][what] for one in times] for who in checkouts}, "ours", "before"
                    )
                    for what in ours
                }
                figures[f"{kind}, {part}"] = {
                    "ours": ours | {"peak_mib": peaks["ours"]},
                    "ours / before": ratios | {"peak_mib": peaks["ours"] / peaks["before"]},
                }
                lines.append(
                    f"{kind + ', ' + part:<20}{ours['cpu_s']:>12.2f}{ours['wall_s']:>8.2f}{peaks['ours']:>7.0f}"
                    f"{ratios['cpu_s'][0]:>24.2f}{ratios['wall_s'][0]:>7.2f}{peaks['ours'] / peaks['before']:>7.2f}"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    if arguments.print:
        print("\n".join(lines))
    else:
        measure.save("rows", "\n".join(lines), {"rows": arguments.rows, "repeats": arguments.repeats, **figures})


if __name__ == "__main__":
    main()
