"""What is written comes back: adapters, placements, scores, EVA's vectors, checkpoints and the tuning table.

Values are drawn at random, a few times each: fractional alphas, several ranks, some modules of a type, odd names.
"""

import math
import random
import warnings

import peft
import pytest
import torch
from helpers import CONFIGS, build, random_batches, randomise
from snapshot import seen
from torch import nn

import plopfast as pf
from plopfast.kernels import dispatch
from plopfast.lora import tuning
from plopfast.lora.layer import adapters
from plopfast.scoring import eva
from plopfast.scoring.report import ModuleScore
from plopfast.scoring.stopping import Decision
from plopfast.support import files
from plopfast.support.config import TrainConfig
from plopfast.training.optimizer import make_optimizer
from plopfast.training.state import COUNTERS, TrainState, load_state, save_state

WORDS = ("a", "ß", "two words", "日本", "dash-", 'a "quoted" one', "back\\slash", "x" * 50)


def with_odd_names():
    """Names that end others, hold what regular expressions use, or belong to modules of another kind too."""
    model = build("llama")
    layers = model.model.layers
    layers[0].mlp.add_module("q_proj", nn.Linear(8, 6))
    layers[0].self_attn.add_module("x_q_proj", nn.Linear(8, 6))
    layers[1].mlp.add_module("up+proj(2)|[x]", nn.Linear(8, 6))
    layers[1].mlp.add_module("проекция 1", nn.Linear(8, 6))
    layers[1].mlp.add_module("o_proj", nn.Embedding(7, 6))
    layers[1].add_module("lm_head", nn.Linear(8, 6))
    layers[1].add_module("mlp_up_proj", nn.Linear(8, 6))
    layers[2].add_module("model", nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(8, 6)})})])}))  # fmt: skip
    return model.requires_grad_(False)


def untied(kind):
    model = build(kind)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # which may be the embedding's
    return model


MODELS = {**{name: lambda name=name: untied(name) for name in CONFIGS}, "odd names": with_odd_names}
SEEDS = [(kind, seed) for kind in MODELS for seed in range(8 if kind == "odd names" else 1)]
LAYER = "model.layers.2.model.layers.0.mlp.up_proj"
CLASHES = {  # of names that end others, and of modules of another kind
    "a name and one that it ends": {"lm_head": (3, 1.5), "model.layers.1.lm_head": (2, 7.0), "model.layers.0.mlp.q_proj": (2, 7.0)},
    "the shorter of them alone": {"lm_head": (3, 1.5)},
    "the longer of them alone": {"model.layers.1.lm_head": (3, 1.5)},
    "a whole name within another": {"model.layers.0.mlp.up_proj": (3, 1.5)},
    "both, of two ranks": {"model.layers.0.mlp.up_proj": (3, 1.5), LAYER: (2, 7.0), "model.layers.1.mlp.up_proj": (2, 7.0)},
    "a name that an embedding has too": {f"model.layers.{i}.self_attn.o_proj": (2, 1.5) for i in range(3)},
    "a dot that is any letter": {"model.layers.1.mlp.up_proj": (3, 1.5), "model.layers.1.mlp_up_proj": (2, 7.0), "model.layers.0.mlp.up_proj": (2, 7.0)},
    "letters of regular expressions": {"model.layers.1.mlp.up+proj(2)|[x]": (2, 1.5), LAYER: (3, 0.5), "lm_head": (3, 0.5)},
}  # fmt: skip


def placed_at_random(model, draw):
    infos = pf.linear_modules(model, include_head=True)
    if draw.random() < 0.3:  # whole types, and then the head
        types = draw.sample(sorted({info.type for info in infos}), 2)
        chosen = [info for info in infos if info.type in types]
    else:
        chosen = draw.sample(infos, draw.randint(1, len(infos)))
    ranks, alphas = (
        [draw.randint(1, 6) for _ in range(2)],
        [draw.choice([8.0, 0.37, draw.uniform(0.01, 40)]) for _ in range(2)],
    )
    return {info.name: (draw.choice(ranks), draw.choice(alphas)) for info in chosen}


def logits_of(model):
    batch = random_batches(count=1, seed=5)[0]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def lora_of(model):
    return {
        name: (m.rank, m.alpha, m.dropout, m.rslora, m.scaling, seen(m.lora_A), seen(m.lora_B), seen(m.lora_magnitude))
        for name, m in adapters(model).items()
    }


