"""What the stages of a run read, write and note, in which order, and what a folder says of it later."""

import itertools
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from workshop import artefacts, differences

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models.loading import load_model
from plopfast.placing.rules import FULL
from plopfast.run import costs, evaluating, folder as run_folder, stages, whole
from plopfast.run.verify import verify
from plopfast.support import memory
from plopfast.support.config import TrainConfig
from plopfast.support.errors import AdapterError, ConfigError, FileError, PlacementError
from plopfast.support.files import read_tensors
from plopfast.support.ledger import Ledger
from plopfast.support.settings_file import load_settings
from plopfast.training.estimate import Estimate
from plopfast.training.evaluate import choices_of, evaluate
from plopfast.training.plan import Plan


def test_the_base_is_the_model_and_the_tuned_one_has_the_adapter(shop, opened):
    run = opened("trained")
    found = evaluating.run_eval(run)
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


def test_what_chose_the_step_is_no_test(shop, opened):
    shutil.copy(shop.root / "valid.jsonl", shop.root / "copy.jsonl")
    for given in ({"test": None}, {"test": str(shop.root / "copy.jsonl")}):
        run = opened("trained", **given)
        assert evaluating.run_eval(run)["rows"] == "validation"


def test_an_adapter_that_is_named_takes_the_place_of_the_one_in_the_model(shop, opened):
    """From Python, where the model of a run may have adapters already."""
    other = shop.folder("trained") / "adapter"
    weights = other / "adapter_model.safetensors"
    tensors, facts = read_tensors(weights, "plopfast train")
    save_file({key: value * 3 for key, value in tensors.items()}, weights, facts)
    expected = evaluating.run_eval(opened("trained"), other)["tuned"]["loss"]
    run = opened("trained")
    pf.load_adapter(run.model, run.file("train"))
    assert evaluating.run_eval(run, other)["tuned"]["loss"] == expected


def test_a_training_that_never_began_is_resumed_from_its_start(shop):
    folder = shop.folder("placed")
    code, said = shop.quietly("train", "--resume", "--out", folder)
    assert code == 0, said
    assert (folder / "adapter").exists()


def test_ranks_above_those_of_evas_vectors(shop, opened):
    """They are refused when modules are placed, and not when they are trained; the placement stays as it was."""
    run = opened("placed", overwrite=True, init="eva", rank=1, budget="9000")
    before = run.file("place").read_bytes()
    with pytest.raises(PlacementError):
        stages.run_place(run)
    assert run.file("place").read_bytes() == before
    assert stages.run_place(opened(folder=run.folder, overwrite=True, rank=1, budget="9000"))


@pytest.mark.parametrize("stage", ["eval", "merge"])
def test_an_adapter_of_elsewhere(shop, opened, stage):
    """It is taken in place of the run's own, noted as an input, and refused on another base unless that is allowed."""
    do = evaluating.run_eval if stage == "eval" else stages.run_merge
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
    assert results[0] != results[1]
    with pytest.raises(AdapterError):
        do(opened(model=str(shop.other_model)), other / "adapter")
    assert do(opened(model=str(shop.other_model)), other / "adapter", any_base=True)


def test_merged_weights_are_base_plus_adapter(shop, opened):
    run = opened("trained")
    target = stages.run_merge(run).folder
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


def test_full_training_has_no_page_and_no_merge(opened):
    for stage in (stages.run_report, stages.run_merge):
        with pytest.raises(ConfigError):
            stage(opened(full=True))


def test_checkpoints_go_when_a_training_has_ended(opened):
    run = opened("placed", max_steps=2)
    stages.run_train(run)
    assert run.file("train").exists() and not (run.folder / "checkpoints").exists()


def test_a_resumed_run_makes_only_what_is_missing(shop, opened, monkeypatch):
    made = []
    monkeypatch.setattr(whole, "ORDER", {name: (lambda run, name=name: made.append(name)) for name in whole.ORDER})
    monkeypatch.setattr(whole, "summary", lambda run: "")
    run = opened("trained")
    (run.folder / "placement.json").unlink()
    run.at.close()
    whole.run_all(opened(folder=run.folder, resume=True, **load_settings(run.folder / "config.json")))
    assert made == ["data", "place", "estimate", "eval", "report"]
    for full, expected in ((False, list(whole.ORDER)), (True, ["data", "train", "eval"])):
        made.clear()
        run = opened(full=full)
        whole.run_all(run)
        assert made == expected


def test_a_new_run_leaves_results_alone(opened):
    run = opened("trained")
    before = artefacts(run.folder)
    with pytest.raises(FileError, match=re.escape(str(run.folder))):
        whole.run_all(run)
    assert not differences(before, artefacts(run.folder))


@pytest.mark.parametrize("given", [{"batch_tokens": 400}, {"batch_tokens": 400, "batch_rows": 3}, {"batch_tokens": 100}, {"batch_tokens": 400, "packing": True}, {"batch_tokens": 400, "packing": True, "batch_rows": 2}])  # fmt: skip
def test_an_estimate_is_of_the_largest_step_there_can_be(opened, monkeypatch, given):
    run = opened("placed", **given)
    kept = {}

    def estimated(model, choices, config, **shape):
        kept.update(shape)
        return [Estimate(name, [], 1, *[1.0] * 6) for name in choices]

    monkeypatch.setattr(costs, "estimate", estimated)
    costs.run_estimate(run)
    written = json.loads(run.file("estimate").read_text())
    assert {key: written[key] for key in ("rows", "row_tokens", "label_tokens")} == {
        key: kept[key] for key in ("rows", "row_tokens", "label_tokens")
    }
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


def test_a_whole_run_estimates_its_own_placement_and_all_weights(opened):
    run = opened("placed", rank=3, k=2)
    costs.try_estimate(run)
    assert [c["name"] for c in json.loads(run.file("estimate").read_text())["choices"]] == ["plop", FULL]


def test_a_run_goes_on_where_no_estimate_is_possible(opened, monkeypatch):
    for error in (ConfigError("no"), pf.PlopfastError("other")):
        monkeypatch.setattr(costs, "run_estimate", lambda *_, error=error: (_ for _ in ()).throw(error))
        if type(error) is ConfigError:
            costs.try_estimate(opened())
        else:
            with pytest.raises(pf.PlopfastError):
                costs.try_estimate(opened())


def test_time_and_memory_of_stages_within_each_other(opened, monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))  # nobody else's
    resets = []
    monkeypatch.setattr(memory, "reset_peak", lambda *a: resets.append(1))
    run = opened()
    with run.stage("run"):
        with run.stage("score"):
            pass
        with run.stage("place"), run.stage("data"):
            pass
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
