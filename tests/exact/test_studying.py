"""Controls, criteria, the audit's parts and the choice of rates against slow, plain accounts of them."""

import contextlib
import copy
import json
import math
import random
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import build
from torch import nn

import plopfast as pf
from plopfast.data.batches import batches_of, collate
from plopfast.data.example import Example
from plopfast.data.rows import DEMO, read_jsonl
from plopfast.lora.layer import adapters
from plopfast.models.linears import linear_modules
from plopfast.scoring.report import ModuleScore
from plopfast.studies import audit as audits
from plopfast.studies.agreement import pick, subset_rows, tau_of
from plopfast.studies.arms import Arm, Training
from plopfast.studies.audit import audit, verdict
from plopfast.studies.controls import random_model, random_tokens, shuffled_words
from plopfast.studies.criteria import (
    condition_numbers,
    explained_variance,
    gradient_energy,
    nfns,
    random_ranks,
    sizes,
    strongest,
    weight_nfn,
)  # fmt: skip
from plopfast.support.config import ScoreSettings
from plopfast.support.errors import AdapterError, ConfigError, DataError, ModelError, TrainingError


class Layers(nn.Module):
    """Linear layers of given shapes, which no forward pass uses."""

    def __init__(self, shapes, rng):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module() for _ in shapes])
        for number, (n_in, n_out) in enumerate(shapes):
            layer = nn.Linear(n_in, n_out)
            u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (n_out, n_in))
            few = min(n_in, n_out)
            values = np.exp(rng.uniform(-4, 2, few))
            layer.weight.data = torch.tensor((u[:, :few] * values) @ v[:few])
            self.layers[number].add_module(f"proj{number}", layer)


def test_condition_numbers_are_those_of_the_svd():
    rng = np.random.default_rng(0)
    shapes = [(1, 5), (5, 1), (2, 2), (3, 7), (7, 3), (20, 20), (16, 40), (40, 16)]
    model = Layers(shapes, rng).double()
    found = condition_numbers(model)
    for info in linear_modules(model):
        values = np.linalg.svd(info.module.weight.detach().numpy(), compute_uv=False)
        assert found[info.name] == pytest.approx(values[0] / values[-1], rel=1e-6), info.name
    half = model.layers[5].proj5
    half.weight.data[0] = half.weight.data[1]  # singular: rounding's limit, 1 / sqrt(n eps)
    assert condition_numbers(model)["layers.5.proj5"] == pytest.approx(1 / math.sqrt(20 * 2.0**-52), rel=1e-6)
    for bad in (0.0, math.nan, math.inf):
        half.weight.data[:] = bad
        with pytest.raises(ModelError):
            condition_numbers(model)


def test_the_weights_nfn_is_that_of_the_input_that_they_stretch_most():
    """By the definition of NFN, with the first right singular vector as input; 1 for weights that stretch all inputs alike."""
    rng = np.random.default_rng(1)
    model = Layers([(1, 5), (5, 1), (3, 7), (7, 3), (20, 20)], rng).double()
    found = weight_nfn(model)
    for info in linear_modules(model):
        w = info.module.weight.detach().numpy()
        z = np.linalg.svd(w)[2][0]
        usual = np.linalg.norm(w) / math.sqrt(info.n_in)  # root of the mean square over random inputs of length 1
        assert found[info.name] == pytest.approx(np.linalg.norm(w @ z) / usual, rel=1e-9), info.name
    model.layers[4].proj4.weight.data = torch.tensor(np.linalg.qr(rng.standard_normal((20, 20)))[0])
    assert weight_nfn(model)["layers.4.proj4"] == pytest.approx(1)


