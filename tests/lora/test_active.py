"""Several adapters on one base: what each row of a batch takes, modules that are switched off, merged or not."""

import copy

import pytest
import torch
from helpers import build, everywhere, random_batches
from zoo import families

import plopfast as pf
from plopfast.lora.active import merge_adapter, unmerge_adapter
from plopfast.lora.layer import adapters, disabled
from plopfast.lora.many import ManyLoRA, adapter_names
from plopfast.models.experts import expert_weights
from plopfast.support.errors import AdapterError, ConfigError, PlacementError


def place(model, *types, rank=4, alpha=8.0):
    modules = {info.name: (rank, alpha) for info in pf.linear_modules(model) if not types or info.type in types}
    return pf.Placement(modules, [], "some", 0)


@torch.no_grad()
def filled(model, name=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in adapters(model, name).values():
        module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.1)


def several(architecture="llama", dtype=torch.float32):
    """A model with adapters of other ranks, modules and scalings; `c` is DoRA's."""
    model = build(architecture).to(dtype)
    pf.inject(model, place(model, rank=4), name="a", seed=1)
    types = sorted({info.type for info in pf.linear_modules(build(architecture))})
    pf.inject(model, place(build(architecture), *types[::2], rank=7, alpha=3.0), name="b", seed=2, rslora=True)
    for number, name in enumerate("ab"):
        filled(model, name, number)
    return model


@torch.no_grad()
def run(model, batch, *rows):
    rows = list(rows) or slice(None)
    return model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows]).logits


@pytest.fixture
def batch():
    return random_batches(count=1, rows=5, longest=12)[0]


ROWS = ["a", "b", None, "a", "b"]


def test_each_row_takes_its_own_adapter(any_model, batch):
    model = several(any_model.config.model_type.removesuffix("_text"))
    with pf.active(model, ROWS):
        mixed = run(model, batch)
    for row, name in enumerate(ROWS):
        with pf.active(model, name):
            torch.testing.assert_close(mixed[row : row + 1], run(model, batch, row), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], mixed[2], atol=1e-2)


def test_one_name_gives_what_the_adapter_alone_gives(llama, batch):
    alone = build("llama")
    pf.inject(alone, place(alone, rank=4), seed=1)
    filled(alone)
    model = several()
    with pf.active(model, "a"):
        torch.testing.assert_close(run(model, batch), run(alone, batch), rtol=0, atol=0)
    with pf.active(model, None):
        torch.testing.assert_close(run(model, batch), run(llama, batch), rtol=0, atol=0)


def test_gradients_of_a_mixed_batch_are_those_of_each_row(batch):
    model = several()
    ids = batch["input_ids"]

    def gradients(rows, names):
        model.zero_grad()
        with pf.active(model, names):
            model(input_ids=ids[rows], attention_mask=batch["attention_mask"][rows]).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    mixed = gradients(list(range(5)), ROWS)
    total = {}
    for row, name in enumerate(ROWS):
        if name is not None:
            for key, value in gradients([row], [name]).items():
                total[key] = total.get(key, 0) + value
    assert mixed.keys() == total.keys()
    for key in mixed:
        assert (mixed[key] - total[key]).norm() <= 1e-4 * total[key].norm() + 1e-7, key
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("part", ["mlp", "q_proj", "layers.1", "model.layers.0.self_attn.v_proj"])
@pytest.mark.parametrize("merged", [False, True])
def test_modules_are_switched_off_for_some_rows(batch, part, merged):
    """As if these modules had no adapter at all."""
    model = several()
    less = copy.deepcopy(model)
    for name, module in adapters(less, "a").items():
        if f".{part}." in f".{name}.":
            with torch.no_grad():
                module.lora_B.zero_()
    if merged:
        merge_adapter(model, "a")
    with pf.active(model, ["a", pf.Use("a", without=[part]), "b", pf.Use("a", without=(part,)), None]):
        got = run(model, batch)
    for row, (name, of) in enumerate([("a", model), ("a", less), ("b", less), ("a", less), (None, less)]):
        with pf.active(of, name):
            want = run(of, batch, row)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)
    with pf.active(model, "a", without=[part]), pf.active(less, "a"):
        torch.testing.assert_close(run(model, batch), run(less, batch), rtol=1e-4, atol=1e-4)


