"""The search through the command line: what it finds, how it goes on, and what it refuses."""

import builtins
import json
import shutil
import sqlite3
import sys

import optuna
import pytest
import torch

from plopfast.cli.main import main
from plopfast.data.rows import DEMO
from plopfast.placing import rules
from plopfast.training.trainer import Trainer

TRIALS = 7
QUICK = [
    *("--score-prompts", "12", "--max-steps", "6", "--eval-rows", "8", "--eval-every", "2", "--rank", "4", "--k", "2"),
    *("--batch-tokens", "160"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """Options: a small model and short files of real rows."""
    from helpers import build

    folder = tmp_path_factory.mktemp("search")
    options = ["--model", str(folder / "model"), *QUICK]
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 40), ("valid", 8), ("test", 8)):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(line + "\n" for line in DEMO[split].read_text().splitlines()[:count]))
        options += [f"--{split}", str(file)]
    return options


def plopfast(*arguments):
    return main([str(a) for a in arguments])


def search(base, out, *more, trials=TRIALS):
    return plopfast("search", *base, "--out", out, "--search-trials", trials, *more)


def results(out):
    """search.json, and its trials without what no two runs share, those that were killed left out."""
    value = json.loads((out / "search.json").read_text())
    kept = ("params", "state", "valid_loss", "looks", "steps", "why")
    return value, [{name: t[name] for name in kept} for t in value["trials"] if t["state"] != "killed"]


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "run"
    assert search(base, out) == 0
    return out


def test_a_search_tries_and_ranks(found, base):
    value, trials = results(found)
    assert len(trials) == TRIALS and value["plopfast"] == "search"
    own = {"rank": 4, "alpha": 32.0, "lr": 1e-3, "init": "kaiming", "rule": "plop"}
    assert trials[0]["params"] == own, "the run's own settings come first"
    assert value["space"]["rank"]["choices"] == [4, 8, 16], "16 is the smallest side of a weight"
    assert len({json.dumps(t["params"]) for t in trials}) == TRIALS
    for name in ("rank", "alpha", "lr", "init", "rule"):
        assert len({t["params"][name] for t in trials}) > 1, f"{name} is searched"
    whole = {t["number"]: t["valid_loss"] for t in value["trials"] if t["state"] == "complete"}
    assert value["best"] == min(whole, key=whole.get)
    assert all(t["steps"] == 6 for t in trials if t["state"] == "complete")
    best = trials[value["best"]]["params"]
    assert {name: value["settings"][name] for name in best} == best


