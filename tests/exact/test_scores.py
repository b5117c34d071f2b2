"""Scores against a slow, plain account of every token of every prompt, in every order, padding and batch."""

import math
import random
import statistics

import pytest
import torch
import transformers
from helpers import SMALL, build

import plopfast as pf
from plopfast.models.linears import LinearInfo, linear_modules
from plopfast.scoring.baselines import closed_form, monte_carlo
from plopfast.scoring.eva import InputSketch
from plopfast.scoring.stopping import decide
from plopfast.support.errors import ConfigError, DataError

BOS = 1


def random_rows(rng, count, longest=9):
    """(tokens, labels, counted) of rows: some of BOS alone, some without it, some with one token, some with none counted."""
    rows = []
    for _ in range(count):
        tokens = [rng.randint(3, 299) for _ in range(rng.randint(1, longest))]
        if rng.random() < 0.6:
            tokens[0] = BOS
        labels = [t if rng.random() < 0.5 else -100 for t in tokens]
        some = rng.random()
        counted = [int(some < 0.9 and rng.random() < 0.8) for _ in tokens]
        rows.append((tokens, labels, counted))
    return rows


def in_batches(rng, rows, with_counted):
    """The rows in batches of random size, each padded on a side of its own, by random tokens."""
    batches, at = [], 0
    while at < len(rows):
        part = rows[at : at + rng.randint(1, 4)]
        at += len(part)
        longest, left = max(len(t) for t, _, _ in part) + rng.randint(0, 2), rng.random() < 0.5
        batch = {name: [] for name in ("input_ids", "attention_mask", "labels", "counted")}
        for tokens, labels, counted in part:
            pad = longest - len(tokens)
            for name, real, filler in (
                ("input_ids", tokens, rng.choice((0, BOS, 7))), ("attention_mask", [1] * len(tokens), 0),
                ("labels", labels, rng.choice((5, -100))), ("counted", counted, 1),
            ):  # fmt: skip
                batch[name].append([filler] * pad + real if left else real + [filler] * pad)
        if not with_counted:
            del batch["counted"]
        batches.append({name: torch.tensor(values) for name, values in batch.items()})
    return batches


def plain_ratios(model, rows, tokens, skip_bos, with_counted):
    """Module -> the ratios [tokens] of each row with a token that counts; each row run alone, in float64."""
    model, ratios, inputs = model.double(), {}, {}
    infos = linear_modules(model)
    handles = [
        i.module.register_forward_hook(lambda _m, args, _o, n=i.name: inputs.__setitem__(n, args[0])) for i in infos
    ]
    with torch.no_grad():
        for ids, labels, counted in rows:
            counts = [
                (tokens == "all" or (labels[i] != -100) == (tokens == "completion"))
                and not (skip_bos and i == 0 and ids[0] == BOS)
                and (counted[i] == 1 or not with_counted)
                for i in range(len(ids))
            ]
            if not any(counts):
                continue
            model(input_ids=torch.tensor([ids]))
            for info in infos:
                x, w = inputs[info.name].reshape(-1, info.n_in), info.frozen.dequantize()
                ratio = (x @ w.T).norm(dim=1) / x.norm(dim=1) / (w.norm() / math.sqrt(info.n_in))
                ratios.setdefault(info.name, []).append(ratio[torch.tensor(counts)])
    for handle in handles:
        handle.remove()
    model.float()
    return ratios


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tokens", ["all", "prompt", "completion"])
def test_every_token_of_every_prompt(architecture, tokens):
    model, rng = build(architecture), random.Random(f"{architecture}{tokens}")
    for _ in range(3):
        rows, skip_bos, with_counted = random_rows(rng, 14), rng.random() < 0.5, rng.random() < 0.5
        exact = plain_ratios(model, rows, tokens, skip_bos, with_counted)
        options = {"tokens": tokens, "skip_bos": skip_bos}
        for _ in range(2):
            batches = in_batches(rng, rows, with_counted)
            report = pf.score(model, batches, batch_tokens=rng.choice((None, 1, 12, 40)), **options)
            assert list(report.scores) == list(exact)
            for number, (info, ratios) in enumerate(zip(linear_modules(model), exact.values(), strict=True)):
                score, every = report.scores[info.name], torch.cat(ratios)
                mean = float(every.mean())
                assert score.nfn == pytest.approx(mean, rel=2e-4)
                # the sums are float32, from which a small variance comes by subtraction
                assert score.std**2 == pytest.approx(float(every.var(correction=0)), rel=2e-4, abs=1e-6 * mean**2)
                assert (score.tokens, score.type, score.layer) == (len(every), info.type, info.layer)
                assert (score.n_out, score.n_in) == info.frozen.shape
                sums, counts = report.prompt_stats[:, number].tolist()
                assert counts == [len(ratio) for ratio in ratios], "in the order they came"
                assert sums == pytest.approx([float(ratio.sum()) for ratio in ratios], rel=1e-5)
            assert report.prompts == len(ratios) and report.tokens == len(every)