def peft_of(model, folders):
    """PEFT's model with the same adapters, read from the files."""
    import peft

    wrapped = None
    for name, folder in folders.items():
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            wrapped.load_adapter(folder, adapter_name=name)
    return wrapped.eval()


@pytest.mark.parametrize("merged", [None, "a", "b"])
def test_logits_are_pefts(any_model, batch, tmp_path, merged):
    architecture = any_model.config.model_type.removesuffix("_text")
    model = several(architecture)
    folders = {name: pf.save_adapter(model, tmp_path / name, name=name) for name in "ab"}
    theirs = peft_of(build(architecture), folders)
    names = ["__base__" if name is None else name for name in ROWS]
    with torch.no_grad():
        want = theirs(**{k: batch[k] for k in ("input_ids", "attention_mask")}, adapter_names=names).logits
    if merged:
        merge_adapter(model, merged)
    with pf.active(model, ROWS):
        torch.testing.assert_close(run(model, batch), want, rtol=1e-4, atol=1e-4)
    with theirs.disable_adapter(), disabled(model), torch.no_grad():
        want = theirs(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
        torch.testing.assert_close(run(model, batch), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_modules_that_are_off_are_as_an_adapter_of_pefts_without_them(architecture, merged, batch, tmp_path):
    model = several(architecture)
    less = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in adapters(less, "a").items():
            module.lora_B *= ".mlp." not in name
    folders = {
        "a": pf.save_adapter(model, tmp_path / "a", name="a"),
        "less": pf.save_adapter(less, tmp_path / "less", name="a"),
    }
    theirs, names = peft_of(build(architecture), folders), ["a", "less", "__base__", "less", "a"]
    with torch.no_grad():
        want = theirs(**{k: batch[k] for k in ("input_ids", "attention_mask")}, adapter_names=names).logits
    if merged:
        merge_adapter(model, "a")
    off = pf.Use("a", without=["mlp"])
    with pf.active(model, ["a", off, None, off, "a"]):
        torch.testing.assert_close(run(model, batch), want, rtol=1e-4, atol=1e-4)


def test_files_come_back_under_any_name(batch, tmp_path):
    model = several()
    for name in "ab":
        pf.save_adapter(model, tmp_path / name, name=name)
    other = build("llama")
    pf.load_adapter(other, tmp_path / "b", name="one")
    pf.load_adapter(other, tmp_path / "a", name="two.with/odd name")
    assert {*adapter_names(other)} == {"one", "two.with/odd name"}
    with pf.active(model, "a"), pf.active(other, "two.with/odd name"):
        torch.testing.assert_close(run(other, batch), run(model, batch), rtol=0, atol=0)
    alone = build("llama")
    pf.load_adapter(alone, tmp_path / "b")
    with pf.active(model, "b"):
        torch.testing.assert_close(run(alone, batch), run(model, batch), rtol=0, atol=0)


def test_merging_is_undone_bit_for_bit(batch):
    for dtype in (torch.float32, torch.bfloat16):
        model = several(dtype=dtype)
        before = {n: p.clone() for n, p in model.named_parameters()}
        names = merge_adapter(model, "a")
        assert names == list(adapters(model, "a"))
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert len(changed) == len(names)
        unmerge_adapter(model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        merge_adapter(model, "b")
        pf.unload(model, "b")
        assert adapter_names(model) == ["a"]
        pf.unload(model)
        assert not any(isinstance(module, ManyLoRA) for module in model.modules())
        plain = build("llama").to(dtype)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_dora_and_dropout_go_with_others(batch):
    model = several()
    pf.inject(model, place(build("llama"), "q_proj", "up_proj"), name="c", dora=True, seed=3)
    filled(model, "c", 5)
    rows = ["c", "a", "c", None, "b"]
    with pf.active(model, rows):
        mixed = run(model, batch)
    for row, name in enumerate(rows):
        with pf.active(model, name):
            torch.testing.assert_close(mixed[row : row + 1], run(model, batch, row), rtol=1e-4, atol=1e-4)
    for name in "ca":  # a's update could not be taken off again below c's lengths
        with pytest.raises(AdapterError, match="'c' is DoRA's.*no update can be taken off"):
            merge_adapter(model, name)
    assert merge_adapter(several(), "a")


def test_generation_of_rows_with_several_adapters(batch):
    model = several()
    ids = batch["input_ids"][:3, :4].clamp_min(3)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with pf.active(model, ["a", None, "b"]):
        mixed = model.generate(ids, **options)
    for row, name in enumerate(["a", None, "b"]):
        with pf.active(model, name):
            alone = model.generate(ids[row : row + 1], **{**options, "attention_mask": torch.ones_like(ids[:1])})
        assert mixed[row].tolist() == alone[0].tolist()
    with pf.active(model, ["a", None, "b"]), pytest.raises(AdapterError, match="3 rows, and the batch has 6"):
        model.generate(ids, **options, num_beams=2)
    with pf.active(model, ["a", "a", None, None, "b", "b"]):
        assert model.generate(ids, **options, num_beams=2).shape[0] == 3


def test_nobody_chosen_is_an_error_and_contexts_nest(batch):
    model = several()
    with pytest.raises(AdapterError, match=r"names \(a, b\), and none was chosen.*pf.active"):
        run(model, batch)
    with pf.active(model, "a"):
        outer = run(model, batch)
        with pf.active(model, "b"):
            inner = run(model, batch)
        torch.testing.assert_close(run(model, batch), outer, rtol=0, atol=0)
        with disabled(model):
            torch.testing.assert_close(run(model, batch), run(build("llama"), batch), rtol=0, atol=0)
    assert not torch.allclose(outer, inner, atol=1e-2)
    with pytest.raises(AdapterError, match="none was chosen"):
        run(model, batch)


@pytest.mark.parametrize(
    ("names", "without", "message"),
    [
        ("x", (), "unknown adapter 'x'; the model has a, b"), (["a", "bb"], (), "unknown adapter 'bb'; did you mean 'b'"),
        ([], (), "expected a name, or one for each row, got none"), ("a", "mlp", r"write \['mlp'\]"),
        (pf.Use("a", without="mlp"), (), r"write \['mlp'\]"),
        ("a", ["nothing"], "'nothing' is no module of adapter 'a'; its types are .*down_proj.*q_proj"),
        (["a", pf.Use("b", without=["layers.9"])], (), "'layers.9' is no module of adapter 'b'"),
    ],
)  # fmt: skip
def test_bad_choices(names, without, message):
    model = several()
    with pytest.raises(AdapterError, match=message), pf.active(model, names, without=without):
        pass


def test_what_answers_stays(batch):
    """Otherwise its rows would have the base's answers, and nobody would know."""
    model = several()
    with pf.active(model, ["a", "a", None, None, None]):
        for name in ("a", None):
            with pytest.raises(AdapterError, match="'a' answers rows now"):
                pf.unload(model, name)
        with pf.active(model, "b"), pytest.raises(AdapterError, match="'a' answers rows now"):
            pf.unload(model, "a")  # which it does again in a moment
        pf.unload(model, "b")
        run(model, batch)
    assert pf.unload(model, "a")


def test_a_batch_of_other_rows_is_refused(batch):
    model = several()
    with pf.active(model, ["a", "b"]), pytest.raises(AdapterError, match="named for 2 rows, and the batch has 5"):
        run(model, batch)
    with pf.active(model, ["a", "a"]), pytest.raises(AdapterError, match="named for 2 rows, and the batch has 5"):
        run(model, batch)


def test_bad_injections(tmp_path, batch):
    model = several()
    before = {n: p.clone() for n, p in model.named_parameters()}
    pf.save_adapter(model, tmp_path / "a", name="a")
    other = place(build("llama"))
    for call, message in (
        (lambda: pf.inject(model, other, name="a"), "has an adapter 'a' already"),
        (lambda: pf.inject(model, other), r"adapters with names \(a, b\) already"),
        (lambda: pf.load_adapter(model, tmp_path / "a", name="b"), "has an adapter 'b' already"),
        (lambda: pf.load_adapter(model, tmp_path / "a"), "with names .* already"),
        (lambda: pf.inject(model, other, name=""), "name of an adapter: expected a name"),
        (lambda: pf.inject(model, other, name=3), "name of an adapter: expected a text, got 3"),
        (lambda: pf.inject(model, other, name="a\x1b"), "control characters"),
        (lambda: pf.save_adapter(model, tmp_path / "x"), r"one of the model's adapters \(a, b\), got None"),
        (lambda: pf.save_adapter(model, tmp_path / "x", name="c"), r"\(a, b\), got 'c'"),
        (lambda: merge_adapter(model, "c"), "unknown adapter 'c'"),
        (lambda: pf.merge(model), r"adapters with names \(a, b\): merge_adapter"),
    ):
        with pytest.raises(AdapterError, match=message):
            call()
    with pytest.raises(PlacementError, match="q_proj.base', which is not .*before any adapter is put in"):
        pf.inject(model, everywhere(model), name="c")  # the modules would be inside those of a
    assert adapter_names(model) == ["a", "b"] and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    merge_adapter(model, "a")
    for call in (
        lambda: merge_adapter(model, "b"),
        lambda: pf.inject(model, other, name="c"),
        lambda: pf.save_adapter(model, tmp_path / "x", name="b"),
    ):
        with pytest.raises(AdapterError, match="unmerge_adapter"):
            call()
    unnamed = build("llama")
    pf.inject(unnamed, everywhere(unnamed))
    with pytest.raises(AdapterError, match="has LoRA adapters already"):
        pf.inject(unnamed, everywhere(build("llama")), name="a")
    with pytest.raises(AdapterError, match="no adapters with names"), pf.active(unnamed, "a"):
        pass
    assert not (tmp_path / "x").exists()


def test_a_failure_half_way_takes_only_its_own_name_out(monkeypatch):
    from plopfast.lora import injection

    model, made = several(), []

    class Failing(injection.NamedLoRA):
        def __init__(self, *args, **kwargs):
            made.append(args)
            if len(made) == 5:
                raise MemoryError
            super().__init__(*args, **kwargs)

    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    monkeypatch.setattr(injection, "NamedLoRA", Failing)
    with pytest.raises(MemoryError):
        pf.inject(model, place(build("llama")), name="c")
    assert adapter_names(model) == ["a", "b"] and before == [(n, p.requires_grad) for n, p in model.named_parameters()]


class Turned(torch.nn.Module):
    """Reads the rows of a batch token by token."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1).contiguous()).transpose(0, 1)


def test_a_model_that_mixes_its_rows_is_refused(batch):
    """Its rows cannot have adapters of their own, whatever the shapes say."""
    model = several()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Turned(mlp.down_proj)
    with (
        pytest.raises(AdapterError, match=r"down_proj of this LlamaForCausalLM does not read the rows"),
        pf.active(model, ["a", "b"]),
    ):
        pass
    with pf.active(model, "a"):
        run(model, batch)


def test_modules_that_come_later_are_looked_at(batch):
    """Of an adapter that is put in after the rows of a batch had adapters of their own."""
    model = build("llama")
    pf.inject(model, place(model, "q_proj"), name="a")
    pf.inject(model, place(build("llama"), "k_proj"), name="b")
    with pf.active(model, ["a", "b"]):
        pass
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Turned(mlp.down_proj)
    down = pf.Placement({"model.layers.0.mlp.down_proj.inner": (2, 4.0)}, [], "one", 0)
    pf.inject(model, down, name="c")
    with pytest.raises(AdapterError, match="does not read the rows"), pf.active(model, ["a", "c"]):
        pass


def test_parts_of_names_are_whole_parts():
    """layers.1 is not layers.11, and proj no part of a name."""
    assert pf.Use("a", without=["layers.1"]).leaves_out("model.layers.1.mlp.down_proj")
    assert not pf.Use("a", without=["layers.1", "proj", "down"]).leaves_out("model.layers.11.mlp.down_proj")


def test_what_replaces_whole_has_no_name(tmp_path):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"replaces lm_head\.weight whole, .*without a name"):
        pf.load_adapter(build("llama"), tmp_path / "theirs", name="a")


def test_experts_have_no_names():
    model = families.build("mixtral")
    chosen = {info.name: (2, 4.0) for info in expert_weights(model)}
    with pytest.raises(ConfigError, match="adapters of experts have no --name"):
        pf.inject(model, pf.Placement(chosen, [], "explicit", 0), name="a")
