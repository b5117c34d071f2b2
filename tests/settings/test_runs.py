"""What a run makes of its settings: which rows go where, what each stage reads, writes and notes, and in which order."""

import itertools
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file
from workshop import artefacts, differences

import plopfast as pf
from plopfast.data.labels import tokenize
from plopfast.lora.layer import adapters
from plopfast.models.loading import load_model
from plopfast.placing.rules import FULL
from plopfast.run import costs, stages, whole
from plopfast.run.apply import trainer_for
from plopfast.run.run import Run
from plopfast.run.splits import HOLD_OUT
from plopfast.run.verify import verify
from plopfast.support import memory
from plopfast.support.config import RunConfig, TrainConfig
from plopfast.support.errors import AdapterError, ConfigError, DataError, PlacementError
from plopfast.support.files import read_tensors
from plopfast.support.ledger import Ledger
from plopfast.training.evaluate import choices_of, evaluate
from plopfast.training.plan import Plan


@pytest.fixture
def opened(shop):
    """Opens a run of the shop's model, in a new folder or where the stages up to `start` are done."""

    def open_run(start=None, resume=False, overwrite=False, **settings):
        given = {split: str(shop.root / f"{split}.jsonl") for split in ("train", "valid", "test")} | settings
        given = {name: value for name, value in given.items() if value}
        return Run(shop.folder(start), RunConfig(model=str(shop.model), **given), resume=resume, overwrite=overwrite)

    return open_run


def where(rows):
    return {place for place, _ in rows}


def test_held_out_rows_are_in_one_split(shop, opened):
    run = opened(valid=None, test=None)
    kept, held = where(run.rows("train")), where(run.rows("valid"))
    assert not kept & held and len(kept | held) == 40 and len(held) == 40 // HOLD_OUT
    assert {e.where for e in run.examples("train")} == kept and {e.where for e in run.examples("valid")} == held
    assert run.examples("test") is run.examples("valid")
    assert {e.where for e in run.sample()} <= kept, "nor are they scored"
    run = opened(valid=None)
    assert where(run.rows("test")) == where(opened().rows("test"))


def test_a_single_row_trains_and_validates(shop, opened):
    shop.write("one", shop.read("train")[:1])
    run = opened(train=str(shop.root / "one.jsonl"), valid=None, test=None)
    assert len(run.examples("train")) == len(run.examples("valid")) == 1


def test_the_hash_of_held_out_rows_is_of_all_of_them(shop, opened):
    """A folder's rows are hashed one by one, the held-out ones with them."""
    datasets = pytest.importorskip("datasets")
    digests = set()
    for change in (None, 0, HOLD_OUT, 7):  # 0 and 20 are held out
        rows = [{"text": f"a dog {i}{' more' * (i == change)}"} for i in range(30)]
        path = shop.folder()
        datasets.Dataset.from_list(rows).save_to_disk(path)
        run = opened(train=str(path), valid=None, test=None)
        digests.add(run.hashes("train")[0]["sha256"].replace(str(path), ""))
    assert len(digests) == 4


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("train", "valid"), ("valid", "test")])
def test_only_test_rows_must_not_be_trained_on(shop, opened, one, other, allow):
    said = []
    same = str(shop.root / "more.jsonl")
    run = opened(allow_overlap=allow, **{one: same, other: same})
    run.say = said.append
    if (one, other) == ("train", "test") and not allow:
        with pytest.raises(DataError):
            run.rows("train")
    else:
        assert run.rows(other) and len(run.overlap) == 1 and run.overlap[0] in said


def test_a_sample_is_drawn(shop, opened):
    run = opened(score_prompts=15)
    one = [example.where for example in run.sample()]
    assert len(one) == len(set(one)) == 15 and one == [example.where for example in run.sample()]
    assert one != [example.where for example in run.sample(1)] != [example.where for example in run.sample(2)]
    assert sorted(one) != sorted(place for place, _ in run.rows("train"))[:15], "not the first ones"
    assert one == [example.where for example in opened(score_prompts=15, seed=0).sample()]
    assert [e.where for e in opened(score_prompts=15, seed=1).sample()] == [e.where for e in run.sample(1)]
    assert len(opened(score_prompts=999).sample()) == 40
    assert all(set(example.roles) >= {"user", "assistant"} for example in run.sample())
    assert all(example.roles is None for example in run.examples("train"))


