"""EVA's vectors: the streamed sketch against the float64 SVD of every counted input, and what goes wrong."""

import copy
import json
import re

import pytest
import torch
from helpers import (
    Odd,
    Syncs,
    exact_inputs,
    logits,
    random_batches,
    randomise,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file

import plopfast as pf
from plopfast.cli import main
from plopfast.data.batches import batches_of
from plopfast.data.rows import DEMO
from plopfast.lora.layer import adapters
from plopfast.models.linears import LinearInfo
from plopfast.scoring import eva, nfn
from plopfast.support.errors import ConfigError, DataError, FileError, ModelError, PlacementError


def captured(rows, x):
    """What `rows` capture of ||X||_F^2, as a share of what as many right singular vectors of X do."""
    assert rows.dtype == torch.float32 and rows.shape == (len(rows), x.shape[1])
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(x)[: len(rows)].square().sum()
    return ((x @ rows.double().T).square().sum() / best).item()


def same_subspace(one, two):
    """True where the largest principal angle is below 0.1 degrees."""
    return torch.linalg.svdvals(one.double() @ two.double().T).min() > 0.9999985


def sketch_of(batches, rank=2, n_in=600):
    info = LinearInfo("m", torch.nn.Linear(n_in, 4), "m", 0, n_in, 4, False)
    sketch = eva.InputSketch(rank, [info])
    for x in batches:
        sketch.add("m", x, x.norm(dim=1), torch.ones(len(x), dtype=torch.bool))
    return sketch


def power_law(tokens=400, n_in=600):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, n_in, generator=generator) * torch.arange(1, n_in + 1) ** -0.5


def test_every_architecture_matches_the_svd(any_model):
    batches = random_batches()
    plain, report = pf.score(any_model, batches), pf.score(any_model, batches, eva_rank=4)
    assert report.modules == plain.modules and not plain.eva and report.eva.keys() == report.modules.keys()
    for name, x in exact_inputs(any_model, batches, report.eva).items():
        assert captured(report.eva[name], x) > 0.99999, name
        values = torch.linalg.svdvals(x).square()
        torch.testing.assert_close(report.eva_ratios[name].double(), values[:4] / values.sum(), rtol=1e-3, atol=1e-5)
        u = torch.linalg.svd(x)[2][0]
        assert abs(report.eva[name][0].double() @ u) > 0.9999, "the leading one comes first"


def test_two_layers_of_the_default_model(default_model, monkeypatch):
    """Those whose MLP inputs have the flattest spectrum of all, where the sketch is at its worst."""
    model, tokenizer = default_model
    monkeypatch.setitem(model.model._modules, "layers", model.model.layers[:5])
    batches = batches_of(pf.tokenize(pf.read_jsonl(DEMO["train"])[:24], tokenizer), 8)
    report = pf.score(model, batches, eva_rank=16, skip_bos=False)
    names = [f"model.layers.{i}.{m}" for i in (3, 4) for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    for name, x in exact_inputs(model, batches, names, skip_bos=False).items():
        assert captured(report.eva[name], x) > 0.99, name


def test_several_calls_and_other_shapes():
    torch.manual_seed(0)
    model = Odd()
    batches = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in random_batches()]
    report = pf.score(model, batches, skip_bos=False, eva_rank=3)
    for name, x in exact_inputs(model, batches, report.eva, skip_bos=False).items():
        assert captured(report.eva[name], x) > 0.99999, name


def test_sketch_narrower_than_the_input():
    x = power_law()
    rows, ratios = (value["m"] for value in sketch_of(x.split(100)).vectors())
    assert captured(rows, x.double()) > 0.99
    share = torch.linalg.svdvals(x.double())[:2].square().sum() / x.double().square().sum()
    assert 0.95 * share < ratios.sum() <= share * 1.0001, "a lower bound"


def test_order_and_splits_of_the_batches_make_no_difference(llama):
    x = power_law()
    first = sketch_of(x.split(100)).vectors()[0]["m"]
    for batches in (x.split(100)[::-1], x.split(37), [x]):
        assert same_subspace(first, sketch_of(batches).vectors()[0]["m"])
    batches = random_batches()
    one, two = pf.score(llama, batches, eva_rank=2).eva, pf.score(llama, batches[::-1], batch_tokens=30, eva_rank=2).eva
    for name, x in exact_inputs(llama, batches, one).items():
        assert captured(two[name], x) == pytest.approx(captured(one[name], x), abs=1e-6)


