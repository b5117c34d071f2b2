"""The trial through the command line on a small model: its figures, its order, kills, and bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import edit, plopfast

from plopfast.data.labels import tokenize
from plopfast.data.rows import DEMO, read_jsonl
from plopfast.lora.peft_files import load_adapter
from plopfast.models import loading
from plopfast.studies import side_by_side
from plopfast.studies.trial import listed_arms, listed_rates, listed_seeds
from plopfast.support.errors import ConfigError
from plopfast.training.evaluate import choices_of, evaluate
from plopfast.training.together import Together

SMALL = ["--rank", "8", "--arms", "plop,attn,random", "--lrs", "1e-2,1e-3", "--alpha", "16"]
TIMED = ("seconds", "tokens_per_s", "peak_mib", "command")


@pytest.fixture
def options(base):
    return [*edit(edit(base, "--rank", 8), "--alpha", 16), *SMALL[2:6]]


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMED}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def read(out):
    return json.loads((out / "trial.json").read_text())


def test_a_whole_trial(options, tmp_path, model_folder, tokenizer, capsys):
    out = tmp_path / "run"
    options = edit(options, "--arms", "plop,attn,random,full")
    assert plopfast("trial", *options, "--out", out) == 0
    printed = capsys.readouterr()
    trial = read(out)
    assert [arm["name"] for arm in trial["arms"]] == ["plop", "attn", "random", "full"]
    assert trial["reference"] == "plop" and trial["seeds"] == [0, 1, 2] and trial["lrs"] == [0.01, 0.001]
    assert trial["budget"] == 3840 and trial["test_rows"] == 40 and trial["metric"] == "choice"
    assert set(trial["data"]) == {"train", "valid", "test"} and trial["machine"] and trial["versions"]["torch"]
    assert trial["general"]["file"] == "pydoc_data.topics" and 4096 <= trial["general"]["tokens"] < 4096 + 256
    for number, arm in enumerate(trial["arms"]):
        full = arm["name"] == "full"
        assert full or abs(arm["parameters"] / trial["budget"] - 1) <= 0.01
        assert (arm["rank_low"] is None) == full and bool(arm["types"]) != full
        swept = [float(lr) for lr in arm["sweep"]]
        assert swept[:2] == ([0.001, 0.0001] if full else [0.01, 0.001])
        best, second, *_ = sorted(swept, key=lambda lr: arm["sweep"][f"{lr:g}"])
        assert min(swept) < best < max(swept) or len(swept) == 6, "the sweep goes on while the best is at its edge"
        of = {lr: [json.loads((out / "trial" / arm["name"] / f"lr-{lr:g}-seed-{seed}" / "result.json").read_text())["valid_loss"]
                   for seed in (0, 1)] for lr in (best, second)}  # fmt: skip
        assert arm["lr"] == min(of, key=lambda lr: sum(of[lr])), "chosen by the validation loss of two seeds"
        assert [run["seed"] for run in arm["runs"]] == [0, 1, 2] and {run["lr"] for run in arm["runs"]} == {arm["lr"]}
        assert arm["runs"][0]["valid_loss"] == arm["sweep"][f"{arm['lr']:g}"]
        assert len({run["loss"] for run in arm["runs"]}) == 3, "the seeds matter"
        assert arm["accuracy"] == pytest.approx(sum(run["accuracy"] for run in arm["runs"]) / 3)
        assert arm["accuracy_low"] <= arm["accuracy"] <= arm["accuracy_high"]
        assert arm["forgetting"] == pytest.approx(arm["general_loss"] - trial["base"]["general_loss"]) != 0
        assert (arm["versus"] is None) == (number == 0) and arm["seconds"] > 0 and arm["peak_mib"] > 0
        if versus := arm["versus"]:
            assert versus["difference"] == pytest.approx(arm["accuracy"] - trial["arms"][0]["accuracy"])
            assert versus["low"] <= versus["difference"] <= versus["high"] and versus["p"] <= versus["p_corrected"]
        line = next(line for line in printed.out.splitlines() if line.startswith(arm["name"]))
        assert f"{arm['accuracy']:.4f}" in line and ("unmatched" in line) == full
        assert ("no difference shown" in line) == (number > 0 and versus["verdict"] == "no difference shown")
    trainings = sum(len(arm["sweep"]) + 3 for arm in trial["arms"])
    for text in (
        "trainings: 100%",
        f"{trainings}/{trainings}",
        "tests    : 100%",
        "13/13",
        "full: all weights, not matched",
    ):
        assert text in printed.err
    assert trial["dropped"] == [] and trial["same"] == {} and list(trial["criteria"]) == ["plop"]
    assert plopfast("report", "--out", out) == 0, "of a folder without placement and adapter"
    page = (out / "report.html").read_text()
    beside = {path.stem for path in (out / "report").iterdir()}
    assert {"trial", "forgetting"} <= beside and "In the trial, <b>plop " in page and trial["general"]["sha256"] in page

    trained = [path.stat().st_mtime_ns for path in out.glob("trial/*/*/result.json")]
    looked = [path.stat().st_mtime_ns for path in out.glob("trial/**/test.json")]
    assert len(trained) == trainings and len(looked) == 13 and max(trained) < min(looked), (
        "one look, after all training"
    )
    assert not list(out.glob("trial/**/*.safetensors.*")) and not list(out.glob("trial/**/checkpoints"))
    assert not list(out.glob("trial/full/**/model.safetensors")), "weights go once they are evaluated"

    run = trial["arms"][1]["runs"][2]
    model, _ = loading.load_model(model_folder)
    load_adapter(model, out / "trial" / "attn" / f"lr-{run['lr']:g}-seed-2" / "adapter")
    examples = tokenize(read_jsonl(DEMO["test"])[:40], tokenizer)
    metrics = evaluate(model, examples, choices=choices_of(examples))
    assert (metrics.accuracy, metrics.loss) == pytest.approx((run["accuracy"], run["loss"]), rel=1e-6)

    assert plopfast("trial", *options, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert plopfast("trial", *options, "--out", out, "--resume") == 0
    assert capsys.readouterr().out == printed.out, "nothing is done again"


def test_killed_and_resumed_it_ends_alike(options, tmp_path, capsys):
    options = [*options, "--save-every", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert plopfast("trial", *options, "--out", whole) == 0
    command = [sys.executable, "-m", "plopfast", "trial", *options, "--out", str(killed)]
    moments = ("plop/lr-0.001-seed-0/checkpoints/*2.safetensors", "plop/lr-*/test.json")
    for number, pattern in enumerate(moments):
        process = subprocess.Popen(
            [*command, *["--resume"] * bool(number)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and not list(killed.glob(f"trial/{pattern}")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (killed / "trial.json").exists(), "killed too late"
    assert plopfast("trial", *options, "--out", killed) == 2
    assert "an unfinished trial; pass --resume" in capsys.readouterr().err
    assert plopfast("trial", *options, "--out", killed, "--resume", "--seeds", "0,1,3") == 2
    assert "began with other inputs: seeds was 0,1,2, is 0,1,3" in capsys.readouterr().err
    rows = tmp_path / "train.jsonl"
    kept = rows.read_text()
    rows.write_text("".join(kept.splitlines(keepends=True)[1:]))
    assert plopfast("trial", *options, "--out", killed, "--resume") == 2
    assert "began with other inputs: the train file." in capsys.readouterr().err
    rows.write_text(kept)
    assert plopfast("trial", *options, "--out", killed, "--resume") == 0
    assert untimed(read(killed)) == untimed(read(whole))
    for result in killed.glob("trial/*/*/result.json"):
        steps = [json.loads(line)["seconds"] for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
        assert json.loads(result.read_text())["seconds"] == pytest.approx(sum(steps), abs=0.01), "of both its parts"


def test_scores_made_anew_do_not_mix_with_what_they_placed(options, tmp_path, capsys):
    """As after a kill in the middle, where only one training is left to be done."""
    out = tmp_path / "run"
    assert plopfast("trial", *options, "--out", out) == 0
    (out / "trial.json").unlink()
    scores = json.loads((out / "scores.json").read_text())
    for name, module in scores["scores"].items():
        module["nfn"] += 9 * ("v_proj" in name)
    del scores["types"]
    (out / "scores.json").write_text(json.dumps(scores))
    capsys.readouterr()
    assert plopfast("trial", *options, "--out", out, "--resume") == 2
    assert "began with other inputs: the placement of attn; the placement of plop" in capsys.readouterr().err


def test_other_texts_scores_and_data(options, tmp_path, capsys):
    """The folder's own scores are used, --general is read, and text without completions is compared by its tokens."""
    out, general = tmp_path / "run", tmp_path / "general.txt"
    general.write_text("The cat sat on the mat.\n\nAnd then it slept.\n")
    rows = [json.dumps({"text": f"word {n} and {n % 5}"}) + "\n" for n in range(40)]
    for split, part in (("train", rows[:24]), ("valid", rows[24:30]), ("test", rows[30:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(part))  # in the place of the fixture's
    assert plopfast("score", *options[:8], "--score-prompts", 12, "--out", out) == 0
    scored = (out / "scores.json").stat().st_mtime_ns
    assert plopfast("trial", *options, "--skip-first", "--out", out) == 2
    assert "was made with other settings: skip_first was False, is True" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(options[1], moved)
    assert plopfast("trial", *edit(options, "--model", moved), "--out", out) == 2
    assert f"model was {options[1]}, is {moved}" in capsys.readouterr().err
    assert plopfast("trial", *options, "--general", general, "--out", out) == 0
    trial = read(out)
    assert (out / "scores.json").stat().st_mtime_ns == scored
    assert trial["metric"] == "token" and trial["general"]["file"] == str(general) and trial["general"]["tokens"] < 60
    for arm in trial["arms"]:
        assert arm["accuracy"] == pytest.approx(sum(run["accuracy"] for run in arm["runs"]) / 3)
    capsys.readouterr()


def test_arms_that_are_one_placement_are_named(options, tmp_path, capsys):
    scored = tmp_path / "run"
    assert plopfast("trial", *edit(options, "--arms", "mlp,all,plop"), "--k", 7, "--out", scored) == 0
    told = capsys.readouterr().err
    assert "plop is the same placement as all, which is trained once" in told and "as mlp" not in told
    assert read(scored)["same"] == {"plop": "all"} and [arm["name"] for arm in read(scored)["arms"]] == ["mlp", "all"]
    assert plopfast("trial", *edit(options, "--arms", "all,plop"), "--k", 7, "--out", tmp_path / "one") == 2
    assert "all of them are one placement, all" in capsys.readouterr().err


def test_a_rate_at_which_training_breaks_is_not_chosen(options, tmp_path, capsys):
    options = edit(edit(options, "--arms", "plop,attn"), "--max-steps", 6)
    assert plopfast("trial", *edit(options, "--lrs", "1e30,1e-3"), "--clip", 0, "--out", tmp_path / "one") == 0
    for arm in read(tmp_path / "one")["arms"]:
        assert arm["sweep"]["1e+30"] is None and arm["lr"] in (0.001, 0.0001, 1e-5), (
            "lower ones follow, tenfold at most"
        )
        assert arm["sweep"][f"{arm['lr']:g}"] == arm["runs"][0]["valid_loss"]
    capsys.readouterr()
    assert plopfast("trial", *edit(options, "--lrs", "1e30"), "--clip", 0, "--out", tmp_path / "two") == 2
    assert re.search("arm 'plop' trains at none of its rates, lower --lrs: step", capsys.readouterr().err)


def test_bad_input(options, tmp_path, capsys):
    """Each is one line that says what and how to mend it, before anything is trained."""
    cases = [
        (edit(options, "--arms", "plop,atn"), "arms: expected some of plop, .*, got 'atn'; did you mean 'attn'?"),
        (edit(options, "--arms", "plop,plop"), "arms: .*'plop' twice"),
        (edit(options, "--arms", "plop"), "arms: expected two or more"),
        (edit(options, "--lrs", "1e-3,fast"), "lrs: expected numbers above 0 .*got 'fast'"),
        ([*options, "--seeds", "0,1"], "seeds: fewer than three"),
        ([*options, "--finalists", "1"], "finalists 1: expected two or more"),
        (edit([*options, "--compat", "official"], "--arms", "plop,weight-size"), "leave --compat official out"),
        ([*options, "--config", tmp_path / "full.json"], "an arm of its own"),
        ([*options[:6], *options[8:]], "give --test FILE rows of its own"),
        (edit(options, "--test", options[options.index("--valid") + 1]), "give --test FILE rows of its own"),
        (edit(options, "--test", tmp_path / "copy.jsonl"), "give --test FILE rows of its own"),
        (edit(options, "--rank", 1), "arm 'attn' cannot be matched|arm 'random' cannot be matched"),
        ([*options, "--budget", "100"], "budget"),
        ([*options, "--k", "9"], "k = 9: expected 1 to 7"),
        ([*options, "--general", tmp_path / "absent.txt"], r"absent\.txt: no such data file"),
        (
            [*options, "--general", tmp_path / "known.txt"],
            r"known\.txt shares 16 tokens .*training row .*train.jsonl:7,",
        ),
    ]
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[6])
    (tmp_path / "known.txt").write_text(f"Far from it.\n\nAnd then: {row['prompt']}{row['completion']}\n")
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "full.json").write_text('{"full": true}')
    for number, (case, message) in enumerate(cases):
        out = tmp_path / f"case{number}"
        assert plopfast("trial", *case, "--out", out) == 2, message
        err = capsys.readouterr().err
        assert re.search(f"plopfast: error: .*({message})", err), err
        assert not list(out.glob("trial/**/metrics.jsonl")) and not (out / "trial.json").exists()


