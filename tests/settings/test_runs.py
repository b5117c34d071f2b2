"""What a run makes of its settings before it trains: which rows go where, what is scored and placed, and what stops it first."""

import pytest
import torch

import plopfast as pf
from plopfast.data.labels import tokenize
from plopfast.lora.layer import adapters
from plopfast.run import stages, whole
from plopfast.run.apply import trainer_for
from plopfast.run.splits import HOLD_OUT
from plopfast.scoring import eva
from plopfast.support.config import RunConfig
from plopfast.support.errors import ConfigError, DataError, PlacementError
from plopfast.support.files import read_tensors


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
        assert (kept["tokens"], kept["skip_first"]) == (tokens, first)


@pytest.mark.parametrize(("given", "early"), [({}, True), ({"init": "eva"}, False), ({"compat": "official"}, False)])
def test_scoring_ends_early_only_where_it_can(opened, given, early):
    run = opened(confidence=0.01, k=1, rank=2, **given)
    assert (stages.run_score(run).prompts < 40) == early


def test_k_matters_only_where_a_rule_takes_it(opened):
    run = opened(score_prompts=9, k=50, rule="attn")
    assert stages.run_score(run).prompts
    with pytest.raises(ConfigError, match="k = 50"):
        stages.run_score(opened(score_prompts=9, k=50))


def test_eva_vectors_are_those_of_the_scores(opened):
    run = opened(score_prompts=9, init="eva", rank=2)
    stages.run_score(run)
    assert (run.folder / "eva.safetensors").exists()
    run.at.close()
    stages.run_score(opened(folder=run.folder, overwrite=True, score_prompts=9, rank=2))
    assert not (run.folder / "eva.safetensors").exists()


def test_adapters_begin_with_evas_vectors(shop):
    folder = shop.folder("scored")
    for command, *words in (
        ("score", "--init=eva", "--rank=2", "--overwrite"), ("place", "--k=1"), ("train", "--max-steps=1", "--lr=1e-9", "--warmup=0"),
    ):  # fmt: skip
        assert shop.quietly(command, *words, "--out", folder)[0] == 0
    vectors, _ = eva.load(folder / "eva.safetensors")
    weights, _ = read_tensors(folder / "adapter" / "adapter_model.safetensors", "plopfast train")
    begun = {key: value for key, value in weights.items() if "lora_A" in key}
    assert begun
    for key, value in begun.items():
        torch.testing.assert_close(value, vectors[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")])


@pytest.mark.parametrize("stage", ["merge", "train"])
def test_weights_that_are_not_finite_are_not_written(opened, monkeypatch, stage):
    run = opened("trained", overwrite=True, full=stage == "train", max_steps=1)
    model = run.model
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    monkeypatch.setattr(stages, "merge_checked", lambda model, into: 0.0)
    with pytest.raises(pf.PlopfastError):
        getattr(stages, f"run_{stage}")(run)
    assert not (run.folder / ("merged" if stage == "merge" else "model")).exists()


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
