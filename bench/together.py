"""K LoRA trainings on one SmolLM2-135M: all at once, one after the other, and by PEFT with `adapter_names`.

    pip install 'plopfast[hf,bench]' && python bench/together.py [--jobs 2 4 8 16] [--rows 1 4] [--repeats 3]
    python bench/together.py --keep together.jsonl       # about half an hour on shared cores; goes on after a kill

Every job has rows of its own of the demo task, rank 8 on all linear modules, its own seed and AdamW, in float32 and without dropout,
a constant rate, and makes STEPS steps of so many rows. "one after the other" is `Trainer`, job by job, each with its adapters put in
and taken out again; "at once" is `Together`. PEFT holds K adapters in one model and gets the same rows of all jobs as one batch, each
row with its adapter's name; as it allows names only in evaluation mode, it has that (there is no dropout that could tell),
transformers' own loss of each job's rows, and one AdamW a job. Every run is a process of its own, and the arms take turns in each
repeat. CPU time is that of the steps, without each training's first one and without setting up; memory is the peak of resident
memory, less that of the loaded model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure

SECONDS: list[float] = []  # of CPU time, of the steps of this process
ARMS = ("one after the other", "at once", "PEFT, adapter_names")
STEPS, RANK, ALPHA = 6, 8, 16.0


def one(arm: str, jobs: int, rows: int) -> dict[str, float]:
    """Trains all jobs once, in this process."""
    import torch
    import transformers

    import plopfast as pf
    from plopfast.data.rows import DEMO

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = pf.load_model(dtype=torch.float32)
    examples = pf.tokenize(pf.read_jsonl(DEMO["train"])[: jobs * rows * STEPS], tokenizer)
    own = {f"job {i}": examples[i * rows * STEPS : (i + 1) * rows * STEPS] for i in range(jobs)}
    model_mib = measure.peak_mib(lambda: None)
    run = _by_peft(model, own, rows) if arm == ARMS[2] else _by_plopfast(model, own, rows, arm == ARMS[1])
    found: dict[str, float] = {}
    found["extra_mib"] = measure.peak_mib(lambda: found.update(loss=run())) - model_mib
    return {**found, "cpu_seconds": sum(SECONDS)}


def clocked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, whose CPU time is noted in SECONDS, but for a training's first one."""
    first = True

    def run(*arguments: Any) -> Any:
        nonlocal first
        began = time.process_time()
        value = step(*arguments)
        if not first:
            SECONDS.append(time.process_time() - began)
        first = False
        return value

    return run


def _by_plopfast(model: Any, own: dict[str, Any], rows: int, at_once: bool) -> Any:
    import plopfast as pf
    from plopfast.training.together import Together, job_of

    placement = pf.Placement({info.name: (RANK, ALPHA) for info in pf.linear_modules(model)}, [], "all", 0)
    configs = {
        name: pf.TrainConfig(max_steps=STEPS, batch_rows=rows, seed=i, schedule="constant", warmup=0.0)
        for i, name in enumerate(own)
    }

    def together() -> float:
        for i, name in enumerate(own):
            pf.inject(model, placement, name=name, seed=i)
        jobs = [job_of(model, name, configs[name], own[name]) for name in own]
        all_of_them: Any = Together(model, jobs)
        all_of_them._step = clocked(all_of_them._step)
        all_of_them.fit()
        return sum(job.last_loss for job in jobs) / len(jobs)

    def in_turn() -> float:
        total = 0.0
        for i, name in enumerate(own):
            pf.inject(model, placement, seed=i)
            trainer: Any = pf.Trainer(model, configs[name], own[name])
            trainer._train_step = clocked(trainer._train_step)
            trainer.fit()
            total += trainer.last_loss
            pf.unload(model)
        return total / len(own)

    return together if at_once else in_turn