def test_pruning_happens(found):
    _, trials = results(found)
    pruned = [t for t in trials if t["state"] == "stopped early"]
    assert pruned and all(t["steps"] < 6 for t in pruned)
    firsts = [t["looks"]["1"] for t in trials]
    for number, trial in enumerate(trials):
        among = sorted(firsts[: number + 1])
        stopped = trial["state"] == "stopped early" and trial["steps"] == 2
        assert stopped == (firsts[number] > among[max(0, len(among) // 3 - 1)]), "only the lowest third goes on"


def test_the_same_seed_searches_the_same_without_the_test_rows(found, base, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(DEMO["test"].read_text().splitlines()[20:24]))
    assert search(base, tmp_path / "again", "--test", other) == 0
    assert results(tmp_path / "again")[1] == results(found)[1]


def test_another_seed_searches_otherwise(found, base, tmp_path):
    assert search(base, tmp_path / "run", "--seed", 1, trials=2) == 0
    assert results(tmp_path / "run")[1][1]["params"] != results(found)[1][1]["params"]


@pytest.mark.parametrize("init", ["kaiming", "eva"])
def test_the_best_settings_give_the_same_training_in_a_run(base, tmp_path, init):
    """Also EVA's, whose vectors depend on the rank that they were taken for."""
    out = tmp_path / "search"
    assert search(base, out, "--init", init, "--alpha", 100, trials=1) == 0
    value, trials = results(out)
    assert value["settings"]["init"] == init and value["settings"]["rank"] == 4
    assert plopfast("run", "--config", out / "search.json", "--out", tmp_path / "run") == 0
    training = json.loads((tmp_path / "run" / "training.json").read_text())
    assert training["valid_loss"] == trials[0]["valid_loss"]


def test_the_found_settings_run(found, tmp_path):
    assert plopfast("run", "--config", found / "search.json", "--out", tmp_path / "run") == 0
    value, trials = results(found)
    training = json.loads((tmp_path / "run" / "training.json").read_text())
    assert training["valid_loss"] == trials[value["best"]]["valid_loss"]


@pytest.mark.parametrize("number", [1, 4])
def test_a_killed_search_goes_on_as_if_it_had_not_been(found, base, tmp_path, monkeypatch, capsys, number):
    """Killed in the nth trial after its first look, which is in the store by then."""
    out, fit, fits = tmp_path / "run", Trainer.fit, []

    def killed(self, resume=False):
        fits.append(self)
        tell = self.on_valid

        def told(step, loss):
            if len(fits) == number and step > 2:
                raise KeyboardInterrupt
            tell(step, loss)

        self.on_valid = told
        return fit(self, resume)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "fit", killed)
        assert search(base, out) == 130
    assert f"plopfast search --resume --out {out}" in capsys.readouterr().err
    assert plopfast("search", "--resume", "--out", out) == 0
    value, trials = results(out)
    assert [t["state"] for t in value["trials"]].index("killed") == number - 1
    assert len(value["trials"]) == TRIALS + 1 and trials == results(found)[1]


def test_a_finished_search_can_be_widened(base, tmp_path, found, capsys):
    shutil.copytree(found, tmp_path / "run")
    assert plopfast("search", "--resume", "--out", tmp_path / "run") == 0
    assert results(tmp_path / "run")[1] == results(found)[1], "nothing is trained again"
    assert plopfast("search", "--resume", "--out", tmp_path / "run", "--search-trials", TRIALS + 1) == 0
    assert results(tmp_path / "run")[1][:TRIALS] == results(found)[1]
    assert len(results(tmp_path / "run")[1]) == TRIALS + 1
    printed = capsys.readouterr()
    assert f"{TRIALS + 1} trials" in printed.out and "plopfast run --config" in printed.out
    assert f"{TRIALS + 1}/{TRIALS + 1}" in printed.err and f"trial {TRIALS + 1}]" in printed.err, "on one bar"
    assert "the best so far" in printed.err
    assert search(base, tmp_path / "run") == 2
    assert "--resume" in capsys.readouterr().err
    assert search(base, tmp_path / "run", "--overwrite", trials=1) == 0
    assert len(results(tmp_path / "run")[1]) == 1


def test_a_store_of_another_search(found, base, tmp_path, capsys):
    out = tmp_path / "run"
    assert search(base, out, "--seed", 5, trials=1) == 0
    shutil.copy(found / "search.db", out / "search.db")
    assert plopfast("search", "--resume", "--out", out) == 2
    assert "search.db: cannot go on, because it began with other inputs: seed was 0, is 5." in capsys.readouterr().err
    rows = tmp_path / "train.jsonl"
    shutil.copytree(found, tmp_path / "data")
    config = json.loads((tmp_path / "data" / "config.json").read_text())
    rows.write_text("\n".join(DEMO["train"].read_text().splitlines()[50:90]))
    config["settings"]["train"] = str(rows)
    (tmp_path / "data" / "config.json").write_text(json.dumps(config))
    assert plopfast("search", "--resume", "--out", tmp_path / "data") == 2
    assert "began with other inputs: the train file." in capsys.readouterr().err


def test_stores_that_are_no_search_of_ours(found, tmp_path, capsys):
    shutil.copytree(found, tmp_path / "run")
    store = tmp_path / "run" / "search.db"
    store.unlink()
    optuna.create_study(storage=f"sqlite:///{store}", study_name="somebody's")
    assert plopfast("search", "--resume", "--out", tmp_path / "run") == 2
    assert "holds another study (somebody's)" in capsys.readouterr().err
    assert optuna.get_all_study_names(f"sqlite:///{store}") == ["somebody's"], "it is left as it was"
    store.write_bytes(b"not a database" * 100)
    assert plopfast("search", "--resume", "--out", tmp_path / "run") == 2
    assert "cannot be used as Optuna's store" in capsys.readouterr().err
    store.unlink()
    with sqlite3.connect(store) as other:
        other.execute("create table version_info (a text)")
    assert plopfast("search", "--resume", "--out", tmp_path / "run") == 2
    assert "cannot be used as Optuna's store" in capsys.readouterr().err


def test_without_optuna(base, tmp_path, capsys, monkeypatch):
    import_ = builtins.__import__

    def none_here(name, *rest):
        if name.split(".")[0] == "optuna":
            raise ImportError("No module named 'optuna'")
        return import_(name, *rest)

    monkeypatch.setattr(builtins, "__import__", none_here)
    monkeypatch.delitem(sys.modules, "plopfast.studies.search", raising=False)
    assert search(base, tmp_path / "run") == 2
    assert "pip install 'plopfast[search]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--full"], "--full has no adapters"),
        (["--budget", "10k"], "--budget fixes the size"),
        (["--granularity", "module"], "needs a budget"),
        (["--k", "9"], "k = 9: expected 1 to 7"),
        (["--rank", "33"], "rank 33"),
        (["--rule", "q_prj"], "did you mean 'q_proj'?"),
        (["--search-trials", "0"], "search_trials"),
        (["--score-prompts", "1", "--score-tokens", "completion"], "score more prompts"),
    ],
)
def test_what_cannot_be_searched(base, tmp_path, capsys, options, message):
    assert plopfast("search", *base, "--out", tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "search.json").exists()