def test_more_rows_than_a_window_in_any_order():
    """600 rows: each keeps its own statistics, whatever is scored beside it."""
    rng, model = random.Random(1), build("llama")
    rows = [([BOS, *(rng.randint(3, 299) for _ in range(rng.randint(1, 3)))], None, None) for _ in range(600)]

    def stats(order):
        groups = [[rows[i][0] for i in order[at : at + 50]] for at in range(0, len(order), 50)]
        batches = []
        for group in groups:
            longest = max(map(len, group))
            batches.append({
                "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in group]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in group]),
            })  # fmt: skip
        return pf.score(model, batches).prompt_stats

    whole, order = stats(range(600)), rng.sample(range(600), 600)
    assert torch.allclose(stats(order), whole[:, :, order], rtol=1e-5)
    assert whole[1, 0].tolist() == [len(row) - 1 for row, _, _ in rows]


def test_looks_are_taken_at_their_numbers_and_at_the_end():
    plain, model, rng, early = build("llama"), build("llama"), random.Random(2), 0
    with torch.no_grad():  # inputs lie along one direction, which two types hardly see and two see alone
        along = 3 * torch.ones(32)
        model.model.embed_tokens.weight.add_(along)
        for layer in model.model.layers:
            for norm, few, many in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj), (layer.self_attn.v_proj,)),
                (layer.post_attention_layernorm, (), (layer.mlp.gate_proj,)),
            ):
                unit = torch.nn.functional.normalize(along * norm.weight, dim=0)
                for module in few:
                    module.weight.sub_(module.weight @ unit[:, None] * unit)
                for module in many:
                    module.weight.add_(unit)
    rows = [([rng.randint(3, 299) for _ in range(rng.randint(2, 6))], [0], [1]) for _ in range(70)]
    for count in (1, 15, 16, 17, 31, 32, 33, 64, 70):
        batches = [{"input_ids": torch.tensor([row])} for row, _, _ in rows[:count]]
        sure = 1 - 1e-12  # so that no look ends it
        report = pf.score(plain, batches, confidence=sure, k=3)
        assert report.decision.looks == sorted({*(look for look in (16, 32, 64) if look <= count), count})
        assert report.prompts == count and report.settings["confidence"] == sure and report.settings["k"] == 3
        types = [score.type for score in report.scores.values()]
        stats = pf.score(model, batches).prompt_stats
        for inverse, confidence in ((False, 0.6), (True, 0.6), (False, 0.01), (True, 0.01)):
            found = pf.score(model, batches, confidence=confidence, k=2, inverse=inverse)
            for look in [look for look in (16, 32, 64) if look < count] + [count]:
                looks = sorted({*(n for n in (16, 32, 64) if n <= look), look})
                expected = decide(stats[:, :, :look], types, 2, confidence, looks, inverse)
                if expected.decided:
                    break
            assert (found.decision.types, found.decision.looks) == (expected.types, expected.looks)
            assert found.prompts == look and found.decision.decided == expected.decided
            early += look < count
    assert early > 3, "some ended before their rows did"