def _by_peft(model: Any, own: dict[str, Any], rows: int) -> Any:
    import peft
    import torch

    import plopfast as pf
    from plopfast.data.batches import collate
    from plopfast.training.plan import Plan

    def train() -> float:
        types = sorted({info.type for info in pf.linear_modules(model)})
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=types, task_type="CAUSAL_LM")
        wrapped: Any = None
        for name in own:
            if wrapped is None:
                wrapped = peft.get_peft_model(model, lora, adapter_name=name)
            else:
                wrapped.add_adapter(name, lora)
        wrapped.eval()
        of = {name: [p for n, p in wrapped.named_parameters() if f".{name}." in n] for name in own}
        for parameters in of.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        optimizers = [
            torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True) for parameters in of.values()
        ]
        plans = {
            name: Plan(
                own[name], [], pf.TrainConfig(max_steps=STEPS, batch_rows=rows, seed=i, schedule="constant", warmup=0.0)
            )
            for i, name in enumerate(own)
        }
        groups = {name: plan.groups() for name, plan in plans.items()}

        def step() -> float:
            parts = {name: [plans[name].rows[i] for i in next(groups[name])] for name in own}
            batch = collate([row for part in parts.values() for row in part])
            names = [name for name, part in parts.items() for _ in part]
            logits = wrapped(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], adapter_names=names
            ).logits
            losses, at = [], 0
            for part in parts.values():
                labels = batch["labels"][at : at + len(part)]
                losses.append(model.loss_function(logits[at : at + len(part)], labels, vocab_size=logits.shape[-1]))
                at += len(part)
            torch.stack(losses).sum().backward()
            for optimizer, parameters in zip(optimizers, of.values(), strict=True):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            return float(torch.stack(losses).mean())

        timed = clocked(step)
        return [timed() for _ in range(STEPS)][-1]

    return train


def run(arm: str, jobs: int, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", arm, str(jobs), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", type=int, default=[2, 4, 8, 16], help="how many trainings")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4], help="rows of a job in a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a file of results that is added to; runs in it are not made again")
    parser.add_argument("--one", nargs=3, metavar=("ARM", "JOBS", "ROWS"), help="make one run, and print its figures")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]), int(given.one[2]))))
        return
    kept: dict[str, dict[str, float]] = {}
    if given.keep and given.keep.exists():
        kept = {row["run"]: row["figures"] for row in map(json.loads, given.keep.read_text().splitlines())}
    cases = [(jobs, rows) for rows in given.rows for jobs in given.jobs]
    for repeat in range(given.repeats):
        for jobs, rows in cases:
            for arm in ARMS:
                name = f"{arm}: {jobs} jobs of {rows} rows, repeat {repeat}"
                if name not in kept:
                    kept[name] = run(arm, jobs, rows)
                    print(name, kept[name], flush=True)
                    if given.keep:
                        with given.keep.open("a") as file:
                            print(json.dumps({"run": name, "figures": kept[name]}), file=file)
    lines, runs = [], {}
    for jobs, rows in cases:
        lines.append(
            f"{jobs} jobs, {rows} rows each".ljust(24)
            + "".join(f"{t:>14}" for t in ("CPU seconds", "extra MiB", "loss"))
            + "     CPU ratio         MiB ratio"
        )
        of = {
            arm: [kept[f"{arm}: {jobs} jobs of {rows} rows, repeat {r}"] for r in range(given.repeats)] for arm in ARMS
        }
        runs[f"{jobs} jobs, {rows} rows"] = of
        for arm, found in of.items():
            cells = "".join(
                f"{statistics.median(one[key] for one in found):>14.4g}" for key in ("cpu_seconds", "extra_mib", "loss")
            )
            for key in ("cpu_seconds", "extra_mib"):
                values = {who: [one[key] for one in of[who]] for who in (arm, ARMS[0])}
                middle, low, high = measure.ratios(values, arm, ARMS[0])
                cells += f"{middle:>8.2f}" + f" {low:.2f}-{high:.2f}".rjust(10)
            lines.append(f"{arm:<24}{cells}")
        lines.append("")
    measure.save("together", "\n".join(lines), {"runs": runs})


if __name__ == "__main__":
    main()