def test_rows_are_as_long_as_model_and_settings_allow(shop, opened):
    shop.write("long", [{"prompt": "oak " * 90, "completion": "elm"}])  # the model takes 128 tokens
    long = str(shop.root / "long.jsonl")
    for limit in (None, 1000):
        with pytest.raises(DataError, match="128"):
            opened(test=long, max_length=limit).examples("test")
    with pytest.raises(DataError, match="30"):
        opened(max_length=30).examples("test")
    for limit, most in ((None, 128), (1000, 128), (90, 90)):
        (row,) = opened(test=long, max_length=limit, long="cut").examples("test")
        assert len(row.tokens) == most


@pytest.mark.parametrize(
    ("settings", "most"), [({}, 128), ({"max_length": 40}, 40), ({"batch_tokens": 60}, 60), ({"max_length": 70, "batch_tokens": 50}, 50)]
)  # fmt: skip
def test_plain_text_fills_rows(shop, opened, settings, most):
    rows = opened(unlabeled=str(shop.root / "domain.txt"), **settings).examples("unlabeled")
    assert most // 2 < max(len(row.tokens) for row in rows) <= most, "a paragraph stays whole"
    assert opened().examples("unlabeled") == []


def test_bad_rows_of_a_training_file_are_told_of(shop, opened):
    run = opened(train=str(shop.root / "bad.jsonl"), bad_rows="skip", valid=None, test=None)
    assert len(run.read("train").bad) == 1


def test_each_split_is_read_for_what_it_is(shop, opened):
    run = opened()
    for split in ("train", "valid", "test"):
        assert {e.where.rpartition(":")[0] for e in run.examples(split)} == {str(shop.root / f"{split}.jsonl")}
        assert [e.tokens for e in run.examples(split)] == [e.tokens for e in tokenize(run.rows(split), run.tokenizer)]


def test_a_trainer_gets_the_runs_rows(shop, opened):
    run = opened("placed", unlabeled=str(shop.root / "domain.txt"), max_steps=9, eval_rows=99)
    looks = []
    placement = pf.Placement.load(run.file("place"))
    trainer = trainer_for(run, placement, None, on_valid=lambda *seen: looks.append(seen))
    assert trainer.rows == [*run.examples("train"), *run.examples("unlabeled")] and trainer.valid == run.examples(
        "valid"
    )
    other = trainer_for(
        run, placement, None, config=RunConfig(model=str(shop.model), lr=0.5, seed=7, dropout=0.5, max_steps=9)
    )
    assert (other.config.lr, other.config.seed) == (0.5, 7) and {m.dropout for m in adapters(run.model).values()} == {
        0.5
    }
    trainer_for(
        run,
        placement,
        None,
        config=RunConfig(model=str(shop.model), max_steps=2),
        on_valid=lambda *seen: looks.append(seen),
    ).fit()
    assert [step for step, _ in looks] == [2]


@pytest.mark.parametrize("copied", [True, False])
def test_full_training_of_a_copy_leaves_the_model(opened, copied):
    run = opened("placed", max_steps=1, lr=0.1, dtype="bfloat16")
    trainer_for(run, pf.Placement.load(run.file("place")), None)
    before = {name: p.clone() for name, p in run.model.named_parameters() if "lora" not in name}
    trainer = trainer_for(run, None, None, copied=copied)
    assert not adapters(trainer.model) and all(p.requires_grad for p in trainer.model.parameters())
    assert (trainer.model is run.model) != copied
    if copied:
        trainer.fit()
        assert next(trainer.model.parameters()).dtype == torch.float32
        kept = dict(run.model.named_parameters())
        names = {name: name.replace(".base.weight", ".weight") for name in before}
        assert all(torch.equal(kept[names[name]], value) for name, value in before.items())


def test_scores_say_how_they_were_made(opened):
    for tokens, first in (("all", False), ("user", True)):
        run = opened(score_prompts=9, score_tokens=tokens, skip_first=first)
        kept = stages.run_score(run).settings
        run.at.close()
        assert (kept["tokens"], kept["skip_first"]) == (tokens, first)