def test_padding_never_counts(llama):
    batch = random_batches(count=1)[0]
    changed = {k: v.clone() for k, v in batch.items()}
    changed["input_ids"][changed["attention_mask"] == 0] = 77
    one, two = pf.score(llama, [batch], eva_rank=3).eva, pf.score(llama, [changed], eva_rank=3).eva
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shared_inputs_are_sketched_once(llama, monkeypatch):
    added = []
    add = eva.InputSketch.add
    monkeypatch.setattr(eva.InputSketch, "add", lambda self, name, *rest: added.append(name) or add(self, name, *rest))
    report = pf.score(llama, random_batches(count=1), eva_rank=2)
    assert [name.rpartition(".")[2] for name in added] == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 3
    for layer in range(3):
        at = f"model.layers.{layer}."
        q, k, gate, up = (report.eva[at + n] for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"))  # fmt: skip
        assert q is k and gate is up and q is not gate


@pytest.mark.parametrize("calls", ["ab b", "ab a", "ab a cb"])
def test_inputs_shared_only_sometimes_are_an_error(calls):
    """Each word is an input and the modules that have it; in the last case b and a have as many calls."""
    info = LinearInfo("a", torch.nn.Linear(8, 8), "a", 0, 8, 8, False)
    sketch, counted = eva.InputSketch(2, [info]), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ModelError, match="^b: "):
        for number, (first, *others) in enumerate(calls.split()):
            x = torch.arange(40.0).view(5, 8).sin() + number
            sketch.add(first, x, x.norm(dim=1), counted)
            for other in others:
                sketch.share(other)
        sketch.vectors()


def test_memory_does_not_grow_with_the_tokens():
    def size(sketch):
        tensors = [*sketch.tests.values(), *sketch.sketches.values(), *sketch.energies.values()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    few, many = (size(sketch_of([power_law(n)] * 3)) for n in (10, 2000))
    assert few == many == 2 * 600 * (8 * 2 + 64) * 4 + 4


@pytest.mark.parametrize("token", [torch.randn(1, 600, generator=torch.Generator().manual_seed(0)), torch.eye(1, 600)])
def test_few_distinct_tokens_still_give_orthonormal_rows(token):
    x = token.repeat(5, 1)
    rows, ratios = (value["m"] for value in sketch_of([x], rank=4).vectors())
    assert captured(rows, x.double()) > 0.99999
    torch.testing.assert_close(ratios, torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=1e-4)


def test_no_wait_for_the_device_inside_the_loop():
    sketch = sketch_of([torch.randn(3, 8)], n_in=8)  # the first batch draws the test matrix
    state = nfn.NFNState(torch.ones(1), sketch=sketch)
    hook = state.hook(0, "m", None)
    with Syncs() as syncs:
        for _ in range(2):
            state.open(torch.ones(2, 5, dtype=torch.bool))
            hook(torch.nn.Identity(), (torch.randn(2, 5, 8),), torch.randn(2, 5, 8))
            state.close()
    assert syncs.count == 0


def test_bfloat16_inputs(llama):
    batches = random_batches()
    report = pf.score(llama.bfloat16(), batches, eva_rank=2)
    for name, x in exact_inputs(llama, batches, report.eva).items():
        assert captured(report.eva[name], x) > 0.999, name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eva_rank": 33}, ConfigError, r"eva_rank 33: expected 1 to 32, the inputs of model.layers.0"),
        ({"eva_rank": 0}, ConfigError, "eva_rank 0: expected 1 to 32"),
        ({"eva_rank": 5}, DataError, "eva_rank 5: expected at most 3, the tokens scored"),
        ({"eva_rank": 2, "compat": "official"}, ConfigError, "counts padding, EVA does not"),
    ],
)
def test_impossible_ranks(llama, options, error, message):
    with pytest.raises(error, match=message):
        pf.score(llama, [{"input_ids": [[5, 6, 7]]}], **options)


def test_injected_rows_and_peft(any_model, tmp_path):
    """Ranks that differ; the trained adapter gives PEFT's model the same logits, with nothing but its two files."""
    base = copy.deepcopy(any_model)
    report = pf.score(any_model, random_batches(), eva_rank=4)
    ranks = {name: (4 if i % 2 else 3, 8.0) for i, name in enumerate(report.eva)}
    plain = logits(any_model)
    pf.inject(any_model, pf.Placement(ranks, [], "", 0), init="eva", eva=report.eva)
    torch.testing.assert_close(logits(any_model), plain)  # B = 0
    for name, module in adapters(any_model).items():
        assert torch.equal(module.lora_A, report.eva[name][: module.rank]) and not module.lora_B.any()
        assert module.lora_A.requires_grad and module.lora_A.untyped_storage().nbytes() == module.lora_A.numel() * 4
    randomise(any_model)
    pf.save_adapter(any_model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True and "eva_config" not in settings
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(any_model), rtol=1e-5, atol=1e-5)


