"""Accelerated models under the Hugging Face Trainer and TRL's SFTTrainer: the same losses and adapters, fewer logits."""

import datasets
import peft
import pytest
import torch
import transformers
import trl
from helpers import build
from peft_twins import BATCH, LORA, assert_equal, filled, logits, results, twins, wrapped
from torch.utils._python_dispatch import TorchDispatchMode

import plopfast as pf
from plopfast.integrations import peft_loss
from plopfast.integrations.peft_loss import LossForward, LossOutput

SETTINGS = {
    "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "seed": 0, "use_cpu": True, "report_to": "none",
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


class Largest(TorchDispatchMode):
    """The most values of any tensor that is made while it lasts."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **keywords or {})
        self.values = max(self.values, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


@pytest.fixture
def chunked(monkeypatch):
    """The numbers of tokens whose loss was computed by chunks."""
    counts, plain = [], peft_loss.chunked_cross_entropy
    count = lambda hidden, *args, **kw: (counts.append(len(hidden)), plain(hidden, *args, **kw))[1]  # noqa: E731
    monkeypatch.setattr(peft_loss, "chunked_cross_entropy", count)
    return counts


def rows(examples):
    labels = [[t if on else -100 for t, on in zip(e.tokens, e.is_learned(), strict=True)] for e in examples]
    return datasets.Dataset.from_dict({"input_ids": [list(e.tokens) for e in examples], "labels": labels})


def trained(kind, fast, tokenizer, examples, folder, wrap_first=True, **settings):
    """(losses, adapter, evaluation's loss, the trainer)"""
    model = filled(peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA)))
    if fast and wrap_first:
        pf.accelerate(model)
    data = {"train_dataset": rows(examples[:24]), "eval_dataset": rows(examples[24:30]), "processing_class": tokenizer}
    arguments = SETTINGS | {"output_dir": str(folder)} | settings
    if kind == "sft":
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**arguments), **data)
    else:
        collator = transformers.DataCollatorForSeq2Seq(tokenizer)
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**arguments), collator, **data)
    trainer.remove_callback(transformers.PrinterCallback)
    if fast and not wrap_first:
        assert not pf.accelerate(trainer.model).loss
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
    return losses, adapter, trainer.evaluate()["eval_loss"], trainer


WAYS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "autocast": {"bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_under_the_trainer(way, tokenizer, examples, tmp_path, chunked):
    losses, adapter, evaluated, _ = trained("hf", False, tokenizer, examples, tmp_path, **WAYS[way])
    ours, ours_adapter, ours_evaluated, trainer = trained("hf", True, tokenizer, examples, tmp_path, **WAYS[way])
    close = 2e-2 if way == "autocast" else 1e-4
    assert ours == pytest.approx(losses, rel=close)
    assert ours_evaluated == pytest.approx(evaluated, rel=close)
    assert_equal(ours_adapter, adapter, within=0.2 if way == "autocast" else 1e-4)  # AdamW takes signs
    with_labels = 0 if way == "label smoothing" else 6 if way == "accumulated" else 3
    assert len(chunked) == 1 + with_labels, "in each micro-batch with labels, once to compare, and never in evaluation"
    labels = sum(len([label for label in row[1:] if label != -100]) for row in rows(examples[:24])["labels"])
    assert sum(chunked[1:]) < labels, "three batches of 4 rows"
    assert trainer._signature_columns[:1] == ["input_ids"] and "labels" in trainer._signature_columns


@pytest.mark.parametrize("wrap_first", [True, False])
def test_under_sft_trainer_its_own_loss_stays(wrap_first, tokenizer, examples, tmp_path, chunked):
    losses, adapter, evaluated, _ = trained("sft", False, tokenizer, examples, tmp_path)
    found = trained("sft", True, tokenizer, examples, tmp_path, wrap_first=wrap_first)
    assert found[0] == pytest.approx(losses, rel=1e-4)
    assert found[2] == pytest.approx(evaluated, rel=1e-4)
    assert_equal(found[1], adapter, within=1e-4)
    assert len(chunked) == wrap_first, "once to compare, where TRL has not put its own there yet"
    if not wrap_first:
        assert "trl.trainer" in pf.accelerate(found[3].model).left["loss"]


def test_sft_trainer_wraps_the_model_itself(tokenizer, examples, tmp_path):
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS)
    config = peft.LoraConfig(**LORA)
    data = {"train_dataset": rows(examples[:12]), "processing_class": tokenizer}
    trainer = trl.SFTTrainer(build("llama"), arguments, **data, peft_config=config)
    assert len(pf.accelerate(trainer.model).linears) == 21
    trainer.train()
    assert pf.restore(trainer.model)


