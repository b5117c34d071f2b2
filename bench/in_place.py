"""`pf.accelerate` in the trainers people have: SmolLM2-135M with PEFT, plain and accelerated step by step.

    pip install 'plopfast[hf,bench]' && python bench/in_place.py [--repeats 3] [--trainers Trainer SFTTrainer GRPOTrainer]
    python bench/in_place.py --keep in_place.jsonl       # 20 to 40 minutes on shared cores; goes on after a kill

Under each trainer all arms get the same rows, base weights, initial adapters (rank 16 on value, up and down, no dropout) and
settings, in float32. The arms add one option of `accelerate` after the other; TRL's trainers have a loss of their own, so
there the last arm is the one before. Every run is a process of its own, and the arms take turns in each repeat. CPU time is
that of `train()`; memory is the peak of resident memory during `train()`, less that of the loaded model.

Trainer and SFTTrainer make 6 steps of 16 rows of the demo task; GRPOTrainer makes 3 steps of 16 completions of up to 8
tokens, with a reward that counts a letter, so it generates as well. The loss at the end is that of the last step (Trainer,
SFTTrainer) or the mean reward (GRPOTrainer): equal values show that the arms did the same work.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure

OPTIONS = ("linears", "shared", "norms", "loss")  # in the order in which they are added
TRAINERS = {"Trainer": 5, "SFTTrainer": 4, "GRPOTrainer": 4}  # -> how many arms
ARMS = ("PEFT", *(f"+ {option}" for option in OPTIONS))
TYPES = ["v_proj", "up_proj", "down_proj"]
ROWS, STEPS = 16, {"Trainer": 6, "SFTTrainer": 6, "GRPOTrainer": 3}
COLUMNS = {"cpu_seconds": "CPU seconds", "extra_mib": "extra MiB", "steps": "steps", "end": "end"}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [text.count("e") / 10 for text in completions]


def one(kind: str, arm: int) -> dict[str, float]:
    """Trains once, in this process."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    import plopfast as pf
    from plopfast.data.rows import DEMO, IGNORE

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    model, tokenizer = pf.load_model(dtype=torch.float32)
    rows = pf.read_jsonl(DEMO["train"])[: ROWS * STEPS[kind]]
    model_mib = measure.peak_mib(lambda: None)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TYPES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    if arm:
        chosen = {option: option in OPTIONS[:arm] for option in OPTIONS}
        pf.accelerate(model, **chosen | {"loss": "auto" if chosen["loss"] else False})
    settings: dict[str, Any] = {
        "per_device_train_batch_size": ROWS, "max_steps": STEPS[kind], "learning_rate": 1e-3, "seed": 0, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings["output_dir"] = folder
        trainer: Any
        if kind == "GRPOTrainer":
            tokenizer.padding_side = "left"
            prompts = datasets.Dataset.from_dict({"prompt": [row["prompt"] for _, row in rows]})
            config = trl.GRPOConfig(**settings, num_generations=8, max_completion_length=8, beta=0.0)
            trainer = trl.GRPOTrainer(model, reward, args=config, train_dataset=prompts, processing_class=tokenizer)
        else:
            examples = pf.tokenize(rows, tokenizer)
            labels = [[t if on else IGNORE for t, on in zip(e.tokens, e.is_learned(), strict=True)] for e in examples]
            data = datasets.Dataset.from_dict({"input_ids": [e.tokens for e in examples], "labels": labels})
            if kind == "SFTTrainer":
                trainer = trl.SFTTrainer(
                    model, trl.SFTConfig(**settings), train_dataset=data, processing_class=tokenizer
                )
            else:
                collator = transformers.DataCollatorForSeq2Seq(tokenizer)
                arguments = transformers.TrainingArguments(**settings)
                trainer = transformers.Trainer(model, arguments, collator, data, processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        figures: dict[str, float] = {}

        def timed() -> None:
            cpu = time.process_time()
            figures["steps"] = trainer.train().global_step
            figures["cpu_seconds"] = time.process_time() - cpu

        figures["extra_mib"] = measure.peak_mib(timed) - model_mib
        key = "reward" if kind == "GRPOTrainer" else "loss"
        figures["end"] = [float(line[key]) for line in trainer.state.log_history if key in line][-1]
    return figures


def run(kind: str, arm: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", kind, str(arm)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a file of results that is added to; runs in it are not made again")
    parser.add_argument("--one", nargs=2, metavar=("TRAINER", "ARM"), help="make one run, and print its figures")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]))))
        return
    kept: dict[str, dict[str, float]] = {}
    if given.keep and given.keep.exists():
        kept = {row["run"]: row["figures"] for row in map(json.loads, given.keep.read_text().splitlines())}
    for repeat in range(given.repeats):
        for kind in given.trainers:
            for arm in range(TRAINERS[kind]):
                name = f"{kind} {arm} {repeat}"
                if name not in kept:
                    kept[name] = run(kind, arm)
                    print(name, kept[name], flush=True)
                    if given.keep:
                        with given.keep.open("a") as file:
                            print(json.dumps({"run": name, "figures": kept[name]}), file=file)
    lines, runs = [], {}
    for kind in given.trainers:
        lines += [f"{kind:<14}" + "".join(f"{label:>14}" for label in [*COLUMNS.values(), "CPU ratio", "MiB ratio"])]
        runs[kind] = {ARMS[i]: [kept[f"{kind} {i} {r}"] for r in range(given.repeats)] for i in range(TRAINERS[kind])}
        for arm, found in runs[kind].items():
            cells = [f"{statistics.median(one[key] for one in found):>14.4g}" for key in COLUMNS]
            for key in ("cpu_seconds", "extra_mib"):
                values = {who: [one[key] for one in runs[kind][who]] for who in (arm, "PEFT")}
                middle, low, high = measure.ratios(values, arm, "PEFT")
                cells.append(f"{middle:>8.2f}" + f" {low:.2f}-{high:.2f}".rjust(10))
            lines.append(f"{arm:<14}" + "".join(cells))
        lines.append("")
    measure.save("in_place", "\n".join(lines), {"runs": runs})


if __name__ == "__main__":
    main()