def test_the_strongest_module_has_the_largest_gradient_and_not_the_largest_for_each_parameter():
    scores = {
        "layers.0.small": ModuleScore(1.0, 0.0, 1, "small", 0, 4, 4),
        "layers.0.large": ModuleScore(1.0, 0.0, 1, "large", 0, 40, 4),
        "lm_head": ModuleScore(1.0, 0.0, 1, "lm_head", None, 4, 400),
    }
    report = pf.NFNReport(scores, 1, 1, 0.0)
    assert strongest(report, {"layers.0.small": 1.0, "layers.0.large": 0.3, "lm_head": 9.0}) == "layers.0.large"
    assert (
        sizes(report) == {"layers.0.small": 16, "layers.0.large": 160, "lm_head": 1600} and nfns(report)["lm_head"] == 1
    )


@pytest.mark.parametrize("rank, seed, training", [(1, 0, False), (3, 2, True), (16, 0, False)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_energy_is_that_of_the_whole_gradient(architecture, rank, seed, training):
    """||dL/dW A^T||^2 for each parameter, with the mean loss over all label tokens, over several batches."""
    model, rng = build(architecture), random.Random(3)
    rows = [tuple(rng.randint(3, 299) for _ in range(rng.randint(40, 100))) for _ in range(8)]  # more than one batch
    examples = [Example(row, ((9, 12), (20, len(row) - 2)), None, None, "x") for row in rows]
    plain, infos = copy.deepcopy(model), linear_modules(model)
    total = 0.0
    for example in examples:
        batch = collate([example])
        logits = plain(input_ids=batch["input_ids"]).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum")
    (total / sum(example.label_tokens for example in examples)).backward()
    drawn = copy.deepcopy(model)
    pf.inject(drawn, pf.Placement({i.name: (rank, 1.0) for i in infos}, [], "all", 0), seed=seed, init="gaussian")
    model.train(training)
    some = next(model.parameters())
    some.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    found = gradient_energy(model, examples, rank=rank, seed=seed)
    assert [module.training for module in model.modules()] == modes and not adapters(model)
    assert not some.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1
    weights = {info.name: info for info in linear_modules(plain)}
    for name, module in adapters(drawn).items():
        info = weights[name]
        gradient = info.module.weight.grad.T if info.transposed else info.module.weight.grad
        energy = float((gradient.double() @ module.lora_A.detach().double().T).square().sum())
        assert found[name] == pytest.approx(energy / (rank * (info.n_in + info.n_out)), rel=1e-3), name
    assert list(found) == [info.name for info in infos]
    with pytest.raises(DataError):
        gradient_energy(model, [Example((5, 6, 7), (), None, None, "x")], rank=rank)


def test_a_gradient_of_an_infinite_loss(llama):
    """Each token's loss is finite, their sum is not; the model is left as it was."""
    generator = torch.Generator().manual_seed(0)
    llama.lm_head.weight.data.normal_(std=3e36, generator=generator)
    examples = [Example(tuple(range(3, 100)), ((1, 97),), None, None, "x")]
    logits = llama(input_ids=collate(examples)["input_ids"]).logits[0, :-1]
    losses = nn.functional.cross_entropy(logits, torch.arange(4, 100), reduction="none")
    assert losses.isfinite().all() and losses.sum().isinf()
    with pytest.raises(DataError):
        gradient_energy(llama, examples, rank=2)
    assert not adapters(llama) and all(p.requires_grad for p in llama.parameters())


def test_somebodys_adapters_stay(llama):
    pf.inject(llama, pf.Placement({"model.layers.0.mlp.up_proj": (2, 4.0)}, [], "x", 0))
    kept = dict(adapters(llama))
    with pytest.raises(AdapterError):
        gradient_energy(llama, [Example((5, 6, 7), ((1, 3),), None, None, "x")], rank=2)
    assert adapters(llama) == kept


def test_explained_variance_is_the_sum_of_the_shares(llama):
    batches = [{"input_ids": torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))}]
    report = pf.score(llama, batches, eva_rank=5)
    found = explained_variance(report)
    assert found == {name: pytest.approx(float(ratios.sum())) for name, ratios in report.eva_ratios.items()}
    assert all(float(report.eva_ratios[name].max()) < value <= 1 + 1e-5 for name, value in found.items())