def test_no_more_logits_than_are_labelled():
    """A step makes no tensor of all positions' logits."""
    largest = []
    for model in twins():
        batch = {name: value[:, :12] for name, value in BATCH.items()}
        batch["labels"] = torch.where(torch.arange(12) > 9, batch["input_ids"], -100)
        model.train()
        with Largest() as mode:
            model(**batch).loss.backward()
        largest.append(mode.values)
    assert largest[0] == 4 * 12 * 300
    assert largest[1] == 300 * 32, "the embedding's size"


def test_logits_are_made_when_they_are_read():
    plain, fast = twins()
    for model in (plain, fast):
        model.train()
    output, want = fast(**BATCH), plain(**BATCH)
    assert type(output) is LossOutput and list(output) == ["loss"] and output[0] is output.loss
    assert "logits" not in list(output) and want.keys() >= {"loss", "logits"}
    torch.testing.assert_close(output.logits, want.logits)
    want.logits.sum().backward()
    output.logits.sum().backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (fast, plain)]
    assert_equal(*grads)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"return_dict": False},
        {"logits_to_keep": 2, "labels": None},
        {"shift_labels": BATCH["labels"]},
        {"labels": None},
        {"use_cache": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_other_arguments_go_to_the_models_own_forward(arguments):
    found = []
    for model in twins():
        model.train()
        output = model(**BATCH | arguments)
        values = output if isinstance(output, tuple) else output.to_tuple()
        found.append({str(i): one.detach() for i, one in enumerate(values) if isinstance(one, torch.Tensor)})
        hidden = getattr(output, "hidden_states", None)
        assert ("output_hidden_states" in arguments) == bool(hidden)
    if arguments != {"use_cache": True}:
        assert found[0].keys() == found[1].keys()
    assert_equal({name: found[1][name] for name in found[1]}, {name: found[0][name] for name in found[1]})


def test_rows_without_labels_have_pefts_loss():
    batch = BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}
    plain, fast = twins()
    for model in (plain, fast):
        model.train()
    assert plain(**batch).loss.isnan() and fast(**batch).loss.isnan()
    items = {"num_items_in_batch": torch.tensor(5)}
    assert plain(**batch, **items).loss == fast(**batch, **items).loss == 0


def test_in_evaluation_the_model_is_its_own(chunked):
    model = wrapped()
    pf.accelerate(model)
    chunked.clear()
    logits(model)
    model.eval()
    assert model(**BATCH).logits is not None and not chunked
    results(model)
    assert len(chunked) == 1


def test_a_head_that_changes_is_seen():
    """An adapter on the head, or a hook, after `accelerate`."""
    found = []
    for model in twins(target_modules=["q_proj"]):
        model.add_adapter("head", peft.LoraConfig(**LORA | {"target_modules": ["lm_head", "q_proj"]}))
        model.set_adapter("head")
        filled(model, 4)
        found.append(results(model))
        model.delete_adapter("head")
    assert_equal(found[1], found[0])
    found = []
    for model in twins(target_modules=["q_proj"]):
        model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * 3)
        found.append(results(model))
    assert_equal(found[1], found[0])


def of_experts(**options):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, **options)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("family", ["router", "own loss"])
def test_losses_with_more_to_them_stay(family):
    model = of_experts(output_router_logits=True) if family == "router" else build("llama")
    if family == "own loss":
        model.loss_function = lambda *args, **kw: torch.tensor(0.0)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA | {"target_modules": ["q_proj"]}))
    report = pf.accelerate(model)
    assert not report.loss and report.left["loss"]
    assert ("adds something to its loss" in report.left["loss"]) == (family == "router")


def test_a_router_that_is_switched_on_later_counts():
    found = []
    for fast in (False, True):
        model = peft.get_peft_model(of_experts(), peft.LoraConfig(**LORA | {"target_modules": ["q_proj"]}))
        if fast:
            assert pf.accelerate(model).loss
        model.config.output_router_logits = True
        found.append(results(filled(model)))
    assert_equal(found[1], found[0])
    assert isinstance(vars(model.get_base_model())["forward"], LossForward)