@pytest.mark.parametrize(("given", "early"), [({}, True), ({"init": "eva"}, False), ({"compat": "official"}, False)])
def test_scoring_ends_early_only_where_it_can(opened, given, early):
    run = opened(confidence=0.01, k=1, rank=2, **given)
    assert (stages.run_score(run).prompts < 40) == early
    run.at.close()


def test_k_matters_only_where_a_rule_takes_it(opened):
    run = opened(score_prompts=9, k=50, rule="attn")
    assert stages.run_score(run).prompts
    run.at.close()
    with pytest.raises(ConfigError, match="k = 50"):
        stages.run_score(opened(score_prompts=9, k=50))


def test_eva_vectors_are_those_of_the_scores(opened):
    run = opened(score_prompts=9, init="eva", rank=2)
    stages.run_score(run)
    assert (run.folder / "eva.safetensors").exists()
    run.at.close()
    later = Run(run.folder, RunConfig(**{**vars(run.config), "init": "kaiming"}), overwrite=True)
    stages.run_score(later)
    assert not (run.folder / "eva.safetensors").exists()
    later.at.close()


@pytest.mark.parametrize("rule", ["nonsense", "q_prj", "gradient-energy"])
def test_a_rule_that_cannot_be_stops_a_run_first(opened, rule):
    run = opened(rule=rule)
    with pytest.raises(PlacementError):
        whole.run_all(run)
    assert not run.folder.exists() or not (run.folder / "scores.json").exists()


@pytest.mark.parametrize("split", ["train", "valid", "test", "unlabeled"])
def test_a_row_that_cannot_be_used_stops_a_run_first(shop, opened, split):
    path = shop.root / ("broken.txt" if split == "unlabeled" else "broken.jsonl")
    path.write_bytes(b"\xff\n")
    run = opened(**{split: str(path)})
    with pytest.raises(DataError):
        whole.run_all(run)
    assert not (run.folder / "scores.json").exists()


def test_the_base_is_the_model_and_the_tuned_one_has_the_adapter(shop, opened):
    run = opened("trained")
    found = stages.run_eval(run)
    examples = opened().examples("test")
    model, _ = load_model(str(shop.model))
    base = evaluate(model, examples, choices=choices_of(examples)).loss
    pf.load_adapter(model, run.file("train"))
    tuned = evaluate(model, examples, choices=choices_of(examples)).loss
    assert found["base"]["loss"] == pytest.approx(base, rel=1e-6) and found["tuned"]["loss"] == pytest.approx(
        tuned, rel=1e-6
    )
    assert base != tuned and found["rows"] == "test"
    assert {key: found[key] for key in found} == json.loads(run.file("eval").read_text())
    run.at.close()


def test_what_chose_the_step_is_no_test(shop, opened):
    shutil.copy(shop.root / "valid.jsonl", shop.root / "copy.jsonl")
    for given in ({"test": None}, {"test": str(shop.root / "copy.jsonl")}):
        run = opened("trained", **given)
        assert stages.run_eval(run)["rows"] == "validation"
        run.at.close()


@pytest.mark.parametrize("stage", ["eval", "merge"])
def test_an_adapter_of_elsewhere(shop, opened, stage):
    """It is taken in place of the run's own, noted as an input, and refused on another base unless that is allowed."""
    do = getattr(stages, f"run_{stage}")
    other = shop.folder("trained")
    weights = other / "adapter" / "adapter_model.safetensors"
    tensors, facts = read_tensors(weights, "plopfast train")
    save_file({key: value * 3 for key, value in tensors.items()}, weights, facts)
    results = []
    for adapter in (None, other / "adapter"):
        run = opened("trained")
        do(run, adapter)
        results.append(artefacts(run.folder)["eval" if stage == "eval" else "merged"])
        noted = Ledger(run.folder).done()[stage]["inputs"]
        assert (str(weights) in noted) == (adapter is not None)
        run.at.close()
    assert results[0] != results[1]
    on_other = {
        "model": str(shop.other_model),
        **{s: str(shop.root / f"{s}.jsonl") for s in ("train", "valid", "test")},
    }
    run = Run(shop.folder(), RunConfig(**on_other))
    with pytest.raises(AdapterError):
        do(run, other / "adapter")
    run.at.close()
    run = Run(shop.folder(), RunConfig(**on_other))
    assert do(run, other / "adapter", any_base=True)
    run.at.close()