@pytest.mark.parametrize("seed", [0, 3])
def test_the_authors_procedure_batch_by_batch(seed):
    """The ratio of batch means, averaged over batches, however large; padding and BOS count."""
    model, rng = build("qwen2"), random.Random(4)
    batches = in_batches(rng, random_rows(rng, 9), with_counted=False)
    for batch in batches:
        del batch["labels"]
    generator, found, deviation = torch.Generator().manual_seed(seed), {}, []
    infos = {info.module: info for info in linear_modules(model, include_head=True)}

    def note(module, args, _output):
        info, w = infos[module], infos[module].frozen.dequantize().double()
        x = args[0].reshape(-1, info.n_in)
        g = torch.randn(x.shape, generator=generator).double()
        ratio = [(v.double() / (v.double().norm(dim=1, keepdim=True) + 1e-8) @ w.T).norm(dim=1).mean() for v in (x, g)]
        found.setdefault(info.name, []).append(float(ratio[0] / ratio[1]))

    handles = [module.register_forward_hook(note) for module in infos]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    report = pf.score(model, batches, compat="official", seed=seed)
    assert set(report.scores) == set(found)
    for name, ratios in found.items():
        score = report.scores[name]
        assert (score.nfn, score.std) == pytest.approx(
            (sum(ratios) / len(ratios), statistics.pstdev(ratios)), rel=1e-4, abs=1e-6
        )
        deviation.append(abs(score.nfn - statistics.median(ratios)))
    assert max(deviation) > 1e-3 and len(batches) > 2
    assert report.tokens == score.tokens == sum(batch["input_ids"].numel() for batch in batches)
    assert report.prompts == 9 and report.prompt_stats is None
    assert pf.score(model, batches, compat="official", seed=seed + 1).modules != report.modules


def test_random_denominators_are_means_of_norms_of_unit_vectors():
    """With more samples they come nearer to the mean, as the root of their number; each module and seed draws anew."""
    infos = linear_modules(build("llama"))
    squares = closed_form(infos).double()
    for info, value in zip(infos, squares.tolist(), strict=True):
        w = info.frozen.dequantize().double()
        assert value == pytest.approx(float(w.norm()) / math.sqrt(info.n_in), rel=1e-5)
    spread = {}
    for samples in (16, 256):
        draws = torch.stack([monte_carlo(infos, samples, seed) for seed in range(30)]).double()
        spread[samples] = draws.std(0) / squares
        w = infos[0].frozen.dequantize().double()
        g = torch.randn(40_000, infos[0].n_in, generator=torch.Generator().manual_seed(0)).double()
        norms = (g / g.norm(dim=1, keepdim=True) @ w.T).norm(dim=1)
        error = float(norms.std()) / math.sqrt(30 * samples)
        assert float(draws[:, 0].mean()) == pytest.approx(float(norms.mean()), abs=4 * error)
    assert float((spread[16] / spread[256]).mean()) == pytest.approx(4, rel=0.2)
    assert torch.equal(monte_carlo(infos, 16, 5), monte_carlo(infos, 16, 5))
    with torch.no_grad():  # one weight in two modules: each draws for itself
        infos[7].module.weight.copy_(infos[0].module.weight)
    pairs = torch.stack([monte_carlo(infos, 16, seed)[[0, 7]] for seed in range(60)])
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.45


def test_options_reach_the_random_denominators():
    model, batches = build("llama"), [{"input_ids": torch.tensor([[5, 6, 7], [8, 9, 3]])}]
    infos, plain = linear_modules(model), pf.score(model, batches)
    for samples, seed in ((4, 0), (4, 1), (9, 1)):
        found = pf.score(model, batches, baseline="monte-carlo", mc_samples=samples, seed=seed)
        ratio = closed_form(infos) / monte_carlo(infos, samples, seed)
        for (name, score), factor in zip(found.scores.items(), ratio.tolist(), strict=True):
            assert score.nfn == pytest.approx(plain.scores[name].nfn * factor, rel=1e-5)
        assert found.settings["mc_samples"] == samples and found.settings["seed"] == seed


