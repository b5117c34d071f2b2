"""Seeds: each one changes what it should, the same one gives the same bits, and parts draw independently of each other."""

import copy
import dataclasses
import inspect
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import build, everywhere, made, parameters, random_batches, same
from workshop import differences, modules
from zoo import families

import plopfast as pf
from plopfast.data import batches as rows_in_order
from plopfast.data.example import Example
from plopfast.data.given import draw
from plopfast.data.rows import drawn
from plopfast.lora.init import draw_seeded_A
from plopfast.lora.layer import adapters
from plopfast.models.experts import expert_weights
from plopfast.models.generating import generate
from plopfast.models.linears import linear_modules
from plopfast.placing.choose import by_type
from plopfast.scoring import baselines, official, stopping
from plopfast.studies import agreement, controls, criteria, paired
from plopfast.support.options import Settings
from plopfast.support.progress import bar
from plopfast.training import intervals

LENGTHS = [5, 9, 9, 3, 7, 8, 4, 6, 9, 2, 6, 5]


def take(stream, count=12):
    return [next(stream) for _ in range(count)]


def tensors(value):
    """Plain values that compare by their bits."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: tensors(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    return [tensors(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def given(examples, tokenizer):
    model = build("llama")
    report = pf.score(model, random_batches(count=6), confidence=0.9)
    return {
        "model": model,
        "infos": linear_modules(model),
        "report": report,
        "examples": examples[:12],
        "tokenizer": tokenizer,
    }


def begun(seed, given, init="kaiming", placement=None):
    model = copy.deepcopy(given["model"])
    pf.inject(model, placement or everywhere(model, rank=3), seed=seed, init=init)
    return {name: module.lora_A for name, module in adapters(model).items()}


def low_rank(seed, given):
    x, w, a, b = torch.ones(8, 6), torch.zeros(4, 6), torch.ones(2, 6), torch.ones(4, 2)
    return pf.lora_linear(x, w, a, b, scaling=1.0, dropout_p=0.5, seed=seed)


def sketched(seed, given):
    return pf.score(given["model"], random_batches(), eva_rank=4, seed=seed).eva


def of_experts(seed, _):
    with torch.random.fork_rng(devices=[]):
        info = expert_weights(families.build("mixtral"))[0]
    return baselines.expert_denominators(info, "monte-carlo", 16, seed)


def right_answers():
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, 3, 40, generator=generator) < 0.6).double()


SEEDED = {  # every public function that takes a seed -> what it draws
    "data.batches.group_by_length": lambda seed, _: rows_in_order.group_by_length(LENGTHS, 18, seed),
    "data.batches.pack": lambda seed, _: rows_in_order.pack(LENGTHS, 18, seed),
    "data.batches.micro_batches": lambda seed, _: take(rows_in_order.micro_batches(LENGTHS, 9, 18, seed, 0.3)),
    "data.batches.groups_in_epoch": lambda seed, _: take(rows_in_order.micro_batches(LENGTHS, 12, 18, seed)),
    "data.given.draw": lambda seed, _: draw([{"text": f"row {i}"} for i in range(40)], 9, seed).rows,
    "data.rows.drawn": lambda seed, _: drawn(range(40), 9, seed),
    "lora.init.draw_seeded_A": lambda seed, _: draw_seeded_A("gaussian", 2, 6, seed, "some.module"),
    "lora.injection.inject": begun,
    "lora.ops.lora_linear": low_rank,
    "models.generating.generate": lambda seed, g: generate(
        g["model"], g["tokenizer"], [[5, 6, 7], [8]], temperature=1.0, max_new_tokens=4, seed=seed
    ),
    "placing.choose.by_type": lambda seed, given: by_type(given["report"], "random", 3, seed, {}),
    "placing.place.place": lambda seed, given: pf.place(given["report"], "random", k=3, rank=2, seed=seed).modules,
    "scoring.baselines.denominators": lambda seed, g: baselines.denominators(g["infos"], "monte-carlo", 16, seed),
    "scoring.baselines.expert_denominators": of_experts,
    "scoring.baselines.monte_carlo": lambda seed, g: baselines.monte_carlo(g["infos"], 16, seed),
    "scoring.eva.InputSketch": sketched,
    "scoring.nfn.score": lambda seed, g: (
        pf.score(g["model"], random_batches(), baseline="monte-carlo", seed=seed).scores
    ),
    "scoring.nfn.Options": sketched,
    "scoring.official.score_official": lambda seed, g: (
        official.score_official(g["model"], random_batches(), seed, bar("", None, "", False)).scores
    ),
    "scoring.stopping.intervals": lambda seed, g: stopping.intervals(
        g["report"].prompt_stats, list(g["report"].scores), [s.type for s in g["report"].scores.values()], 0.9, seed
    ),
    "scoring.report.NFNReport.intervals": lambda seed, g: g["report"].intervals(0.9, seed),
    "studies.agreement.subset_rows": lambda seed, g: agreement.subset_rows(g["report"], 2, seed, 5),
    "studies.controls.random_tokens": lambda seed, g: controls.random_tokens(g["examples"], g["tokenizer"], seed),
    "studies.controls.shuffled_words": lambda seed, g: controls.shuffled_words(g["examples"], g["tokenizer"], seed),
    "studies.controls.random_model": lambda seed, g: dict(controls.random_model(g["model"], seed).named_parameters()),
    "studies.criteria.gradient_energy": lambda seed, g: criteria.gradient_energy(g["model"], g["examples"], 2, seed),
    "studies.criteria.random_ranks": lambda seed, g: criteria.random_ranks(g["model"], seed),
    "studies.criteria.Given": lambda seed, g: criteria.COMPUTE["random"](
        criteria.Given(g["model"], g["examples"], 2, seed, False, lambda: g["report"], g["report"])
    ),
    "studies.paired.compare": lambda seed, _: paired.compare(right_answers(), 0.9, seed, 200),
    "studies.paired.accuracies": lambda seed, _: paired.accuracies(right_answers(), 0.9, seed, 200),
    "training.intervals.of_shares": lambda seed, _: intervals.of_shares(
        [1, 0, 3, 2, 1, 0, 2] * 3, [3, 2, 4, 3, 2, 1, 4] * 3, seed
    ),
}
STAGES = {
    "run.run.Run.sample",
    "studies.arms.Training.once",
}  # see promises.py: --seed of score and audit, --seeds of trial
DRAW_NOTHING = {  # they check a seed, name a folder by it, or hand it on to draws of SEEDED and to the Hugging Face Trainer
    "lora.ops.check",
    "placing.suggest.suggest",
    "integrations.grpo.grpo",
    "studies.arms.folder_of",
    *(f"cli.bench_arms.{name}" for name in ("Recipe", "peft_model", "start_alike", "hf_settings")),
}


def functions_with_seed():
    """Public functions, classes that are no settings, and their public methods."""
    found = set()
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != module.__name__ or not callable(value):
                continue
            if inspect.isclass(value) and issubclass(value, Settings):
                continue  # whose options promises.py has
            known = {name: value}
            if inspect.isclass(value):
                known |= {
                    f"{name}.{key}": item
                    for key, item in vars(value).items()
                    if inspect.isfunction(item) and key[0] != "_"
                }
            for key, item in known.items():
                try:
                    parameters = inspect.signature(item).parameters
                except ValueError:  # built in
                    continue
                if "seed" in parameters:
                    found.add(f"{module.__name__.removeprefix('plopfast.')}.{key}")
    return found


def test_every_function_that_takes_a_seed_is_here():
    assert functions_with_seed() == {*SEEDED} | STAGES | DRAW_NOTHING


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_is_all_that_a_draw_depends_on(name, given):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1), random.seed(1)
        before, state = torch.get_rng_state(), random.getstate()
        one = tensors(SEEDED[name](5, given))
        if name != "lora.injection.inject":  # whose helper draws a model
            assert torch.equal(torch.get_rng_state(), before) and random.getstate() == state, (
                "nobody else's draws change"
            )
        torch.manual_seed(2), random.seed(2)
        assert tensors(SEEDED[name](5, given)) == one
        assert tensors(SEEDED[name](6, given)) != one


def test_no_draw_moves_another(given):
    """Whichever of them drew before, with the same seed: forwards, each comes after those above it, backwards after the rest."""
    with torch.random.fork_rng(devices=[]):
        forwards = {name: tensors(SEEDED[name](5, given)) for name in SEEDED}
        backwards = {name: tensors(SEEDED[name](5, given)) for name in reversed(SEEDED)}
    assert [name for name in SEEDED if forwards[name] != backwards[name]] == []


def losses(trainer):
    return [record["loss"] for record in trainer.history if "loss" in record]


def order(trainer):
    return [record["tokens"] for record in trainer.history if "loss" in record]


def fitted(examples, before=0, **config):
    torch.manual_seed(before)
    trainer = made(examples, max_steps=4, **{"batch_tokens": 120, **config})
    torch.manual_seed(before + 1)
    trainer.fit()
    return trainer


def equal_rows(count):
    """Rows that are all the same, so that their order does not matter."""
    return [Example.after_prompt(tuple(range(5, 25)), 6) for _ in range(count)]


def test_a_training_draws_by_its_seed(examples):
    one, again, other = (fitted(examples, before, seed=seed, dropout=0.2) for before, seed in ((0, 3), (9, 3), (0, 4)))
    assert losses(one) == losses(again) and same(parameters(one), parameters(again))
    assert order(one) != order(other) and losses(one) != losses(other)


@pytest.mark.parametrize("noise", ["dropout", "neftune"])
def test_noise_draws_by_the_trainings_seed(noise):
    def run(seed, amount):
        model = build("llama")
        pf.inject(model, everywhere(model), dropout=amount if noise == "dropout" else 0.0)
        for module in adapters(model).values():
            module.lora_B.data.fill_(0.1)
        return losses(fitted(equal_rows(64), model=model, seed=seed, **({noise: amount} if noise == "neftune" else {})))

    assert run(0, 0.5) == run(0, 0.5) != run(1, 0.5)
    assert run(0, 0.0) == run(1, 0.0), "only the noise differs"


def noisy_run(examples, out, **config):
    model = build("llama")
    pf.inject(model, everywhere(model), dropout=0.4)
    for module in adapters(model).values():
        module.lora_B.data.fill_(0.1)
    return fitted(examples, model=model, out=out, lora_plus=2.0, **config)


@pytest.fixture(scope="module")
def noisy(examples, tmp_path_factory):
    return noisy_run(examples, tmp_path_factory.mktemp("noisy"))


@pytest.mark.parametrize(
    "change",
    [
        {"eval_every": 1},
        {"eval_rows": 3},
        {"save_every": 1},
        {"ema": 0.5},
        {"lr": 0.5},
        {"checkpointing": True},
        {"clip": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_looking_saving_and_learning_draw_nothing(examples, noisy, tmp_path, change):
    """The order of the rows, and the noise of the first step, are those of the seed whatever else is set."""
    one, other = noisy, noisy_run(examples, tmp_path, **change)
    assert order(one) == order(other)
    whole = not change.keys() & {"lr", "clip"}  # these change what is learned
    assert losses(one)[: None if whole else 1] == losses(other)[: None if whole else 1]


@pytest.mark.parametrize("change", [{"dropout": 0.3}, {"neftune": 5.0}])
def test_noise_does_not_change_the_order_of_the_rows(examples, change):
    assert order(fitted(examples)) == order(fitted(examples, **change))


def test_an_adapter_begins_the_same_whoever_else_has_one(given):
    whole = begun(0, given)
    name = next(iter(reversed(whole)))
    others = pf.Placement({name: (3, 8.0)}, [], "all", 0)
    assert torch.equal(begun(0, given, placement=others)[name], whole[name])
    assert len({tuple(a.flatten()[:6].tolist()) for a in whole.values()}) == len(whole), "each module draws its own"


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_each_init_draws_by_the_seed(given, init):
    assert tensors(begun(0, given, init)) == tensors(begun(0, given, init)) != tensors(begun(1, given, init))


def test_epochs_and_seeds_do_not_repeat_each_other():
    epochs = [rows_in_order.micro_batches(list(range(1, 41)), 40, 40, seed) for seed in range(3)]
    count = rows_in_order.groups_in_epoch(list(range(1, 41)), 40, 0, False)
    seen = [tuple(map(tuple, take(stream, count))) for stream in epochs for _ in range(3)]
    assert len(set(seen)) == len(seen)


def test_the_sketch_and_the_baseline_draw_apart(given):
    score = partial(pf.score, given["model"], random_batches(), seed=3)
    plain, both = score(baseline="monte-carlo"), score(baseline="monte-carlo", eva_rank=3)
    assert plain.scores == both.scores
    assert tensors(both.eva) == tensors(score(eva_rank=3).eva)


def test_scoring_a_sample_does_not_move_the_training(shop):
    """How many rows are scored has no say in how adapters begin and in which order rows are learned."""
    found = [shop.outcome("train", start=start) for start in ("placed", more_scored(shop))]
    assert not differences(*found) - {"scores", "prompts", "placement"}
    assert found[0]["scores"] != found[1]["scores"]


def more_scored(shop):
    path: Path = shop.folder("placed")
    assert shop.quietly("score", "--score-prompts=30", "--overwrite", "--out", path)[0] == 0
    return path.name