def test_merged_weights_are_base_plus_adapter(shop, opened):
    run = opened("trained")
    target = stages.run_merge(run)
    merged, _ = load_model(str(target))
    model, _ = load_model(str(shop.model))
    pf.load_adapter(model, run.file("train"))
    changed = [
        name
        for name, module in adapters(model).items()
        if not torch.equal(merged.get_submodule(name).weight, module.base.weight)
    ]
    assert changed == list(adapters(model))
    pf.merge(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter)
    run.at.close()


def test_full_training_has_no_page_and_no_merge(opened):
    for stage in (stages.run_report, stages.run_merge):
        with pytest.raises(ConfigError):
            stage(opened(full=True))


def test_checkpoints_go_when_a_training_has_ended(opened):
    run = opened("placed", max_steps=2)
    stages.run_train(run)
    assert run.file("train").exists() and not (run.folder / "checkpoints").exists()
    run.at.close()


def test_a_resumed_run_makes_only_what_is_missing(shop, opened, monkeypatch):
    made = []
    monkeypatch.setattr(whole, "ORDER", {name: (lambda run, name=name: made.append(name)) for name in whole.ORDER})
    monkeypatch.setattr(whole, "summary", lambda run: "")
    run = opened("trained")
    (run.folder / "placement.json").unlink()
    run = Run(run.folder, RunConfig(**vars(run.config)), overwrite=False)
    run.resume = run.at.resume = True
    whole.run_all(run)
    assert made == ["data", "place", "estimate", "eval", "report"]
    run.at.close()
    for full, expected in ((False, list(whole.ORDER)), (True, ["data", "train", "eval"])):
        made.clear()
        run = opened(full=full)
        whole.run_all(run)
        assert made == expected
        run.at.close()


def test_a_new_run_leaves_results_alone(opened):
    run = opened("trained")
    before = artefacts(run.folder)
    with pytest.raises(pf.PlopfastError, match="exists already"):
        whole.run_all(run)
    assert not differences(before, artefacts(run.folder))
    run.at.close()