def test_random_ranks_are_the_placements_draw(llama):
    report = pf.score(llama, [{"input_ids": torch.tensor([[5, 6, 7]])}])
    drawn = set()
    for seed in range(8):
        ranks = random_ranks(llama, seed)
        order = {report.scores[name].type: value for name, value in ranks.items()}
        for k in range(1, 8):
            assert set(pick(order, k)) == set(pf.place(report, "random", k=k, rank=1, seed=seed).types)
        drawn.add(tuple(sorted(order, key=order.get)))
    assert len(drawn) > 5


def plain_score(model, rows, settings, mask=None, **options):
    batches = batches_of(rows, 8, *(mask or (settings.score_tokens, settings.skip_first)))
    return pf.score(model, batches, baseline=settings.baseline, seed=settings.seed, **options).types


@pytest.mark.parametrize(
    "settings",
    [
        ScoreSettings(k=2, rank=3, seed=5),
        ScoreSettings(k=6, rank=8, seed=2, score_tokens="completion", skip_first=True, baseline="monte-carlo"),
        ScoreSettings(k=7, rank=1),
    ],
    ids=["k 2", "k 6, other tokens", "all types"],
)
def test_an_audit_is_what_its_parts_give(llama, tokenizer, settings):
    """Each row of it, made again with the public functions and the same settings."""
    chats = [
        Example(e.tokens, e.learned, e.answer, e.completion, e.where, ("user",) * e.start + ("assistant",) * (len(e.tokens) - e.start))
        for e in pf.tokenize(read_jsonl(DEMO["train"])[:20], tokenizer)
    ]  # fmt: skip
    rows, sample = chats[:12], chats[12:]
    context = llama.config.max_position_embeddings = max(len(row.tokens) for row in chats)
    found = audit(llama, tokenizer, rows, settings, others=[sample, rows[:9]])
    base, k, seed = plain_score(llama, rows, settings), settings.k, settings.seed
    assert found["types"] == pytest.approx(base) and found["pick"] == pick(base, k) and found["k"] == k

    def agrees(row, others):
        taus = [tau_of(base, other) for other in others]
        same = [set(pick(other, k)) == set(pick(base, k)) for other in others]
        assert (row["tau"], row["tau_low"]) == pytest.approx((sum(taus) / len(taus), min(taus))), row
        assert row["same_pick"] == sum(same) / len(same)

    stability = {row["what"]: row for row in found["stability"]}
    whole = pf.score(
        llama, batches_of(rows, 8, settings.score_tokens, settings.skip_first), baseline=settings.baseline, seed=seed
    )
    for row in subset_rows(whole, k, seed):
        assert stability.pop(row["what"]) == row
    agrees(stability.pop("2 other samples"), [plain_score(llama, part, settings) for part in (sample, rows[:9])])
    skipped = {row["what"] for row in found["missing"]}
    longest = max(len(row.tokens) for row in rows)
    for length in [n for n in (8, 16, 32, 64) if n < longest]:
        what, cut = f"first {length} tokens", [row.truncated(length) for row in rows]
        if what not in skipped:
            agrees(stability.pop(what), [plain_score(llama, cut, settings)])
    assert not stability
    masks = {
        "all tokens": ("all", False), "without the first token": ("all", True), "prompt tokens": ("prompt", False),
        "completion tokens": ("completion", False), "assistant tokens": ("assistant", False), "user tokens": ("user", False),
    }  # fmt: skip
    controls = {
        "random tokens": lambda: plain_score(llama, random_tokens(rows, tokenizer, seed), settings),
        "shuffled words": lambda: plain_score(llama, shuffled_words(rows, tokenizer, seed, context), settings),
        "random weights": lambda: plain_score(random_model(llama, seed), rows, settings),
    }
    assert [row["what"] for row in found["tokens"]] == list(masks)
    assert [row["what"] for row in found["controls"]] == list(controls)
    for row in found["tokens"] + found["controls"]:
        mask = masks.get(row["what"])
        types = plain_score(llama, rows, settings, mask) if mask else controls[row["what"]]()
        assert row["types"] == pytest.approx(types), row["what"]
        assert row["pick"] == pick(types, k) and row["tau"] == pytest.approx(tau_of(base, types))
    batches = batches_of(rows, 8, settings.score_tokens, settings.skip_first)
    with_eva = pf.score(llama, batches, seed=seed, eva_rank=settings.rank)
    of_type = {info.name: info.type for info in linear_modules(llama)}
    given = {
        "NFN": ({info.name: base[info.type] for info in linear_modules(llama)}, False, np.mean),
        "input spectrum": (explained_variance(with_eva), True, np.mean),
        "condition number": (condition_numbers(llama), False, lambda values: np.exp(np.mean(np.log(values)))),
        "gradient energy": (gradient_energy(llama, rows, settings.rank, seed), True, np.mean),
        "random": (random_ranks(llama, seed), False, np.mean),
    }
    for row in found["criteria"]:
        scores, highest, mean = given.pop(row["name"] if row["name"] in given else "NFN")
        types = {t: float(mean([s for name, s in scores.items() if of_type[name] == t])) for t in base}
        order = sorted(types, key=lambda t: -types[t] if highest else types[t])
        assert row["types"] == pytest.approx(types, rel=1e-4) and list(row["types"]) == order
        assert row["pick"] == order[:k] and row["chooses"] == ("highest" if highest else "lowest")
        assert row["tau"] == pytest.approx(tau_of(base, types, highest))
        assert row["agrees"] == (set(order[:k]) == set(pick(base, k)))
        assert row["cost"] == pytest.approx(row["seconds"] / found["criteria"][0]["seconds"])
    assert not given
    with pytest.raises(ConfigError):
        audit(llama, tokenizer, rows, replace(settings, k=8))


