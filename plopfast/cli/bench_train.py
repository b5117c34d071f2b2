"""`plopfast bench --train`: plopfast's training against PEFT with the Hugging Face Trainer, on one's own model and rows.

Every training runs in a process of its own (bench_arms.py), so that neither leaves memory or caches to the other; the two
take turns, and begin in turn. What is reported are medians over the repeats, and ratios between neighbours in time.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..support import files, machine
from ..support.errors import ConfigError, TrainingError
from ..support.ledger import Ledger
from ..support.progress import bar

NEEDED = ("transformers", "peft", "accelerate")
COLUMNS = {"tokens/s": "tokens_per_s", "peak MiB": "peak_mib", "above model": "above_mib", "loss after": "loss"}
RESULT = "bench_train.jsonl"
Row = dict[str, Any]


def run(
    out: Path, *, model: str | None = None, data: Sequence[str] = (), dtype: str = "auto", device: str = "auto",
    rank: int = 16, lr: float = 1e-3, batch_rows: int = 8, max_steps: int = 20, repeats: int = 3, budget_s: float = 540.0,
    overwrite: bool = False, progress: bool = False,
) -> tuple[list[Row], str]:  # fmt: skip
    """Trains adapters of `rank` on every linear module, `repeats` times with each trainer: `max_steps` of `batch_rows` rows.

    Writes out/bench_train.jsonl, a row for each training, and returns the rows and a table. `data` are files of rows
    (default: the WordNet demo), of which the first `max_steps * batch_rows` are taken, again from the start if there are
    fewer. No repeat but the first begins once `budget_s` seconds are spent.

    Nothing is written where it raises: ConfigError for a missing package, an impossible setting, and a model or rows that
    cannot be read; FileError for results that exist; TrainingError for a training that breaks off.

        rows, text = run(Path("bench"), model="HuggingFaceTB/SmolLM2-135M-Instruct", data=["train.jsonl"])
    """
    from ..data.rows import DEMO
    from .bench_arms import ARMS, Job, Recipe

    if gone := [package for package in NEEDED if not importlib.util.find_spec(package)]:
        raise ConfigError(
            f"bench --train: expected {', '.join(NEEDED)}, and {' and '.join(gone)} cannot be imported: pip install "
            "'plopfast[hf,bench]'"
        )
    if dtype == "float16":
        raise ConfigError("bench --train: expected --dtype bfloat16 or float32, got float16, in which gradients vanish")
    ledger, written = Ledger(out), {RESULT: ()}
    files.refuse_existing(out / RESULT, overwrite)
    ledger.check(written)
    recipe = Recipe(batch_rows, max_steps, lr, rank)
    sources = [str(Path(name).absolute()) if Path(name).exists() else name for name in data] or [str(DEMO["train"])]
    settings = {"rank": rank, "lr": lr, "batch_rows": batch_rows, "max_steps": max_steps}
    base = Job("", model, sources, dtype, device, recipe)
    origin = {"date": datetime.date.today().isoformat(), "commit": machine.commit(), "versions": _versions()}
    rows: list[Row] = []
    deadline = time.perf_counter() + budget_s
    with bar("bench", 2 * repeats, "trainings", progress) as shown:
        for repeat in range(repeats):
            if repeat and time.perf_counter() > deadline:
                break
            for arm in list(ARMS)[:: 1 if repeat % 2 == 0 else -1]:
                shown.set_postfix_str(ARMS[arm])
                job = replace(base, arm=arm, recipe=replace(recipe, seed=repeat))
                rows.append({**origin, "arm": arm, "repeat": repeat, **settings, **_trained(job)})
                shown.update()
    ledger.claim_once(written)
    files.write_text(out / RESULT, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    lines = [machine.describe(), *table(rows, ARMS)]
    if (done := len(rows) // 2) < repeats:
        lines.append(f"{done} of {repeats} repeats: {budget_s:g} s are spent")
    return rows, "\n".join([*lines, f"written: {out / RESULT}"])


def _versions() -> dict[str, str]:
    return machine.versions() | {"accelerate": importlib.metadata.version("accelerate")}


def _trained(job: Any) -> Row:
    """Runs one training in a process of its own. Raises ConfigError with what that process found wrong."""
    with tempfile.TemporaryDirectory() as folder:
        told, result = Path(folder, "job.json"), Path(folder, "result.json")
        told.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "plopfast.cli.bench_arms", str(told), str(result)]
        done = subprocess.run(command, env=_one_gpu(), capture_output=True, text=True, errors="replace")
        if result.exists():
            found = json.loads(result.read_text())
            assert isinstance(found, dict)
            if "error" in found:
                raise ConfigError(found["error"])
            return found
    if done.returncode < 0:
        raise TrainingError(f"{job.arm}: its process was killed by signal {-done.returncode} (9: too little memory?)")
    raise TrainingError(f"{job.arm}: its process ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _one_gpu() -> dict[str, str]:
    """The environment of a process that sees the first visible GPU alone, as transformers' Trainer would take all."""
    first = {
        name: os.environ[name].split(",")[0]
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
        if name in os.environ
    }
    return os.environ | {"CUDA_VISIBLE_DEVICES": "0"} | first


def table(rows: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    """What was trained, each arm's medians, and plopfast's ratios to the other; `names` of the arms, plopfast's first."""
    ran: dict[str, list[Row]] = {arm: [row for row in rows if row["arm"] == arm and "seconds" in row] for arm in names}
    lines = _described(next((row for row in rows if "seconds" in row), {}))
    lines.append(f"{'':<20}" + "".join(f"{title:>13}" for title in COLUMNS))
    for arm, found in ran.items():
        values = [statistics.median(row[key] for row in found) for key in COLUMNS.values()] if found else []
        why = next((row["left_out"] for row in rows if row["arm"] == arm and "left_out" in row), "")
        lines.append(
            f"{names[arm]:<20}" + "".join(f"{value:>13.5g}" for value in values) + f"  left out: {why}" * bool(why)
        )
    ours, theirs = ({row["repeat"]: row for row in found} for found in ran.values())
    if pairs := [(ours[repeat], theirs[repeat]) for repeat in ours if repeat in theirs]:
        lines.append(f"plopfast / {names['peft']}, median (lowest to highest) of {len(pairs)} repeats")
        for title, key in COLUMNS.items():
            ratios = sorted(one[key] / other[key] for one, other in pairs if other[key] > 0)
            if ratios:
                lines.append(f"{title:>20}{statistics.median(ratios):>13.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    return lines


def _described(row: Row) -> list[str]:
    if not row:
        return []
    where = row["gpu"] or row["device"]
    return [
        f"{row['name']}: {row['parameters'] / 1e6:.0f}M parameters in {row['dtype']} on {where}; adapters of rank {row['rank']} on "
        f"{row['modules']} modules",
        f"{row['max_steps']} steps of {row['batch_rows']} rows, {row['tokens']} tokens in rows of {row['shortest']} to "
        f"{row['longest']}; learning rate {row['lr']:g}; loss on these rows before: {row['loss_before']:.4f}",
    ]