@pytest.mark.parametrize("kind, seed", SEEDS)
def test_an_adapter(kind, seed, tmp_path):
    model, draw = MODELS[kind](), random.Random(f"{kind} {seed}")
    modules = placed_at_random(model, draw)
    adapter_comes_back(kind, model, modules, draw, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_a_model_in_half_precision(dtype, tmp_path):
    """Its values stay float32, also those that half precision has not."""
    models = [build("llama").to(dtype) for _ in range(2)]
    modules = placed_at_random(models[0], random.Random(1))
    pf.inject(models[0], pf.Placement(modules, [], "random", 0))
    torch.manual_seed(1)
    for module in adapters(models[0]).values():
        nn.init.normal_(module.lora_A), nn.init.normal_(module.lora_B, std=0.1)
    pf.load_adapter(models[1], pf.save_adapter(models[0], tmp_path / "adapter"))
    assert lora_of(models[1]) == lora_of(models[0]) and torch.equal(logits_of(models[1]), logits_of(models[0]))


def test_an_adapter_of_a_model_with_a_tied_head(tmp_path):
    models = [build("gpt2") for _ in range(2)]
    assert models[0].lm_head.weight is models[0].transformer.wte.weight
    modules = {info.name: (2, 0.7) for info in pf.linear_modules(models[0])}
    pf.inject(models[0], pf.Placement(modules, [], "all", 0))
    randomise(models[0])
    pf.load_adapter(models[1], pf.save_adapter(models[0], tmp_path / "adapter"))
    assert lora_of(models[1]) == lora_of(models[0]) and torch.equal(logits_of(models[1]), logits_of(models[0]))


@pytest.mark.parametrize("clash", CLASHES)
def test_an_adapter_of_names_that_clash(clash, tmp_path):
    draw = random.Random(clash)
    adapter_comes_back("odd names", with_odd_names(), CLASHES[clash], draw, tmp_path)


def adapter_comes_back(kind, model, modules, draw, tmp_path):
    dropout, rslora, dora = draw.choice([0.0, 0.05, 0.31]), draw.random() < 0.5, draw.random() < 0.5
    pf.inject(model, pf.Placement(modules, [], "random", 0), dropout=dropout, rslora=rslora, dora=dora, backend="torch")
    torch.manual_seed(1)
    for module in adapters(model).values():
        nn.init.normal_(module.lora_A), nn.init.normal_(module.lora_B, std=0.1)
    path = pf.save_adapter(model, tmp_path / "adapter")
    expected, was = lora_of(model), logits_of(model)
    assert {name: values[:5] for name, values in expected.items()} == {
        name: (rank, alpha, dropout, rslora, alpha / (rank**0.5 if rslora else rank))
        for name, (rank, alpha) in modules.items()
    }
    assert all(module.backend == "torch" for module in adapters(model).values())

    again = MODELS[kind]()
    again.load_state_dict({k.replace(".base.", "."): v for k, v in model.state_dict().items() if ".lora_" not in k})
    theirs = MODELS[kind]()
    theirs.load_state_dict(again.state_dict())
    assert set(pf.load_adapter(again, path, backend="torch")) == set(modules)
    assert all(module.backend == "torch" for module in adapters(again).values())
    assert lora_of(again) == expected and torch.equal(logits_of(again), was)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        f"{m}.lora_{x}" for m in modules for x in ("A", "B", "magnitude")[: 2 + dora]
    }

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out")  # PEFT mends a wrong one, and says so
        wrapped = peft.PeftModel.from_pretrained(theirs, path).eval().base_model.model
    found = {
        name: (m.r["default"], m.scaling["default"], getattr(m.lora_dropout["default"], "p", 0.0),
               seen(m.lora_A["default"].weight), seen(m.lora_B["default"].weight),
               seen(m.lora_magnitude_vector["default"].weight if dora else None))
        for name, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }  # fmt: skip
    assert found == {name: (rank, pytest.approx(scaling), p, *abm) for name, (rank, _, p, _, scaling, *abm) in expected.items()}  # fmt: skip
    torch.testing.assert_close(logits_of(wrapped), was, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, seed", SEEDS)
def test_the_configuration_that_peft_gets_of_a_placement(kind, seed):
    model, ends = MODELS[kind](), {"lm_head", "model.layers.0.mlp.up_proj"}  # of other names, which PEFT adapts too
    modules = placed_at_random(model, random.Random(f"{seed} {kind}"))
    modules = {name: pair for name, pair in modules.items() if kind != "odd names" or name not in ends}
    placement = pf.Placement(modules, [], "random", 0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**placement.peft_config())).base_model.model
    layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {n: (m.r["default"], m.lora_alpha["default"]) for n, m in layers.items()} == modules