def test_an_empty_budget_means_none(options, tmp_path, capsys):
    """As in a run: the arms are matched to what plop takes at --rank, here too little for the others."""
    assert plopfast("trial", *edit(options, "--rank", 1), "--budget", "", "--out", tmp_path / "run") == 2
    assert re.search("arm '(attn|random)' cannot be matched", capsys.readouterr().err)


def test_eva_needs_vectors_for_every_rank(options, tmp_path, capsys):
    options, out = [*edit(options, "--arms", "plop,attn"), "--init", "eva"], tmp_path / "run"
    assert plopfast("score", *options[:8], "--score-prompts", 12, "--init", "eva", "--rank", 4, "--out", out) == 0
    assert plopfast("trial", *options, "--out", out) == 2
    assert "first: plopfast score --init eva --rank 8 --overwrite --out" in capsys.readouterr().err
    assert plopfast("score", *options[:8], "--init", "eva", "--rank", 8, "--overwrite", "--out", out) == 0
    assert plopfast("trial", *options, "--out", out) == 0
    assert len(read(out)["arms"]) == 2


@pytest.mark.parametrize(
    ("check", "text", "message"),
    [
        (listed_arms, "plop,,attn", "got ''"),
        (listed_arms, "", "got ''"),
        (listed_rates, "1e-3,0.001", "twice"),
        (listed_rates, "1e-3,1.0000001e-3", "twice"),
        (listed_rates, "0", "above 0"),
        (listed_rates, "nan", "above 0"),
        (listed_rates, "inf", "above 0"),
        (listed_seeds, "0,1,1", "twice"),
        (listed_seeds, "0,1,2.5", "got '2.5'"),
        (listed_seeds, "0,1,-2", "got '-2'"),
    ],
)
def test_lists_that_cannot_be(check, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(text)


def test_lists_that_can():
    assert listed_arms(" plop , full") == ["plop", "full"]
    assert listed_rates("2e-3, 1") == [0.002, 1.0] and listed_seeds("3,1,2") == [3, 1, 2]


def test_small_steps_are_trained_at_once_and_give_the_same(options, tmp_path, monkeypatch, capsys):
    """One short row a step: all arms' rates together, then their other seeds; a step of more rows is taken alone."""
    seen, plain = [], Together.fit
    monkeypatch.setattr(side_by_side, "FEW_TOKENS", 100)  # this tokenizer's rows are longer
    monkeypatch.setattr(Together, "fit", lambda self, resume=(): (seen.append(len(self.jobs)), plain(self, resume))[1])
    small = [*options, "--batch-rows", "1", "--max-steps", "4"]
    assert plopfast("trial", *small, "--out", tmp_path / "at once") == 0
    assert seen == [6, 6] and "6 trainings at once, as their steps are small" in capsys.readouterr().err
    monkeypatch.setattr(side_by_side, "FEW_TOKENS", 0)
    assert plopfast("trial", *small, "--out", tmp_path / "in turn") == 0 and len(seen) == 2
    for one, other in zip(*(read(tmp_path / name)["arms"] for name in ("at once", "in turn")), strict=True):
        assert one["lr"] == other["lr"] and one["sweep"] == pytest.approx(other["sweep"], rel=1e-4)
        for a, b in zip(one["runs"], other["runs"], strict=True):
            assert (a["seed"], a["steps"], a["best_step"]) == (b["seed"], b["steps"], b["best_step"])
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["seconds"] > 0
    monkeypatch.setattr(side_by_side, "FEW_TOKENS", 100)
    monkeypatch.setattr(Together, "fit", lambda *_, **__: pytest.fail("steps of several rows were taken at once"))
    assert plopfast("trial", *options, "--batch-rows", "8", "--arms", "plop,attn", "--out", tmp_path / "large") == 0


def test_a_rate_that_breaks_leaves_those_beside_it(options, tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "FEW_TOKENS", 100)
    words = [*edit(edit(options, "--lrs", "1e37,1e-3"), "--arms", "plop,attn"), "--batch-rows", "1", "--max-steps", "4"]
    seen, plain = [], Together.fit
    monkeypatch.setattr(Together, "fit", lambda self, resume=(): (seen.append(len(self.jobs)), plain(self, resume))[1])
    assert plopfast("trial", *words, "--out", tmp_path / "run") == 0
    assert seen == [4, 4], "two arms: no fewer"
    assert all(arm["sweep"]["1e+37"] is None and arm["lr"] <= 1e-3 for arm in read(tmp_path / "run")["arms"])
    seen.clear()
    words = [*edit(edit(options, "--lrs", "1e-3"), "--arms", "plop,attn"), "--batch-rows", "1", "--max-steps", "2"]
    assert plopfast("trial", *words, "--out", tmp_path / "few") == 0
    assert seen == [4], "two first rates are too few, their four other seeds are not"
