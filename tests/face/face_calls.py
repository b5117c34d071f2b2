"""Calls of the whole public face, returning and raising, each with what it is there to change.

A call is made on a `World` of its own, whose model has everything that a careless function could disturb: submodules in
different modes, hooks and a forward of the caller's, mixed `requires_grad`, gradients, dropout that draws numbers.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from helpers import SMALL, random_batches

import plopfast as pf
from plopfast.data.example import Example
from plopfast.lora.layer import adapters, disabled
from plopfast.lora.merging import merge_checked
from plopfast.lora.shared import find_shared_inputs
from plopfast.models.loading import load_tokenizer
from plopfast.models.running import check_packing
from plopfast.support.errors import (
    AdapterError,
    ConfigError,
    DataError,
    FileError,
    ModelError,
    PlacementError,
    TrainingError,
)
from plopfast.training.estimate import estimate
from plopfast.training.evaluate import evaluate

ATTENTION, DOWN = "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"
ADAPTED = {  # rank and alpha; k and v share a product, as they have one input and one scaling, and q has another
    f"{ATTENTION}.q_proj": (2, 3.5), f"{ATTENTION}.k_proj": (3, 6.0), f"{ATTENTION}.v_proj": (4, 8.0), DOWN: (5, 14.25),
}  # fmt: skip
WRAPPED = rf"^model ({'|'.join(ADAPTED)})\b"
FROZEN = r"^model .* requires_grad$"
LEARNED = r"^model .*lora_[AB] values$"
PLACEMENT = pf.Placement(ADAPTED, [], "explicit", 0)


def odd_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, attention_dropout=0.1)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.requires_grad_(True)
    layers = model.model.layers
    layers[0].eval()
    layers[1].mlp.down_proj.eval()
    layers[0].mlp.gate_proj.weight.requires_grad_(False)
    layers[1].input_layernorm.weight.grad = torch.ones_like(layers[1].input_layernorm.weight)
    layers[0].self_attn.q_proj.weight.grad = torch.ones_like(layers[0].self_attn.q_proj.weight)
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x)
    layers[1].register_forward_hook(lambda *_: None)
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    model.note = ["the caller's"]
    return model


class World:
    """What a call needs, in a folder of its own."""

    def __init__(self, folder, tokenizer, model=None):
        self.folder, self.tokenizer, self.model = folder, tokenizer, model or odd_model()
        self.batches = random_batches(count=3)
        self.out = folder / "out"

    def examples(self, count=12, of=8):
        generator = torch.Generator().manual_seed(3)
        draw = lambda n: torch.randint(3, 300, (n,), generator=generator).tolist()  # noqa: E731
        return [Example.after_prompt([1, *draw(of + i % 5)], of // 2, f" {i % 3}", f"rows:{i}") for i in range(count)]

    def adapted(self, values=True):
        torch.manual_seed(1)
        pf.inject(self.model, PLACEMENT, dropout=0.1)
        for module in adapters(self.model).values():
            if values:
                torch.nn.init.normal_(module.lora_B, std=0.1)
        return self.model

    def rows(self, *more):
        path = self.folder / "rows.jsonl"
        rows = [{"prompt": f"a word {i}", "completion": f" kind {i % 3}"} for i in range(9)]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
        return path

    def saved_adapter(self, **values):
        other = World(self.folder, self.tokenizer)
        path = pf.save_adapter(other.adapted(), self.folder / "adapter")
        if values:
            file = path / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return path

    def saved_model(self, **values):
        path = self.folder / "model"
        model = odd_model()
        with torch.no_grad():
            model.lm_head.weight[0, 0] = values.get("value", 0.0)
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path

    def trainer(self, out=None, **settings):
        rows, config = self.examples(), {"max_steps": 3, "batch_rows": 3, "eval_every": 2, **settings}
        return pf.Trainer(self.model, pf.TrainConfig(**config), rows[:9], rows[9:], out=out)

    def report(self):
        return pf.score(self.model, self.batches)


@dataclass(frozen=True)
class Case:
    name: str  # in `plopfast.__all__`, or of a function below it
    about: str
    start: Callable  # World -> (call, arguments)
    changes: tuple[str, ...] = ()
    raises: type[Exception] | None = None
    halfway: tuple[str, ...] = ()  # what may be otherwise after a failure half way; the call made again gives the same
    anew: bool = False  # made again on the model as it was at first
    dear: bool = False  # takes long
    look: Callable = lambda world: None  # at what the call changed, a part of its result

    def __str__(self):
        return f"{self.name}: {self.about}".replace(" ", "_")


CASES: list[Case] = []


def case(name, about="", changes=(), raises=None, halfway=(), **more):
    def add(start):
        about_it = about or start.__name__.strip("_").replace("_", " ")
        CASES.append(Case(name, about_it, start, tuple(changes), raises, tuple(halfway), **more))
        return start

    return add


def learned(w):
    return {name: p for name, p in w.model.named_parameters() if p.requires_grad}


def seen_of(w):
    """The model as the call left it: types, modes and values of its modules."""
    modules = [(name, type(m).__name__, m.training, vars(m).get("scaling")) for name, m in w.model.named_modules()]
    lora = [(n, m.rank, m.alpha, m.dropout, m.rslora, m.scaling) for n, m in adapters(w.model).items()]
    return modules, lora, w.model


# models


@case("load_model", dear=True)
def _loads(w):
    path = w.saved_model()
    return lambda: pf.load_model(path, dtype=torch.bfloat16), ()


@case("load_model", raises=ModelError)
def _not_finite(w):
    path = w.saved_model(value=math.nan)
    return lambda: pf.load_model(path), ()


@case("load_model", raises=ModelError)
def _absent(w):
    return lambda: pf.load_model(w.folder / "nowhere"), ()


@case("load_tokenizer")
def _loads_a_tokenizer(w):
    path = w.saved_model()
    return lambda: load_tokenizer(path), ()


@case("linear_modules")
def _lists(w):
    return lambda: [vars(info) | {"module": 0} for info in pf.linear_modules(w.model, include_head=True)], ()


@case("linear_modules", raises=ModelError)
def _none(w):
    return lambda: pf.linear_modules(w.model.model.norm), ()


@case("check_packing")
def _keeps_apart(w):
    return lambda: check_packing(w.model), ()


# lora


@case("LoRALinear", changes=[r"^model model.layers.1.mlp.up_proj .* requires_grad$"])
def _wraps(w):
    base = w.model.get_submodule("model.layers.1.mlp.up_proj")
    first = torch.ones(3, 32)
    return lambda: pf.LoRALinear(base, 3, 1.5, dropout=0.1, rslora=True, lora_A=first), (first,)


@case("LoRALinear", raises=PlacementError)
def _too_high_a_rank(w):
    return lambda: pf.LoRALinear(w.model.get_submodule(f"{ATTENTION}.q_proj"), 33, 1.0), ()


@case("LoRALinear", raises=pf.BackendError)
def _no_such_backend_here(w):
    return lambda: pf.LoRALinear(w.model.get_submodule(f"{ATTENTION}.q_proj"), 3, 1.0, backend="triton"), ()


@case("inject", changes=[WRAPPED, FROZEN], look=seen_of)
def _injects(w):
    return lambda: pf.inject(w.model, PLACEMENT, dropout=0.1, rslora=True, seed=4), (PLACEMENT,)


@case("inject", changes=[WRAPPED, FROZEN], look=seen_of)
def _with_vectors(w):
    vectors = {name: torch.randn(9, n, generator=torch.Generator().manual_seed(n)) for name, n in zip(ADAPTED, (32, 32, 32, 48), strict=True)}  # fmt: skip
    return lambda: pf.inject(w.model, PLACEMENT, init="eva", eva=vectors), (PLACEMENT, vectors)


def _wrong_placement(**modules):
    return pf.Placement({**PLACEMENT.modules, **{name.replace("__", "."): value for name, value in modules.items()}}, [], "explicit", 0)  # fmt: skip


@case("inject", raises=PlacementError)
def _a_name_that_is_not_there(w):
    wrong = _wrong_placement(model__layers__7=(2, 1.0))
    return lambda: pf.inject(w.model, wrong), (wrong,)


@case("inject", raises=PlacementError)
def _the_last_rank_is_too_high(w):
    wrong = _wrong_placement(model__layers__1__mlp__up_proj=(33, 1.0))
    return lambda: pf.inject(w.model, wrong), (wrong,)


@case("inject", raises=pf.BackendError)
def _on_a_backend_that_is_not_here(w):
    return lambda: pf.inject(w.model, PLACEMENT, backend="fused"), ()


@case("inject", raises=ConfigError)
def _an_unknown_init(w):
    return lambda: pf.inject(w.model, PLACEMENT, init="zeros"), ()


@case("inject", raises=AdapterError)
def _twice(w):
    w.adapted()
    return lambda: pf.inject(w.model, PLACEMENT), ()


@case("merge", changes=[WRAPPED], halfway=[WRAPPED], look=seen_of)
def _merges(w):
    w.adapted()
    return lambda: (pf.merge(w.model), None)[1], ()


@case("merge", raises=AdapterError)
def _a_shared_weight(w):
    w.adapted()
    layers = w.model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.base.weight
    return lambda: pf.merge(w.model), ()


@case("merge_checked", changes=[WRAPPED], halfway=[WRAPPED], look=seen_of)
def _merges_and_compares(w):
    w.adapted()
    return lambda: merge_checked(w.model) < 1e-4, ()


@case("unload", changes=[WRAPPED], halfway=[WRAPPED], look=seen_of)
def _unloads(w):
    w.adapted()
    return lambda: (pf.unload(w.model), None)[1], ()


@case("unload", "of a model without adapters")
def _unloads_nothing(w):
    return lambda: pf.unload(w.model), ()


@case("disabled")
def _switches_off(w):
    w.adapted()
    adapters(w.model)[f"{ATTENTION}.k_proj"].enabled = False  # by the caller
    ids = w.batches[0]["input_ids"]

    def run():
        with disabled(w.model), torch.no_grad():
            return w.model.model.layers[0].self_attn.q_proj(w.model.model.embed_tokens(ids))

    return run, ()


@case("find_shared_inputs", changes=[r"^model .*\.shared$"])
def _groups(w):
    w.adapted()
    return lambda: find_shared_inputs(w.model), ()


def _tensors():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, generator=generator) for shape in ((4, 3, 12), (7, 12), (2, 12), (7, 2), (7,))]


@case("lora_linear")
def _applies(w):
    tensors = _tensors()
    x, weight, a, b, bias = tensors
    return lambda: pf.lora_linear(x, weight, a, b, scaling=0.7, bias=bias, dropout_p=0.3, seed=5), tuple(tensors)


@case("lora_linear", raises=ValueError)
def _transposed(w):
    x, weight, a, b, _ = _tensors()
    return lambda: pf.lora_linear(x, weight, a.T, b, scaling=0.7), (x, weight, a, b)


@case("linear_norms")
def _measures(w):
    x, weight, *_ = _tensors()
    return lambda: pf.linear_norms(x, weight), (x, weight)


@case("linear_norms", raises=ValueError)
def _of_another_width(w):
    x, weight, *_ = _tensors()
    return lambda: pf.linear_norms(x, weight.T), (x, weight)


@case("save_adapter", changes=[r"^folder out"])
def _saves(w):
    w.adapted()
    return lambda: pf.save_adapter(w.model, w.out), ()


@case("save_adapter", raises=FileError)
def _where_something_is(w):
    w.adapted()
    w.out.mkdir()
    (w.out / "notes.txt").write_text("the caller's")
    return lambda: pf.save_adapter(w.model, w.out, overwrite=True), ()


@case("save_adapter", raises=AdapterError)
def _that_is_not_finite(w):
    adapters(w.adapted())[DOWN].lora_B.data[0, 0] = math.inf
    return lambda: pf.save_adapter(w.model, w.out), ()


@case("load_adapter", changes=[WRAPPED, FROZEN], look=seen_of)
def _loads_an_adapter(w):
    path = w.saved_adapter()
    return lambda: pf.load_adapter(w.model, path), ()


@case("load_adapter", raises=AdapterError)
def _of_another_base(w):
    path = w.saved_adapter()
    with torch.no_grad():
        w.model.get_submodule(DOWN).weight.add_(1.0)
    return lambda: pf.load_adapter(w.model, path), ()


@case("load_adapter", raises=AdapterError)
def _of_a_kind_that_is_not_known(w):
    path = w.saved_adapter(use_dora=True)
    return lambda: pf.load_adapter(w.model, path), ()


@case("load_adapter", raises=pf.BackendError)
def _on_another_backend(w):
    path = w.saved_adapter()
    return lambda: pf.load_adapter(w.model, path, backend="triton"), ()


@case("Placement", changes=[r"^folder placement.json$"])
def _is_kept(w):
    return lambda: PLACEMENT.save(w.folder / "placement.json"), (PLACEMENT,)


@case("Placement")
def _is_read(w):
    path = w.folder / "placement.json"
    PLACEMENT.save(path)
    return lambda: pf.Placement.load(path), ()


@case("Placement")
def _in_words(w):
    return lambda: (str(PLACEMENT), PLACEMENT.peft_config()), (PLACEMENT,)


@case("Placement", raises=FileError)
def _is_damaged(w):
    path = w.folder / "placement.json"
    path.write_text('{"plopfast": "placement", "modules": {}}')
    return lambda: pf.Placement.load(path), ()


# scoring and placing


@case("score")
def _scores(w):
    return lambda: pf.score(w.model, w.batches, confidence=0.9, k=1, eva_rank=2, include_head=True), (w.batches,)


@case("score", "as the authors do")
def _officially(w):
    return lambda: pf.score(w.model, w.batches, compat="official"), (w.batches,)


@case("score", "by a Monte Carlo baseline")
def _monte_carlo(w):
    return lambda: pf.score(w.model, w.batches, baseline="monte-carlo", mc_samples=32), (w.batches,)


@case("score", raises=ModelError)
def _a_model_that_is_not_finite(w):
    with torch.no_grad():
        w.model.get_submodule(DOWN).weight[0, 0] = math.nan
    return lambda: pf.score(w.model, w.batches), (w.batches,)


@case("score", raises=ModelError)
def _an_adapted_model(w):
    w.adapted()
    return lambda: pf.score(w.model, w.batches), (w.batches,)


@case("NFNReport", changes=[r"^folder scores\.(json|safetensors)$"], halfway=[r"^folder scores\.safetensors$"])
def _report_is_kept(w):
    report = w.report()
    return lambda: report.save(w.folder / "scores.json"), (report,)


@case("NFNReport", changes=[r"^folder scores\.(json|safetensors)$"], halfway=[r"^folder scores\.safetensors$"])
def _report_replaces_another(w):
    report, path = w.report(), w.folder / "scores.json"
    pf.score(w.model, w.batches[:2]).save(path)
    return lambda: report.save(path), (report,)


@case("NFNReport")
def _report_is_read(w):
    path = w.folder / "scores.json"
    w.report().save(path)
    return lambda: pf.NFNReport.load(path), ()


@case("NFNReport")
def _report_is_asked(w):
    report = w.report()
    return lambda: (report.table(), report.intervals(), report.decide(1), report.outliers(), report.types), (report,)


@case("NFNReport", raises=FileError)
def _of_a_damaged_report(w):
    path = w.folder / "scores.json"
    w.report().save(path)
    path.with_suffix(".safetensors").write_bytes(b"no")
    return lambda: pf.NFNReport.load(path), ()


@case("place")
def _places(w):
    report = w.report()
    return lambda: pf.place(report, k=2, budget=2000, ranks="proportional"), (report,)


@case("place", raises=PlacementError)
def _too_little(w):
    report = w.report()
    return lambda: pf.place(report, budget=3), (report,)


# data


@case("read_jsonl")
def _reads(w):
    path = w.rows()
    return lambda: pf.read_jsonl(path), ()


@case("read_jsonl", raises=DataError)
def _a_row_of_no_kind(w):
    path = w.rows({"other": 1})
    return lambda: pf.read_jsonl(path), ()


@case("read_rows")
def _reads_several(w):
    sources = [w.rows({"other": 1})]
    return lambda: pf.read_rows(sources, bad_rows="skip"), (sources,)


@case("read_rows", raises=DataError)
def _twice_the_same(w):
    sources = [w.rows()] * 2
    return lambda: pf.read_rows(sources), (sources,)


@case("tokenize")
def _tokenises(w):
    rows = pf.read_jsonl(w.rows())
    return lambda: pf.tokenize(rows, w.tokenizer, 12, long="cut"), (rows, w.tokenizer)


@case("tokenize", raises=DataError)
def _a_row_is_too_long(w):
    rows = pf.read_jsonl(w.rows())
    return lambda: pf.tokenize(rows, w.tokenizer, 5), (rows, w.tokenizer)


@case("describe_data")
def _describes(w):
    rows = {"train": pf.read_rows(w.rows())}
    return lambda: str(pf.describe_data(rows, w.tokenizer)), (rows, w.tokenizer)


@case("describe_data", raises=ConfigError)
def _of_no_split(w):
    return lambda: pf.describe_data({}, w.tokenizer), (w.tokenizer,)


# settings and errors


@case("TrainConfig")
def _settings(w):
    return lambda: pf.TrainConfig(lr=0.1), ()


@case("TrainConfig", raises=ConfigError)
def _contradicting(w):
    return lambda: pf.TrainConfig(max_steps=1, epochs=1.0), ()


@case("RunConfig")
def _all_settings(w):
    return lambda: (pf.RunConfig(rank=3), pf.RunConfig(rank=3).training, pf.RunConfig().placing), ()


@case("RunConfig", raises=ConfigError)
def _contradicting_ones(w):
    return lambda: pf.RunConfig(full=True, dropout=0.1), ()


@case("PlopfastError")
def _error(w):
    return lambda: str(pf.PlopfastError("said")), ()


@case("BackendError")
def _backend_error(w):
    return lambda: isinstance(pf.BackendError("said"), pf.PlopfastError), ()


# training

ALL = [r"^model .* values$", r"^model .* gradient$"]
FIT = [LEARNED, r"^model .*\.shared$"]


@case("Trainer", "is made", changes=[r"^model .*\.shared$"], halfway=[r"^model .*\.shared$"])
def _trainer(w):
    w.adapted()
    return lambda: w.trainer().plan.facts(), ()


@case("Trainer", "has nothing to train", raises=TrainingError)
def _nothing(w):
    w.model.requires_grad_(False)
    return lambda: w.trainer(), ()


@case("Trainer", "has too long a row", raises=ConfigError)
def _too_long(w):
    w.adapted()
    return lambda: w.trainer(batch_tokens=4), ()


@case(
    "Trainer",
    "fits",
    changes=[*FIT, r"^folder out"],
    halfway=[*FIT, r"^folder out"],
    anew=True,
    dear=True,
    look=learned,
)
def _fits(w):
    w.adapted()
    rows, config = (
        w.examples(),
        pf.TrainConfig(max_steps=3, batch_rows=3, eval_every=2, neftune=1.0, ema=0.5, accumulate=2),
    )

    def fit():
        trainer = pf.Trainer(w.model, config, rows[:9], rows[9:], out=w.out)
        result = trainer.fit()
        return result, [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history]

    return fit, (rows, config)


@case(
    "Trainer",
    "fits with recomputed blocks and packed rows",
    changes=FIT,
    halfway=FIT,
    anew=True,
    dear=True,
    look=learned,
)
def _fits_recomputed(w):
    w.adapted()
    return lambda: w.trainer(packing=True, checkpointing=True).fit(), ()


@case("Trainer", "fits all weights", changes=ALL, halfway=ALL, anew=True, dear=True, look=learned)
def _fits_all(w):
    w.model.requires_grad_(True)
    return lambda: w.trainer(weight_decay=0.1).fit(), ()


@case("Trainer", "has a loss that is not finite", changes=FIT, raises=TrainingError)
def _diverges(w):
    w.adapted()
    with torch.no_grad():
        w.model.lm_head.weight[:] = math.nan
    return lambda: w.trainer().fit(), ()


@case("TrainResult")
def _result(w):
    return lambda: pf.TrainResult(2, 1, 0.5, "max_steps", 10, 0.0, 0.5).tokens_per_s, ()


@case("evaluate")
def _evaluates(w):
    rows = w.examples()
    return lambda: evaluate(w.model, rows), (rows,)


@case("evaluate", raises=TrainingError)
def _evaluates_nan(w):
    with torch.no_grad():
        w.model.lm_head.weight[:] = math.nan
    return lambda: evaluate(w.model, w.examples()), ()


@case("estimate", dear=True)
def _estimates(w):
    del w.model.model.norm.forward  # a copy of it would compute with the weights of the original
    placements, config = {"mine": PLACEMENT, "full": None}, pf.TrainConfig(checkpointing=True)
    return lambda: estimate(w.model, placements, config, rows=2, row_tokens=7), (placements, config)