@pytest.mark.parametrize("seed", range(4))
def test_a_placement(seed, tmp_path):
    draw = random.Random(seed)
    modules = {f"{draw.choice(WORDS)}.{i}": (draw.randint(1, 99), draw.uniform(1e-9, 1e9)) for i in range(5)}
    placement = pf.Placement(
        modules, draw.sample(WORDS, 3), draw.choice(WORDS), draw.randint(0, 2**40), draw.choice([None, draw.random(), 0.0]),
        draw.choice(WORDS), draw.sample(WORDS, 2), {name: (draw.randint(1, 9), 3) for name in list(modules)[:3]},
    )  # fmt: skip
    placement.save(tmp_path / "placement.json")
    again = pf.Placement.load(tmp_path / "placement.json")
    assert again == placement and list(again.modules) == list(modules) and str(again) == str(placement)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "placement.json").read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_scores(seed, tmp_path):
    draw = random.Random(seed)
    scores = {
        f"layers.{i}.{kind}": ModuleScore(draw.uniform(0, 3), draw.random(), draw.randint(1, 10**9), kind, i, 8, draw.randint(1, 9))
        for kind in WORDS[:3] for i in range(3)
    }  # fmt: skip
    scores["head"] = ModuleScore(draw.random(), 0.0, 1, "head", None, 8, 300)
    decision = Decision(
        ["a", "ß"],
        2,
        "plop",
        0.9,
        seed % 2 > 0,
        32,
        [16, 32],
        draw.random(),
        None,
        draw.random(),
        [["a", "two words"]],
        "it",
    )
    stats = torch.rand(2, len(scores), 16, generator=torch.Generator().manual_seed(seed)).double() if seed % 3 else None
    settings = {"baseline": "closed-form", "tokens": "all", "skip_bos": True, "confidence": 0.9, "k": 2}
    report = pf.NFNReport(scores, 123, 16, draw.random(), "model ß", settings, decision if seed else None, stats)
    path = tmp_path / "scores.json"
    report.save(path)
    again = pf.NFNReport.load(path)
    assert again == report and list(again.scores) == list(scores) and again.types == report.types
    assert (again.prompt_stats is None) == (stats is None)
    assert stats is None or torch.equal(again.prompt_stats, stats)
    assert stats is None or again.intervals() == report.intervals()


def test_evas_vectors(tmp_path):
    torch.manual_seed(0)
    vectors = {name: torch.randn(3, 5) for name in WORDS}
    ratios = {name: torch.rand(3, dtype=torch.float64) for name in WORDS}
    shared = torch.randn(6, 5)
    vectors["one"], vectors["two"] = shared[:3], shared[3:]
    ratios["one"] = ratios["two"] = torch.rand(3, dtype=torch.float64)
    eva.save(tmp_path / "eva.safetensors", vectors, ratios)
    found = eva.load(tmp_path / "eva.safetensors")
    assert [dict(seen(part)) for part in found] == [dict(seen(part)) for part in (vectors, ratios)]


def a_state(validated, averaged, steps, seed):
    torch.manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in ("a.lora_A", "a.lora_B", "norm")}
    optimizer = make_optimizer(parameters, TrainConfig(lora_plus=3.0))
    state = TrainState(parameters, optimizer, validated=validated, averaged=averaged)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state.update_average(0.7)
    return state


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_checkpoint(validated, averaged, steps, tmp_path):
    state, draw = a_state(validated, averaged, steps, 1), random.Random(1)
    for name in COUNTERS:
        setattr(state, name, draw.randint(1, 2**50))
    state.best_loss = draw.random() if steps else math.inf
    state.step = steps
    if validated:
        state.best = {name: torch.randn_like(value) for name, value in state.best.items()}
    identity = {
        "placement": {name: [draw.randint(1, 9), draw.random(), 0.1] for name in WORDS},
        "ranks": 1,
        "lr": 1e-30,
    }
    save_state(tmp_path, identity, state.state_dict(), keep=1)
    expected = {key: seen(value) for key, value in state.state_dict().items()}
    torch.manual_seed(99)
    path, kept, loaded = load_state(tmp_path)
    assert kept == identity and path.name == f"step-{steps:08d}.safetensors"
    other = a_state(validated, averaged, 0, 2)
    other.load_state_dict(loaded)
    assert {key: seen(value) for key, value in other.state_dict().items()} == expected
    assert seen(other.best) == seen(state.best) and seen(other.average) == seen(state.average)


def test_the_tuning_table(tmp_path):
    draw, rows = random.Random(0), {}
    for number in range(20):
        sizes = {name: 2 ** draw.randint(0, 10) for name in ("bm", "bn", "bk", "warps")}
        tiles = dispatch.Tiles(
            **sizes, stages=draw.randint(1, 9), descriptor=draw.random() < 0.5, group=draw.randint(1, 99)
        )
        strategy = draw.choice(dispatch.STRATEGIES)
        rows[f"GPU {number} bfloat16 1 2 3 4"] = tuning.row(strategy, tiles, {strategy: draw.random()}, "2026-01-01")
    first, second = dict(list(rows.items())[:12]), dict(list(rows.items())[8:])
    path = tmp_path / "tune.json"
    try:
        tuning.save(first, path), tuning.save(second, path)
        assert tuning.load(path) == ""
        expected = {key: (row["strategy"], dispatch.Tiles(**row["tiles"])) for key, row in rows.items()}
        assert expected == dispatch.TABLE and files.read_json(path, "")["rows"] == rows
    finally:
        dispatch.use_table({})
