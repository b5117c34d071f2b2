"""The figures that matter of a folder that bench/card.sh filled, each with the file that it comes from.

python bench/card_table.py DIR
"""

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

Lines = list[str]


def last_line(path: Path) -> str:
    """The last line of a piece's output that says something."""
    lines = [line.rpartition("\r")[2].strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def host(value: dict[str, Any]) -> Lines:
    lines = []
    for kind, paths in value["host"].items():
        lines.append(f"  {kind + ', us':<12}{'step':>10}{'one thread':>12}{'forward':>10}{'GPU':>9}{'launches':>10}")
        for path, row in paths.items():
            lines.append(
                f"  {path:<12}{row['step_us']:>10.0f}{row['one_thread_us']:>12.0f}{row['forward_us']:>10.0f}"
                f"{row['gpu_us']:>9.0f}{row['launches']:>10}"
            )
    return [*lines, *(f"  one launch, {name}: {us:.1f} us" for name, us in value["launch_us"].items())]


def tune(value: dict[str, Any]) -> Lines:
    rows = value["rows"].values()
    fastest = Counter(row["strategy"] for row in rows)
    gains = [row["measured"]["torch"] / min(row["measured"].values()) for row in rows if "torch" in row["measured"]]
    lines = ["  fastest: " + ", ".join(f"{name} for {n} of {len(rows)} shapes" for name, n in fastest.most_common())]
    return lines + [
        f"  plain torch over the fastest: median {statistics.median(gains):.2f}, most {max(gains):.2f}"
    ] * bool(gains)


def bench(text: str) -> Lines:
    """A step of every linear and layer: each variant's time over that of PEFT (or of the frozen module)."""
    rows = [row for line in text.splitlines() if (row := json.loads(line))["op"].endswith("step")]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [f"  {'a step, relative':<38}" + "".join(f"{name:>12}" for name in variants) + f"{'base, ms':>12}"]
    for case in dict.fromkeys((row["case"], row["M"], row["R"]) for row in rows):
        found = {row["variant"]: row for row in rows if (row["case"], row["M"], row["R"]) == case}
        base = found[next(iter(found.values()))["relative_to"]]["median_ms"]
        shares = [f"{found[name]['relative']:>12.2f}" if name in found else f"{'-':>12}" for name in variants]
        label = "{}, {} tokens, rank {}".format(*case)
        lines.append(f"  {label:<38}{''.join(shares)}{base:>12.3f}")
    return lines


def training(value: dict[str, Any]) -> Lines:
    lines = [
        f"  {'tokens':>7} {'path':<12}{'tokens/s':>10}{'step, ms':>10}{'GPU, ms':>9}{'kernels':>9}{'peak MiB':>10}"
    ]
    for row in value["trainings"]:
        lines.append(
            "  {tokens:>7} {path:<12}{tokens_per_s:>10.0f}{step_ms:>10.1f}{gpu_ms:>9.1f}{kernels:>9}{peak_mib:>10.0f}".format(
                **row
            )
        )
    for row in value["graphs"]:
        lines.append(
            "  {tokens:>7} {backend:<12}{eager_ms:.1f} ms eagerly, {graph_ms:.1f} in a CUDA graph".format(**row)
        )
    return lines


def told(value: dict[str, Any]) -> Lines:
    return [f"  {line}" for line in value["table"]]


def peers(text: str) -> Lines:
    rows = [row for line in text.splitlines() if "seconds" in (row := json.loads(line))]
    lines = [f"  {'':<10}{'tokens/s':>10}{'peak MiB':>10}{'loss':>9}"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        speed, peak, loss = (
            statistics.median(row[key] for row in rows if row["arm"] == arm)
            for key in ("tokens_per_s", "peak_mib", "loss")
        )
        lines.append(f"  {arm:<10}{speed:>10.0f}{peak:>10.0f}{loss:>9.4f}")
    return lines


def variants(value: dict[str, Any]) -> Lines:
    found, seconds = value["variants"], value["compile_s"]
    each = ", ".join(f"{name} {n} ({sum(seconds[name]):.0f} s)" for name, n in sorted(found.items()))
    return [f"  over {value['tokens']} token counts: {each or 'nothing was compiled'}"]


# piece -> (the file of its figures, how they are shown)
PIECES: dict[str, Any] = {
    "tests": (None, None), "doctor-bfloat16": (None, None), "doctor-float32": (None, None), "host": ("host.json", host),
    "tune": ("cache/tune.json", tune), "bench": ("timings/bench.jsonl", bench),
    "training-small": ("training-small.json", training), "training-large": ("training-large.json", training),
    "memory": ("memory.json", told), "beside": ("beside.json", told), "peers": ("peers/bench_train.jsonl", peers), "variants": ("variants.json", variants),
}  # fmt: skip


def section(folder: Path, piece: str) -> Lines:
    file, show = PIECES[piece]
    said = folder / f"{piece}.txt"
    if not said.exists():
        failed = folder / f"{piece}.failed"
        return [f"{piece}: FAILED, {last_line(failed)} [{failed.name}]" if failed.exists() else f"{piece}: not run"]
    lines = dict.fromkeys(said.read_text(errors="replace").splitlines())
    notes = [f"  {line}" for line in lines if "left out" in line]
    if file is None:
        return [f"{piece}: {last_line(said)} [{said.name}]", *notes]
    path = folder / file
    if not path.exists():
        return [f"{piece}: no figures [{said.name}]", *notes]
    text = path.read_text()
    return [f"{piece} [{file}]", *show(text if path.suffix == ".jsonl" else json.loads(text)), *notes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for piece in PIECES:
        print("\n".join(section(folder, piece)))


if __name__ == "__main__":
    main()