def without_figures(said):
    return re.sub(r"[\d.]+", "", said)


def test_the_verdict_goes_by_sets_and_by_both_ends():
    def control(what, picked, low=0.95, high=1.05):
        return {"what": what, "pick": picked, "types": {"a": low, "b": high, "c": 1.0}}

    ours = ["a", "b"]
    for words, steady in ((["b", "a"], True), (["a", "c"], False), (["c", "b"], False)):
        said = verdict(ours, [control("random tokens", ["b", "a"]), control("shuffled words", words)])
        assert (", ".join(words) in said) is not steady, "what it depends on is named"
    good = verdict(ours, [control("random weights", ours, 1.0, 1.0)])
    for low, high, near in (
        (0.91, 1.09, True),
        (0.92, 1.08, True),
        (0.89, 1.0, False),
        (1.0, 1.11, False),
        (0.5, 2.0, False),
    ):
        said = verdict(ours, [control("random weights", ours, low, high)])
        assert (without_figures(said) == without_figures(good)) == near, (low, high)


class Pretended(Training):
    """A training whose results are given: {(rate, seed): validation loss}."""

    results = {}
    done = []

    def once(self, arm, lr, seed, out):
        self.done.append((lr, seed))
        out.mkdir(parents=True, exist_ok=True)
        (out / "model.safetensors").write_text("weights")
        loss = self.results.get((lr, seed), 9.0)  # beyond the edge all is worse
        return {"lr": lr, "seed": seed, "valid_loss": loss, "error": "not finite"}