@pytest.mark.parametrize("given", [{"batch_tokens": 400}, {"batch_tokens": 400, "batch_rows": 3}, {"batch_tokens": 100}, {"batch_tokens": 400, "packing": True}, {"batch_tokens": 400, "packing": True, "batch_rows": 2}])  # fmt: skip
def test_an_estimate_is_of_the_largest_step_there_can_be(opened, monkeypatch, given):
    run = opened("placed", **given)
    kept = {}
    monkeypatch.setattr(costs, "estimate", lambda *a, **k: kept.update(k) or [])
    monkeypatch.setattr(costs, "as_rows", lambda found: [])
    with pytest.raises(Exception):  # noqa: B017  # the table has no row to show
        costs.run_estimate(run)
        raise ValueError
    plan = Plan(run.examples("train"), [], TrainConfig(**given))
    longest = max(len(e.tokens) for e in plan.rows)
    rows, tokens = kept["rows"], kept["row_tokens"]
    most = given.get("batch_rows", 10**6)
    if given.get("packing"):
        assert (rows, tokens) == (1, min(400, most * longest))
    else:
        assert tokens == longest and rows == min(most, given["batch_tokens"] // longest)
    share = sum(e.label_tokens for e in plan.rows) / sum(len(e.tokens) for e in plan.rows)
    assert kept["label_tokens"] == round(tokens * share)
    run.at.close()


def test_an_estimate_compares_other_rules_at_the_same_size(opened):
    run = opened("placed", rank=3, k=2)
    costs.run_estimate(run)
    found = {c["name"]: c for c in json.loads(run.file("estimate").read_text())["choices"]}
    report = pf.NFNReport.load(run.file("score"))
    assert [*found][:1] == ["plop"] and [*found][-1:] == [FULL]
    for name in ("attn", "mlp", "all"):
        assert found[name]["parameters"] == pf.place(report, name, rank=3).parameters
    assert found["plop"]["parameters"] == pf.Placement.load(run.file("place")).parameters
    assert not adapters(run.model)
    run.at.close()


def test_a_run_goes_on_where_no_estimate_is_possible(opened, monkeypatch):
    for error in (ConfigError("no"), pf.PlopfastError("other")):
        monkeypatch.setattr(costs, "run_estimate", lambda run, error=error: (_ for _ in ()).throw(error))
        if type(error) is ConfigError:
            costs.try_estimate(opened())
        else:
            with pytest.raises(pf.PlopfastError):
                costs.try_estimate(opened())


def test_time_and_memory_of_stages_within_each_other(opened, monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    resets = []
    monkeypatch.setattr(memory, "reset_peak", lambda *a: resets.append(1))
    run = opened()
    with run.stage("run"):
        with run.stage("score"):
            pass
        with run.stage("place"), run.stage("data"):
            pass
    run.at.close()
    seconds = {name: event["seconds"] for name, event in Ledger(run.folder).done().items()}
    assert seconds == {"score": 10, "data": 10, "place": 20, "run": 30} and len(resets) == 4


def test_a_failed_stage_is_noted_and_the_earlier_result_stays(shop, opened):
    run = opened("trained", overwrite=True)
    before = artefacts(run.folder)
    with pytest.raises(ValueError, match="odd"), run.stage("train"):
        raise ValueError("odd")
    run.at.close()
    last = [event for event in Ledger(run.folder).events() if event["event"] == "failed"][-1]
    assert (last["stage"], last["error"]) == ("train", "odd")
    assert not differences(before, artefacts(run.folder)) and "train" in Ledger(run.folder).done()


def test_settings_that_cannot_be_are_not_kept(shop):
    """A command that refuses its settings leaves the folder's own in force."""
    folder = shop.folder("placed")
    kept = (folder / "config.json").read_text()
    for word in ("--batch-tokens=9", "--offload", "--log-to=paper"):
        assert shop.quietly("train", word, "--out", folder)[0] == 2
        assert json.loads((folder / "config.json").read_text()) == json.loads(kept), word


@pytest.mark.parametrize("name", ["adapter", "metrics.jsonl", "training.json", "placement.json", "scores"])
def test_verify_sees_each_file(shop, name):
    """Changed or gone: outputs and what they were made from."""
    folder = shop.folder("trained")
    assert verify(folder)[0]
    events = Ledger(folder).done().values()
    outputs = {key for event in events for key in event.get("outputs", {}) if key.startswith(name)}
    assert outputs
    for file in sorted(outputs):
        path, kept = folder / file, (folder / file).read_bytes()
        for change in ("changed", "missing"):
            path.unlink() if change == "missing" else path.write_bytes(kept + b"\n")
            same, said = verify(folder)
            assert not same and any(line.split()[:2] == [change, file] for line in said.splitlines())
        path.write_bytes(kept)
    assert verify(folder)[0]
    (folder / "notes.txt").write_text("")
    same, said = verify(folder)
    assert same and str(folder / "notes.txt") in said


def test_verify_sees_each_input(shop, opened):
    for split in ("train", "valid", "test", "config.json", "model.safetensors"):
        path = shop.root / f"{split}.jsonl" if "." not in split else shop.model / split
        folder, kept = shop.folder("trained"), path.read_bytes()
        path.write_bytes(kept + b"\n")
        try:
            same, said = verify(folder)
        finally:
            path.write_bytes(kept)
        assert not same and str(path) in said, split
    two = (str(shop.root / "train.jsonl"), str(shop.root / "more.jsonl"))
    run = opened(train=two, score_prompts=9)
    stages.run_score(run)
    run.at.close()
    kept = (shop.root / "more.jsonl").read_bytes()
    (shop.root / "more.jsonl").write_bytes(kept + b"\n")
    try:
        assert not verify(run.folder)[0], "the second of two files"
    finally:
        (shop.root / "more.jsonl").write_bytes(kept)


def test_results_without_a_history_are_whole(shop, opened):
    run = opened("placed")
    assert run.at.is_done("place") and not run.at.is_done("train")
    (run.folder / "history.jsonl").unlink()
    assert run.at.is_done("place"), "copied here"
    run = opened("placed", overwrite=True)
    with pytest.raises(ValueError), run.stage("place"):
        raise ValueError
    run.at.close()
    ledger = Ledger(run.folder)
    ledger.claim({"placement.json": ()}, stage="place", command="c")
    assert not run.at.is_done("place"), "begun and not ended"
