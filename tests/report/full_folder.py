"""A run folder with every file that the report can show, of small made-up figures: python tests/report/full_folder.py FOLDER"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

import plopfast as pf
from plopfast.data.describe import DataFacts, SplitFacts
from plopfast.scoring.report import ModuleScore
from plopfast.support.config import RunConfig

TYPES = {"q_proj": 2.6, "k_proj": 2.4, "v_proj": 0.97, "o_proj": 1.03, "gate_proj": 1.42, "up_proj": 1.11, "down_proj": 1.04}  # fmt: skip
LAYERS = 12
ARMS = ("plop", "plop-inverse", "attn", "mlp", "all")


def scores(prompts: int = 24, types: dict[str, float] = TYPES) -> pf.NFNReport:
    """Seeded scores, decided as `plopfast score` would; the last layer of each type is an outlier."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.{type_}" for layer in range(LAYERS) for type_ in types]
    level = torch.tensor(
        [mean * (1.4 if layer == LAYERS - 1 else 1) for layer in range(LAYERS) for mean in types.values()]
    )
    noise = (
        torch.randn(len(names), prompts, generator=generator) * 0.03
        + torch.randn(1, prompts, generator=generator) * 0.05
    )
    tokens = torch.full((len(names), prompts), 20.0)
    stats = torch.stack([(level[:, None] * (1 + noise)) * tokens, tokens]).double()
    values = (stats[0].sum(1) / stats[1].sum(1)).tolist()
    made = {
        name: ModuleScore(value, 0.1, 20 * prompts, name.rsplit(".", 1)[1], i // len(types), 64, 64)
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    }
    report = pf.NFNReport(made, 20 * prompts, prompts, 1.5, "some/model", {"confidence": 0.95}, prompt_stats=stats)
    report.decision = report.decide(min(3, len(types)))
    return report


def make(folder: Path, prompts: int = 24, types: dict[str, float] = TYPES) -> pf.NFNReport:
    """Writes the folder's files as plopfast's commands do, and gives the scores in it."""
    folder.mkdir(parents=True, exist_ok=True)
    report = scores(prompts, types)
    report.save(folder / "scores.json")
    pf.place(report, "plop", k=3, rank=8).save(folder / "placement.json")
    stage = {"seconds": 3.25, "peak_mib": 812.5}
    stages = {name: stage | {"command": f"plopfast {name} --out {folder.name}"} for name in ("score", "train", "eval", "audit", "estimate")}  # fmt: skip
    data = {
        split: {"file": f"/data/{split}.jsonl", "sha256": f"{i:064x}"} for i, split in enumerate(("train", "test"), 10)
    }
    versions = {"plopfast": "0.1.0", "torch": "2.13.0"}
    write = {
        "config.json": {"plopfast": "config", "settings": dataclasses.asdict(RunConfig()), "model": "some/model", "device": "cpu",
                        "data": data, "versions": versions, "machine": "a processor, 2 cores"},
        "eval.json": {who: {"loss": loss, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "metric": "choice",
                            "examples": 770, "tokens": 1540, "seconds": 9.5, "answer_loss": loss / 9, "end_loss": 17 * loss / 9}
                      for who, loss, accuracy, low, high in (("base", 12.17, 0.5195, 0.4842, 0.5546), ("tuned", 0.2095, 0.8805, 0.8557, 0.9016))}
                     | {"rows": "test"} | judged(),
        "training.json": {"steps": 60, "best_step": 60, "valid_loss": 0.21, "stopped": "max_steps", "tokens": 9000,
                          "padding": 0.01, "seconds": 30.5, "tokens_per_s": 295.1, "paths": [], "unmoved": {},
                          "rows_seen": 455, "clipped": 56,
                          "validation": "128 validation rows, looked at every 30 steps"},
        "audit.json": audit(report), "estimate.json": estimate(), "trial.json": trial(data, versions),
        "data.json": rows(), "search.json": search(),
    }  # fmt: skip
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    history = [{"event": "begin", "stage": "score", "claims": {name: [] for name in write}}]
    history += [{"event": "done", "stage": name} | stage for name, stage in stages.items()]
    lines = [json.dumps({"plopfast": "history", "time": "2026-01-01T00:00:00+00:00"} | event) for event in history]
    (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    metrics = [
        {
            "step": step,
            "loss": 12 / step,
            "lr": 1e-3 * (1 - step / 61),
            "grad_norm": 60 / step,
            "tokens": 150,
            "positions": 150,
            "seconds": 0.5 + 0.01 * step,
        }
        for step in range(1, 61)
    ]
    metrics += [{"step": step, "valid_loss": 11 / step, "seconds": 4.0} for step in (30, 60)]
    for name, lines in (("metrics", metrics), ("eval_rows", eval_rows())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report


def rows() -> dict:
    """Made-up facts of two splits, as `describe_data` gives them."""
    splits = [
        SplitFacts(split, count, 20 * count, 2 * count, 8, {"50%": 19, "95%": 29}, 39, [(2 * i, count // (1 + abs(i - 9))) for i in range(20)],
                   [f"{count:,} rows: messages", "columns that are not used: 'id'"], f"/data/{split}.jsonl:1", [("user: a dog\n", False), ("animal", True)])
        for split, count in (("train", 3430), ("test", 770))
    ]  # fmt: skip
    return {"plopfast": "data", **DataFacts(splits, ["of 770 test rows, 3 have the prompt of one"]).as_dict()}


ANSWERS = ("animal", "artifact", "food", "plant", "substance")


def eval_rows(count: int = 770) -> list[dict]:
    """Rows of a choice task: 400 right before and 678 after, as eval.json says; food is taken for substance most."""
    found = []
    for at in range(count):
        expected, wrong = ANSWERS[at % 5], ANSWERS[(at + 1) % 5] if at % 3 else ANSWERS[(at + 2) % 5]
        if expected == "food":
            wrong = "substance"
        before, after = at < 372 or at >= 742, at >= 92  # 28 of the last and 280 of the first are right twice
        found.append({
            "row": at + 1, "where": f"test.jsonl, line {at + 1}", "prompt": f"Definition: number {at}\nCategory:", "expected": f" {expected}",
            "before": {"right": int(before), "answered": f" {expected if before else wrong}", "chance": 0.75 if before else 0.125},
            "after": {"right": int(after), "answered": f" {expected if after else wrong}", "chance": 0.875 if after else (at + 1) / 1000},
        })  # fmt: skip
    return found


def judged() -> dict:
    """What eval.json holds beside the two models' figures."""
    samples = [(1, "Definition: a bird\nCategory:", " animal", " A bird is", " animal", False, True),
               (2, "Definition: a jet\nCategory:", " artifact", "", " plant", False, False)]  # fmt: skip
    head = ("row", "prompt", "expected", "before", "after", "right_before", "right_after")
    lost = {
        "where": "keep.jsonl, line 3",
        "prompt": "The capital of France?",
        "expected": "Paris",
        "answer": " location",
    }
    return {
        "gain": {"difference": 0.361, "low": 0.318, "high": 0.402},
        "general": {"file": "/data/general.txt", "tokens": 4096, "before": 2.96, "after": 4.27},
        "samples": [dict(zip(head, sample, strict=True)) for sample in samples],
        "must_keep": {"file": "/data/keep.jsonl", "prompts": 20, "kept": 17, "lost": [lost], "wrong_before": 2},
    }  # fmt: skip


def search() -> dict:
    """search.json, as studies/search.py writes it: the second of four trials was the best."""

    def trial(number, rank, loss, state="complete", **more):
        params = {"rank": rank, "alpha": 2.0 * rank, "lr": 1e-3 / (number + 1), "init": "kaiming", "rule": "plop"}
        return {
            "number": number,
            "params": params,
            "state": state,
            "valid_loss": loss,
            "looks": {"1": loss},
            "steps": 60,
            "seconds": 31.5,
            "why": None,
        } | more

    trials = [
        trial(0, 16, 0.21),
        trial(1, 32, 0.185),
        trial(2, 4, 0.9, "stopped early"),
        trial(3, 8, None, "killed", steps=None, seconds=None),
    ]
    return {
        "plopfast": "search",
        "settings": dataclasses.asdict(RunConfig(rank=32)),
        "best": 1,
        "trials": trials,
        "space": {},
    }


def grpo(folder: Path) -> None:
    """Adds the files of a run of GRPO to a folder."""
    sample = {"prompt": "2 + 2 =", "before": "5", "after": "4", "reward_before": 0.0, "reward_after": 1.0}
    found = {"plopfast": "grpo", "reward": "number", "steps": 3, "test_prompts": 7, "mean_before": 0.125, "mean_after": 0.625,
             "notes": ["some completions were cut"], "samples": [sample]}  # fmt: skip
    (folder / "grpo.json").write_text(json.dumps(found))
    lines = [{"step": step, "reward": 0.1 * step, "length": 9.0, "entropy": None, "kl": 0.0} for step in (1, 2, 3)]
    (folder / "rewards.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def audit(report: pf.NFNReport) -> dict:
    types, lowest = report.types, list(report.types)[:3]
    shifted = dict(zip(types, reversed(types.values()), strict=True))
    alike = {"types": types, "pick": lowest, "tau": 1.0}
    unlike = {"types": shifted, "pick": list(types)[-3:], "tau": -1.0}
    cost = {"seconds": 1.5, "cost": 1.0, "extra_mib": 12.0, "needs": "forward passes"}
    return {
        "plopfast": "audit", "model": "some/model", "k": 3, "rank": 16, "prompts": report.prompts, "seed": 0, "types": types,
        "pick": lowest, "scored_tokens": report.tokens,
        "stability": [{"kind": "subset", "what": "8 prompts", "repeats": 100, "tau": 0.97, "tau_low": 0.81, "same_pick": 0.94}],
        "tokens": [{"what": "completion tokens"} | alike],
        "controls": [{"what": "random tokens", "seconds": 1.25} | unlike, {"what": "shuffled words", "seconds": 1.25} | alike, {"what": "random weights", "seconds": 1.5} | unlike],
        "verdict": "The pick stays the same on random tokens: it reflects the model rather than the task.",
        "criteria": [{"name": "NFN", "source": "PLoP", "chooses": "lowest", "agrees": True} | alike | cost,
                     {"name": "input spectrum", "source": "EVA", "chooses": "highest", "agrees": False} | unlike | cost],
        "missing": [{"kind": "tokens", "what": "tokens by role", "why": "the rows are no messages"}],
    }  # fmt: skip


def estimate() -> dict:
    def choice(name, parameters, adapters, activations):
        total = 513.0 + adapters + activations + 96.0
        return {"name": name, "types": ["v_proj"], "parameters": parameters, "weights_mib": 513.0, "adapters_mib": adapters,
                "activations_mib": activations, "logits_mib": 96.0, "total_mib": total, "tflops_per_step": 0.11,
                "memory_of_full": total / 2800.0, "flops_of_full": 0.68}  # fmt: skip

    choices = [choice("plop", 1_400_000, 21.4, 110.0), choice("all", 4_900_000, 74.8, 190.0), choice("full", 134_515_008, 1539.0, 652.0)]  # fmt: skip
    return {"plopfast": "estimate", "model": "some/model", "batch_tokens": 160, "rows": 8, "row_tokens": 20,
            "accumulate": 1, "device": "cpu", "dtype": "float32", "choices": choices}  # fmt: skip


def trial(data: dict, versions: dict) -> dict:
    def arm(name, accuracy, forgetting, versus):
        runs = [{"seed": seed, "lr": 1e-3, "valid_loss": 0.2, "best_step": 60, "steps": 60, "seconds": 31.0, "tokens_per_s": 290.0,
               "peak_mib": 812.0, "accuracy": accuracy, "loss": 0.21, "general_loss": 3.1 + forgetting + 0.01 * (seed - 1)}
                for seed in range(3)]  # fmt: skip
        return {"name": name, "types": ["v_proj"], "parameters": 1_400_000, "rank_low": 7, "rank_high": 8, "lr": 1e-3,
                "sweep": {"0.001": 0.2}, "runs": runs, "accuracy": accuracy, "accuracy_low": accuracy - 0.02,
                "accuracy_high": accuracy + 0.02, "loss": 0.21, "general_loss": 3.1 + forgetting, "forgetting": forgetting,
                "seconds": 95.0, "peak_mib": 812.0, "versus": versus}  # fmt: skip

    def versus(difference, verdict):
        return {"difference": difference, "low": difference - 0.02, "high": difference + 0.02, "p": 0.2, "p_corrected": 0.4,
                "verdict": verdict}  # fmt: skip

    found = (None, versus(-0.012, "no difference shown"), versus(-0.09, "worse"), versus(0.004, "no difference shown"), versus(-0.001, "no difference shown"))  # fmt: skip
    arms = [arm(name, 0.88 + (v["difference"] if v else 0), 0.05 * i - 0.02, v) for i, (name, v) in enumerate(zip(ARMS, found, strict=True))]  # fmt: skip
    return {"plopfast": "trial", "model": "some/model", "command": "plopfast trial --out full", "machine": "a processor, 2 cores",
            "versions": versions, "data": data, "budget": 1_400_000, "reference": "plop", "seeds": [0, 1, 2], "lrs": [5e-4, 1e-3],
            "metric": "choice", "test_rows": 770, "test": "paired bootstrap over rows and seeds, Holm over 4 comparisons",
            "confidence": 0.95, "general": {"file": "/data/general.txt", "sha256": "c" * 64, "tokens": 4096},
            "base": {"accuracy": 0.5195, "loss": 12.17, "general_loss": 3.1}, "seconds": 1900.0, "arms": arms}  # fmt: skip


if __name__ == "__main__":
    make(Path(sys.argv[1]))
