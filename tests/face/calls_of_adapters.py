"""Calls of models and adapters, returning and raising, each with what it is there to change."""

import math

import torch
from face_world import ADAPTED, ATTENTION, DOWN, FROZEN, PLACEMENT, WRAPPED, case, seen_of

import plopfast as pf
from plopfast.lora.layer import adapters, disabled
from plopfast.lora.merging import merge_checked
from plopfast.lora.shared import find_shared_inputs
from plopfast.models.loading import load_tokenizer
from plopfast.models.running import check_packing
from plopfast.support.errors import (
    AdapterError,
    ConfigError,
    FileError,
    ModelError,
    PlacementError,
)

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
    return lambda: pf.LoRALinear(base, 3, 1.5, dropout=0.1, rslora=True, dora=True, lora_A=first), (first,)


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


CHOICES = r"^model .* \._(turn|taken)$"  # what ManyLoRA remembers of the last choice
MERGED = r"^model .* (\.(merged|before_merge)|parameter weight values)$"


def _named(w):
    """Two adapters with names, one of them on fewer modules."""
    for name, modules in (("a", ADAPTED), ("b", {DOWN: ADAPTED[DOWN]})):
        pf.inject(w.model, pf.Placement(modules, [], "explicit", 0), name=name)
        for module in adapters(w.model, name).values():
            torch.nn.init.normal_(module.lora_B, std=0.1)
    return w.model.eval(), w.batches[0]["input_ids"]


@case("inject", "with a name", changes=[WRAPPED, FROZEN])
def _injects_with_a_name(w):
    return lambda: pf.inject(w.model, PLACEMENT, name="a"), (PLACEMENT,)


@case("inject", "a second name", raises=AdapterError)
def _a_name_twice(w):
    _named(w)
    return lambda: pf.inject(w.model, PLACEMENT, name="a"), (PLACEMENT,)


@case("active", changes=[CHOICES], halfway=[CHOICES])
def _rows_take_their_own(w):
    model, ids = _named(w)
    names = ["a", None, "b", pf.Use("a", without=["down_proj"])]

    def run():
        with pf.active(model, names), torch.no_grad():
            return model(input_ids=ids).logits

    return run, (names,)


@case("active", raises=AdapterError)
def _an_unknown_adapter(w):
    model, _ = _named(w)
    return lambda: pf.active(model, ["a", "c"]).__enter__(), ()


@case("Use")
def _what_a_row_takes(w):
    return lambda: (pf.Use("a", without=["mlp"]).leaves_out(DOWN), pf.Use("a").leaves_out(DOWN)), ()


@case("merge_adapter", changes=[MERGED])
def _merges_for_a_while(w):
    model, _ = _named(w)
    return lambda: pf.merge_adapter(model, "a"), ()


@case("merge_adapter", raises=AdapterError)
def _merges_an_unknown_adapter(w):
    model, _ = _named(w)
    return lambda: pf.merge_adapter(model, "c"), ()


@case("unmerge_adapter", changes=[MERGED], halfway=[MERGED])
def _unmerges(w):
    model, _ = _named(w)
    pf.merge_adapter(model, "a")
    return lambda: pf.unmerge_adapter(model), ()


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


@case("lora_linear_grouped")
def _applies_several(w):
    tensors = _tensors()
    x, weight, a, b, bias = tensors
    lists = [a, None, a], [b, None, b], [0, 5, 6, 12], [0.7, 0.0, 2.0], [0.3, 0.0, 0.0], [5, None, None]
    run = lambda: pf.lora_linear_grouped(x, weight, *lists[:4], bias=bias, dropout_ps=lists[4], seeds=lists[5])  # noqa: E731
    return run, (*tensors, *lists)


@case("lora_linear_grouped", raises=ValueError)
def _cut_beyond_the_rows(w):
    x, weight, a, b, _ = _tensors()
    return lambda: pf.lora_linear_grouped(x, weight, [a], [b], [0, 13], [0.7]), (x, weight, a, b)


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
    path = w.saved_adapter(layer_replication=[[0, 1]])
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
    return lambda: (str(PLACEMENT), PLACEMENT.peft_config(), PLACEMENT.lora_config()), (PLACEMENT,)


@case("Placement", raises=FileError)
def _is_damaged(w):
    path = w.folder / "placement.json"
    path.write_text('{"plopfast": "placement", "modules": {}}')
    return lambda: pf.Placement.load(path), ()