def test_a_training_that_explodes_counts_as_the_worst(base, tmp_path, monkeypatch, capsys):
    from plopfast.training.loss import Objective

    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, *a, **k: forward(self, *a, **k) * torch.nan)
    assert search(base, tmp_path / "run", trials=2) == 2
    assert "none of 2 trials was trained to its end" in capsys.readouterr().err
    value, trials = results(tmp_path / "run")
    assert value["settings"] is None and [t["state"] for t in trials] == ["stopped early"] * 2
    assert all("loss nan" in t["why"] for t in trials)


def test_rules_and_inits_that_cannot_be_are_left_out(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rules, "MLP_NAMES", ())
    monkeypatch.setattr(rules, "MLP_PARENTS", ())
    assert search(base, tmp_path / "run", "--compat", "official", trials=1) == 0
    value, _ = results(tmp_path / "run")
    assert value["space"]["rule"]["choices"] == ["plop", "plop-inverse", "attn", "all", "no-qk"]
    assert "not searched: rule 'mlp' knows none of the types" in capsys.readouterr().err
    assert "eva" not in value["space"]["init"]["choices"], "the authors' procedure takes no vectors"


def test_a_cap_of_zero_means_any_number(base, tmp_path):
    assert search(base, tmp_path / "run", "--cap", 0, trials=1) == 0


def test_types_named_by_hand_are_one_more_choice(base, tmp_path):
    assert search(base, tmp_path / "run", "--rule", "q_proj, v_proj", trials=1) == 0
    value, trials = results(tmp_path / "run")
    assert trials[0]["params"]["rule"] == "q_proj, v_proj"
    assert value["space"]["rule"]["choices"][1:] == ["plop", "plop-inverse", "attn", "mlp", "all", "no-qk"]


def test_a_rule_of_the_table_is_searched_unless_it_is_drawn_or_lacks_scores(base, tmp_path, monkeypatch):
    rule = rules.Rule(name="made-up", help="the last type by name", pick=lambda report, _k, _seed: [max(report.types)])
    monkeypatch.setitem(rules.RULES, "made-up", rule)
    assert search(base, tmp_path / "run", trials=1) == 0
    value, _ = results(tmp_path / "run")
    assert value["space"]["rule"]["choices"] == ["plop", "plop-inverse", "attn", "mlp", "all", "no-qk", "made-up"]
