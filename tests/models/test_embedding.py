"""Embedding rows looked up in CPU memory, on a stand-in for a card: torch's "meta" device within fake tensors.

Whatever computed on tensors of two devices there would raise an error.
"""

import copy

import pytest
import torch
import transformers
from helpers import CONFIGS, SMALL, build, everywhere
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import plopfast as pf
from plopfast.lora.shared import Prepared
from plopfast.models.embedding import HostRows, move
from plopfast.models.running import body, device_of
from plopfast.support.errors import ConfigError, ModelError
from plopfast.training import parallel
from plopfast.training.blocks import prepared_blocks
from plopfast.training.loss import Objective
from plopfast.training.neftune import neftune

CARD = torch.device("meta")


def untied(name="llama"):
    """Gemma's embedding multiplies its rows."""
    config = CONFIGS[name]()
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def on_the_card(model, embedding):
    """(fake mode, what computes its loss) of a copy without values."""
    moved = copy.deepcopy(Objective(model, recomputed=True))
    move(moved.model, CARD, embedding)
    with FakeCopyMode(mode := FakeTensorMode()):
        return mode, copy.deepcopy(moved)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_on_the_card(name):
    mode, objective = on_the_card(untied(name), "cpu")
    model = objective.model
    weight = model.get_input_embeddings().weight
    others = [p for p in model.parameters() if p is not weight]
    assert weight.device.type == "cpu" and {p.device for p in others} == {CARD} and device_of(model) == CARD
    with mode:
        pf.inject(model, everywhere(model), backend="torch")
        ids = torch.zeros(2, 9, dtype=torch.long, device=CARD)
        row, column = torch.zeros(4, dtype=torch.long, device=CARD), torch.arange(4, device=CARD)
        model.train()
        with prepared_blocks(model, pf.TrainConfig(checkpointing=True), {}), Prepared(model), neftune(model, 5.0):
            objective({"input_ids": ids, "labels": ids, "at": (row, column)}).backward()
        assert all(p.grad.device == CARD for p in model.parameters() if p.requires_grad)
        model.eval()
        with torch.no_grad():
            hidden = body(model)(input_ids=ids, use_cache=False)[0]
    assert hidden.device == CARD


def test_without_it_everything_is_on_the_card():
    model = on_the_card(untied(), "device")[1].model
    assert {p.device for p in model.parameters()} == {CARD} and not hasattr(model, "computes_on")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_rows_are_the_models_own(name):
    """Also in a copy, with the copy's weight, and where the model was moved as a whole."""
    model = untied(name)
    embedding, ids = model.get_input_embeddings(), torch.tensor([[5, 1, 299]])
    want = embedding(ids)
    embedding.forward = HostRows(embedding)
    assert torch.equal(embedding(ids), want)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    assert torch.equal(other.get_input_embeddings()(ids), 2 * want) and torch.equal(embedding(ids), want)
    model.to(torch.float64)
    assert embedding(ids).dtype == torch.float64
    want = model.generate(ids, max_new_tokens=3, do_sample=False)
    del embedding.forward
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), want)


def test_on_the_cpu_there_is_nothing_to_keep():
    model = untied()
    move(model, torch.device("cpu"), "cpu")
    assert "forward" not in vars(model.get_input_embeddings()) and device_of(model).type == "cpu"
    assert not hasattr(model, "computes_on")


def test_a_tied_head_needs_every_row(tmp_path, tokenizer):
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(ModelError, match="would save nothing, as lm_head has the same weight.*leave it out"):
        move(model, CARD, "cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)}, tie_word_embeddings=tied)
        )
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if tied:
            with pytest.raises(ModelError, match="would save nothing"):
                pf.load_model(folder, embedding="cpu")
        else:
            assert pf.load_model(folder, embedding="cpu")[0].get_input_embeddings().weight.shape[0] == len(tokenizer)
    with pytest.raises(ConfigError, match="embedding: expected one of device, cpu, got 'gpu'"):
        pf.load_model(folder, embedding="gpu")


def test_ddp_leaves_it_where_it_is(tmp_path, monkeypatch):
    """DDP takes parameters of one kind of device."""
    model = untied()
    pf.inject(model, everywhere(model))
    objective = Objective(model)
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(300, 32, device="meta"), requires_grad=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="same type of devices"):
            DistributedDataParallel(objective)
        monkeypatch.setattr(parallel, "size", lambda: 2)
        assert isinstance(parallel.averaged(objective), DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()


def test_what_excludes_it():
    for other, words in (({"full": True}, "--full trains"), ({"parallel": "fsdp"}, "--parallel fsdp")):
        with pytest.raises(ConfigError, match=f"{words}.*leave one of them out"):
            pf.RunConfig(embedding="cpu", **other)