def test_vectors_of_counted_inputs_at_every_rank():
    """All of them at the full rank, against the SVD; the shares add up to all; masked tokens have no part in it."""
    model, rng = build("llama"), random.Random(6)
    rows = [row for row in random_rows(rng, 30) if any(row[2])]
    batches, inputs = in_batches(rng, rows, with_counted=True), {}
    infos = linear_modules(model)
    handles = [
        i.module.register_forward_hook(lambda _m, args, _o, n=i.name: inputs.setdefault(n, []).append(args[0][0]))
        for i in infos
    ]
    counts = []
    with torch.no_grad():
        for ids, _, counted in rows:
            counts += [bool(c) and not (i == 0 and ids[0] == BOS) for i, c in enumerate(counted)]
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    least = min(info.n_in for info in infos)
    for rank in (1, 3, least):
        report = pf.score(model, batches, eva_rank=rank, batch_tokens=20)
        assert list(report.eva) == list(report.eva_ratios) == [info.name for info in infos]
        for info in infos:
            x = torch.cat(inputs[info.name]).double()[torch.tensor(counts)]
            _, values, vectors = torch.linalg.svd(x, full_matrices=False)
            shares = values.square() / values.square().sum()
            assert report.eva_ratios[info.name].tolist() == pytest.approx(shares[:rank].tolist(), rel=1e-3, abs=1e-4)
            assert report.eva[info.name].shape == (rank, info.n_in)
            for place in range(min(rank, 3)):
                along = float((report.eva[info.name][place].double() @ vectors[place]).abs())
                assert along == pytest.approx(1, abs=1e-3), (info.name, place)
    for wrong in (0, least + 1):
        with pytest.raises(ConfigError):
            pf.score(model, batches, eva_rank=wrong)
    few = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    assert pf.score(model, few, eva_rank=3).tokens == 3
    with pytest.raises(DataError):
        pf.score(model, few, eva_rank=4)


@pytest.mark.parametrize("batch_tokens", [1, 7, 24, 400, None])
def test_a_forward_pass_takes_as_many_tokens_as_it_may(batch_tokens):
    """Padded tokens, as few passes as rows sorted by length allow; a longer row has a pass of its own."""
    rng, shapes = random.Random(8), []
    model = build("llama")
    model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: shapes.append(args[0].shape))
    rows = [[rng.randint(3, 299) for _ in range(rng.randint(1, 60))] for _ in range(40)]
    batches = [{"input_ids": torch.tensor([row])} for row in rows]
    pf.score(model, batches, batch_tokens=batch_tokens)
    most, lengths, passes, held = batch_tokens or 384, sorted(map(len, rows)), 0, 0
    for length in lengths:
        held, passes = (held + 1, passes) if passes and (held + 1) * length <= most else (1, passes + 1)
    assert len(shapes) == passes and sum(count for count, _ in shapes) == len(rows)
    assert all(count == 1 or count * longest <= most for count, longest in shapes)
    shapes.clear()
    wide = {
        "input_ids": torch.randint(3, 300, (10, 60), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(10, 60, dtype=torch.long),
    }
    pf.score(model, [wide])
    assert shapes == [(10, 60)], "as large as the largest batch that comes"


def test_the_seed_reaches_the_sketch():
    torch.manual_seed(0)
    config = {**SMALL, "hidden_size": 128, "intermediate_size": 130, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    batches = [{"input_ids": torch.randint(3, 300, (8, 60), generator=torch.Generator().manual_seed(0))}]
    one, again, other = (pf.score(model, batches, eva_rank=1, seed=seed) for seed in (0, 0, 1))
    assert (one.settings["seed"], other.settings["seed"], one.settings["eva_rank"]) == (0, 1, 1)
    for name, vectors in one.eva.items():
        assert torch.equal(vectors, again.eva[name]) and not torch.equal(vectors, other.eva[name])
        assert float((vectors @ other.eva[name].T).abs()) > 0.5, "of one direction"


def test_a_sketch_depends_on_its_seed_where_it_is_an_approximation():
    """Inputs of more dimensions than the sketch has columns."""
    info = LinearInfo("m", torch.nn.Linear(300, 2), "m", 0, 300, 2, False)
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 301) ** -0.5
    found = {}
    for seed in (0, 0, 1):
        sketch = InputSketch(2, [info], seed)
        sketch.add("m", x, x.norm(dim=1), torch.ones(400, dtype=torch.bool))
        rows, ratios = sketch.vectors()
        found.setdefault(seed, []).append(rows["m"])
        best = torch.linalg.svdvals(x.double())[:2].square() / x.double().square().sum()
        assert ((ratios["m"] <= best + 1e-5) & (ratios["m"] > 0.8 * best)).all(), "a lower bound, and a near one"
    assert torch.equal(*found[0]) and not torch.equal(found[0][0], found[1][0])
