"""A trial's figures, made again from the files of its trainings and tests; the general text and its limits."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import build, edit, plopfast

import plopfast as pf
from plopfast.data.example import Example
from plopfast.placing.rules import arm_names
from plopfast.run.general import general_text, why_not_held_out
from plopfast.scoring.report import NFNReport
from plopfast.studies.paired import accuracies, compare
from plopfast.studies.trial import listed_arms, listed_rates, listed_seeds
from plopfast.support.errors import ConfigError


def test_a_trial_is_what_its_files_say(base, tmp_path):
    out = tmp_path / "run"
    options = [*edit(edit(base, "--rank", 8), "--alpha", 16), "--arms", "attn,mlp,full", "--lrs", "1e-3,2e-2,1e-2"]
    more = ["--seeds", "4,0,2,9", "--confidence", "0.8", "--seed", "5"]
    assert plopfast("trial", *options, *more, "--out", out) == 0
    trial = json.loads((out / "trial.json").read_text())

    def kept(path, name):
        return json.loads((path / name).read_text())

    basis, report, tests = kept(out / "trial" / "base", "test.json"), NFNReport.load(out / "scores.json"), []
    plop = pf.place(report, "plop", rank=8)
    assert trial["budget"] == plop.parameters and trial["reference"] == "attn" and trial["confidence"] == 0.8
    for arm in trial["arms"]:
        folder, scale = out / "trial" / arm["name"], 0.1 if arm["name"] == "full" else 1
        rates = [float(f"{lr * scale:g}") for lr in (1e-3, 2e-2, 1e-2)]
        sweep = {lr: kept(folder / f"lr-{lr}-seed-4", "result.json")["valid_loss"] for lr in arm["sweep"]}
        assert arm["sweep"] == sweep and [float(lr) for lr in sweep][:3] == rates
        first, second, *_ = sorted(sweep, key=sweep.get)
        other = {lr: kept(folder / f"lr-{lr}-seed-0", "result.json")["valid_loss"] for lr in (first, second)}
        best = float(min((first, second), key=lambda lr: sweep[lr] + other[lr]))
        paths = [folder / f"lr-{best:g}-seed-{seed}" for seed in (4, 0, 2, 9)]
        results, looks = ([kept(path, name) for path in paths] for name in ("result.json", "test.json"))
        assert [(r["lr"], r["seed"]) for r in results] == [(best, seed) for seed in (4, 0, 2, 9)] and arm["lr"] == best
        assert len({r["valid_loss"] for r in results}) == 4, "seeds and rates reach the trainings"
        every = [kept(path.parent, "result.json") for path in folder.glob("*/result.json")]
        assert len(every) == len({r["valid_loss"] for r in every}) == len(sweep) + 4
        for key in ("loss", "general_loss"):
            assert arm[key] == pytest.approx(sum(look[key] for look in looks) / 4)
        assert arm["forgetting"] == pytest.approx(arm["general_loss"] - basis["general_loss"])
        assert arm["peak_mib"] == max(r["peak_mib"] for r in every)
        assert arm["seconds"] == pytest.approx(sum(r["seconds"] for r in every), abs=0.05)
        for result, path in zip(results, paths, strict=True):
            lines = [json.loads(line)["seconds"] for line in (path / "metrics.jsonl").read_text().splitlines()]
            assert result["seconds"] == pytest.approx(sum(lines), abs=0.02)
        if arm["name"] == "full":
            assert arm["parameters"] == sum(p.numel() for p in build("llama").parameters())
        else:
            placement = pf.place(report, arm["name"], budget=plop.parameters)
            assert (arm["parameters"], arm["types"]) == (placement.parameters, placement.types)
            ranks = [rank for rank, _ in placement.modules.values()]
            assert (arm["rank_low"], arm["rank_high"]) == (min(ranks), max(ranks))
        tests.append([look["right"] for look in looks])
    right = torch.tensor(tests, dtype=torch.float64)
    assert right.shape == (3, 4, 40) and basis["right"] not in tests[0], "the base has no adapters"
    assert [arm["versus"] for arm in trial["arms"]] == [None, *map(dataclasses.asdict, compare(right, 0.8, 5))]
    found = [(arm["accuracy"], arm["accuracy_low"], arm["accuracy_high"]) for arm in trial["arms"]]
    assert found == [tuple(interval) for interval in accuracies(right, 0.8, 5)]
    left = {path.name for path in out.glob("trial/**/*") if path.suffix == ".safetensors" or path.name == "checkpoints"}
    assert left == {"adapter_model.safetensors"}


def test_arms_are_matched_to_one_percent(base, tmp_path, capsys):
    """A budget that leaves an arm a little more than that below the others is refused, before anything is trained."""
    out = tmp_path / "run"
    assert plopfast("score", *base[:8], "--score-prompts", 12, "--out", out) == 0
    report = NFNReport.load(out / "scores.json")
    gaps = {}
    for budget in range(1500, 6000, 7):
        plop = pf.place(report, "plop", budget=budget).parameters
        gaps[budget] = pf.place(report, "attn", budget=plop).parameters / plop - 1
    refused = [budget for budget, gap in gaps.items() if -0.03 < gap < -0.0101]
    assert refused and max(gaps.values()) <= 0, "an arm is never above the budget"
    capsys.readouterr()
    for budget in (refused[0], refused[-1]):
        assert plopfast("trial", *base, "--arms", "plop,attn", "--budget", budget, "--out", out) == 2
        assert f"{gaps[budget]:+.1%}" in capsys.readouterr().err
        assert not list(out.glob("trial/**/result.json"))


def pretended_run(tokenizer, path, train, unlabeled=(), max_length=None):
    splits = {"train": train, "unlabeled": list(unlabeled)}
    return SimpleNamespace(
        config=SimpleNamespace(general=str(path), max_length=max_length), context=128, tokenizer=tokenizer,
        examples=splits.__getitem__,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["begin", "middle", "end"])
@pytest.mark.parametrize("split", ["train", "unlabeled"])
def test_a_stretch_of_sixteen_tokens_is_not_held_out(tokenizer, tmp_path, where, split):
    """In a row of either split, wherever it stands in both; one token less is a turn of phrase."""
    path = tmp_path / "general.txt"
    path.write_text(" ".join(f"word{chr(97 + i)} number{chr(98 + i % 20)}" for i in range(20)))
    (general, *_) = general_text(pretended_run(tokenizer, path, []), 4096).rows
    for length, refused in ((15, False), (16, True), (17, True)):
        last = len(general.tokens) - length
        begin = {"begin": 0, "middle": last // 2, "end": last}[where]
        shared, other = general.tokens[begin : begin + length], (299,) * 5
        tokens = {"begin": shared + other, "middle": other + shared + other, "end": other + shared}[where]
        rows = [
            Example((7,) * 20, (), None, None, "a"),
            Example(tokens, (), None, None, "b"),
            Example((8,) * 3, (), None, None, "c"),
        ]
        run = pretended_run(
            tokenizer, path, rows if split == "train" else rows[:1], rows if split == "unlabeled" else ()
        )
        why = why_not_held_out(run, general_text(run, 4096))
        assert ("training row b" in why) == refused


@pytest.mark.parametrize("max_length", [None, 20, 300])
def test_so_much_of_the_general_text(tokenizer, tmp_path, max_length):
    path = tmp_path / "general.txt"
    path.write_text(" ".join(f"word {i}" for i in range(5000)))
    found = general_text(pretended_run(tokenizer, path, [], max_length=max_length), 4096)
    counts = [len(row.tokens) for row in found.rows]
    most = min(128, max_length or 128)  # the model's context, or the limit
    assert max(counts) == most and sum(counts) == found.facts["tokens"]
    assert sum(counts[:-1]) < 4096 <= sum(counts)
    path.write_text("A few words. " * 9)
    few = general_text(pretended_run(tokenizer, path, []), 4096)
    assert sum(len(row.tokens) for row in few.rows) < 4096 and few.facts["file"] == str(path)


def test_lists_at_their_limits():
    known = arm_names()
    for count in range(1, len(known) + 1):
        text = " , ".join(known[:count])
        if count < 2:
            with pytest.raises(ConfigError):
                listed_arms(text)
        else:
            assert listed_arms(text) == known[:count]
    for seeds in ([0], [0, 1], [0, 1, 1], [0, 1, 2**63], [0, 1, -1]):
        with pytest.raises(ConfigError):
            listed_seeds(",".join(map(str, seeds)))
    assert listed_seeds(f"0,1,{2**63 - 1}") == [0, 1, 2**63 - 1]
    assert listed_rates("1e-300,1e300") == [1e-300, 1e300] and listed_rates("0.00123456789") == [0.00123457]
    for rates in ("0", "-1", "inf", "nan", "1e-3,1e-3", "1e-3,0.001", "1.0000001,1.0000002", ""):
        with pytest.raises(ConfigError):
            listed_rates(rates)