def test_vectors_that_do_not_fit(llama):
    vectors = pf.score(llama, random_batches(), eva_rank=2).eva
    name = "model.layers.0.mlp.down_proj"  # 48 -> 32
    placement = pf.Placement({name: (2, 4.0)}, [], "", 0)
    wrong = {name: torch.zeros(2, 64)}
    for given, rank, message in (
        ({}, 2, r"down_proj: expected EVA vectors \[rank, 48\], got none; were they made for another model"),
        (wrong, 2, r"down_proj: expected EVA vectors \[rank, 48\], got \[2, 64\]"),
        (vectors, 3, "down_proj: rank 3 needs as many EVA vectors, got 2; score with eva_rank=3"),
    ):
        with pytest.raises(PlacementError, match=message):
            pf.inject(llama, pf.Placement({name: (rank, 4.0)}, [], "", 0), init="eva", eva=given)
    with pytest.raises(ConfigError, match="go together, got no vectors"):
        pf.inject(llama, placement, init="eva")
    with pytest.raises(ConfigError, match="go together, got vectors with init='gaussian'"):
        pf.inject(llama, placement, init="gaussian", eva=vectors)
    assert not adapters(llama) and all(p.requires_grad for p in llama.parameters()), "nothing is changed"


def test_files(llama, tmp_path):
    report = pf.score(llama, random_batches(), eva_rank=2)
    path = tmp_path / "eva.safetensors"
    eva.save(path, report.eva, report.eva_ratios)
    for kept, loaded in zip((report.eva, report.eva_ratios), eva.load(path), strict=True):
        assert kept.keys() == loaded.keys() and all(torch.equal(kept[name], loaded[name]) for name in kept)
    report.save(tmp_path / "scores.json")
    assert "eva" not in json.loads((tmp_path / "scores.json").read_text()) and report.eva
    assert pf.NFNReport.load(tmp_path / "scores.json").modules == report.modules
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileError, match="truncated or not a safetensors file"):
        eva.load(path)
    save_file({"lora": torch.zeros(2)}, path)
    with pytest.raises(FileError, match="unexpected tensor 'lora'"):
        eva.load(path)
    with pytest.raises(FileError, match="no such file; it is written by plopfast score --init eva"):
        eva.load(tmp_path / "absent")


def test_the_pipeline(model_folder, tmp_path, capsys):
    def plopfast(*arguments):
        return main.main([*map(str, arguments), "--out", str(tmp_path / "run")])

    for split, count in (("train", 30), ("valid", 4)):
        (tmp_path / split).write_text("".join(line + "\n" for line in DEMO[split].read_text().splitlines()[:count]))
    settings = ["--model", model_folder, "--train", tmp_path / "train", "--valid", tmp_path / "valid"]
    assert plopfast("score", *settings, "--rank", 2, "--score-prompts", 4) == 0
    assert not (tmp_path / "run" / "eva.safetensors").exists(), "kaiming takes none"
    assert plopfast("score", "--init", "eva", "--overwrite") == 0
    assert plopfast("place") == 0
    training = ["train", "--max-steps", 1, "--lr", 1e-9, "--warmup", 0]
    assert plopfast(*training) == 0
    vectors = eva.load(tmp_path / "run" / "eva.safetensors")[0]
    for key, tensor in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        if name.endswith("lora_A"):
            torch.testing.assert_close(tensor, vectors[name.removesuffix(".lora_A")], rtol=0, atol=1e-6)
    capsys.readouterr()
    assert plopfast(*training, "--resume", "--init", "gaussian") == 2
    assert "began with other inputs: init was eva, is gaussian" in capsys.readouterr().err
    assert plopfast("place", "--budget", "match:all:r3", "--overwrite") == 2
    assert re.search(r"ranks up to \d, but scoring keeps EVA's vectors for --rank 2", capsys.readouterr().err)
    assert plopfast("place", "--rank", 3, "--overwrite") == 0, "what was refused is not kept"
    assert plopfast(*training, "--overwrite") == 2
    assert "rank 3 needs as many EVA vectors, got 2" in capsys.readouterr().err
    assert plopfast("score", "--init", "kaiming", "--overwrite") == 0
    assert plopfast(*training, "--init", "eva", "--overwrite") == 2
    assert "eva.safetensors: no such file" in capsys.readouterr().err