def test_the_rate_of_the_lowest_loss_and_all_seeds_at_it(tmp_path, monkeypatch):
    """Whichever rate it is, with losses that are not finite and losses that are equal; the weights of others go."""
    rng = random.Random(7)
    for number in range(60):
        rates, seeds = rng.sample([1e-4, 3e-4, 1e-3, 3e-3], rng.randint(1, 4)), rng.sample(range(9), 3)
        results = {
            (lr, seed): rng.choice((None, 1.0, 2.0, 2.0, 3.0)) if seed == seeds[0] or rng.random() < 0.3 else 1.5
            for lr in rates
            for seed in seeds
        }
        monkeypatch.setattr(Pretended, "results", results)
        monkeypatch.setattr(Pretended, "done", [])
        quiet = types.SimpleNamespace(say=lambda text: None), types.SimpleNamespace(grow=lambda pieces: None)
        training = Pretended(quiet[0], seeds, 9, None, quiet[1])
        folder = tmp_path / str(number)
        finite = [lr for lr in rates if results[lr, seeds[0]] is not None]
        leaders = sorted(finite, key=lambda lr: results[lr, seeds[0]])[:2]
        first = leaders[0] if leaders else None
        at_edge = len(rates) > 1 and first in (min(rates), max(rates))
        if at_edge and len(leaders) == 1:
            leaders.append(None)  # the rate beyond, at 9.0
        if len(rates) > 1:
            both = {lr: [results.get((lr, seed), 9.0) for seed in seeds[:2]] for lr in leaders}
            best = min(both, key=lambda lr: math.inf if None in both[lr] else sum(both[lr]), default=None)
        else:
            best = first
        if best is None or any(results[best, seed] is None for seed in seeds):
            with pytest.raises(TrainingError):
                training.all([Arm("plop", None, rates)], folder)
            continue
        (found,) = training.all([Arm("plop", None, rates)], folder)
        tried = [*found.losses]
        assert tried[: len(rates)] == rates and len(tried) == len(rates) + at_edge
        assert found.losses == {lr: results.get((lr, seeds[0]), 9.0) for lr in tried} and found.lr == best
        twice = [(lr or tried[-1], seeds[1]) for lr in leaders] if len(rates) > 1 else []
        left = seeds[2:] if twice else seeds[1:]
        assert Pretended.done == [(lr, seeds[0]) for lr in tried] + twice + [(best, seed) for seed in left]
        assert [(r["lr"], r["seed"]) for r in found.results] == [(best, seed) for seed in seeds]
        others = [(lr, seeds[0]) for lr in tried if lr != best] + [one for one in twice if one[0] != best]
        assert sorted((r["lr"], r["seed"]) for r in found.others) == sorted(others)
        assert len(found.folders) == len(set(found.folders)) == len(seeds)
        kept = sorted(path.parent for path in folder.glob("**/model.safetensors"))
        assert kept == sorted(found.folders), "the weights of the rates that lost are gone"


@pytest.mark.parametrize("prompts, others", [(12, 0), (11, 3)])
def test_other_samples_are_drawn_by_seeds_of_their_own(llama, tokenizer, tmp_path, monkeypatch, prompts, others):
    """Where the rows hold more than the sample; otherwise there is no other sample."""
    rows = pf.tokenize(read_jsonl(DEMO["train"])[:12], tokenizer)

    def sample(seed=3):
        return random.Random(seed).sample(rows, prompts)

    @contextlib.contextmanager
    def stage(_name):
        yield {}

    config = types.SimpleNamespace(compat=None, seed=3, scoring=ScoreSettings(k=2, rank=1, seed=3))
    run = types.SimpleNamespace(
        config=config, rows=lambda split: rows if split == "train" else [], stage=stage, sample=sample, model=llama,
        tokenizer=tokenizer, progress=False, say=lambda text: None, file=lambda name: tmp_path / f"{name}.json", ready=lambda *_: None,
    )  # fmt: skip
    given = []
    audited = audits.audit
    monkeypatch.setattr(audits, "audit", lambda *a, **k: given.append((a[2], k["others"])) or audited(*a, **k))
    audits.run_audit(run)
    assert given == [(sample(), [sample(seed) for seed in (4, 5, 6)][:others])]
    assert any(row["kind"] == "seed" for row in json.loads((tmp_path / "audit.json").read_text())["stability"]) == bool(
        others
    )
