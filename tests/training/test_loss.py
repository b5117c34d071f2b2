"""The chunked loss against the plain one; shared shrinks and casts against per-call ones; what is never computed."""

import copy
import pickle
import traceback

import pytest
import torch
import transformers
from helpers import CONFIGS, ROWS, SMALL, STARTS, build, everywhere, gradients, prompted, trained
from torch.utils._python_dispatch import TorchDispatchMode

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.lora.layer import adapters
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models import cross_entropy
from plopfast.training.loss import Objective, inputs_of

SCALED = {
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=16, final_logit_softcapping=3.0),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
}


def model_of(name):
    if name in CONFIGS:
        return build(name)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(SCALED[name]()).eval()


def plain_loss(model, batch):
    """transformers' own loss, from full logits and with the attention mask."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("name", [*CONFIGS, *SCALED])
@pytest.mark.parametrize("rows_in_chunk", [1, 5, 1000])
def test_chunks_give_the_plain_loss_and_gradients(name, rows_in_chunk, monkeypatch):
    """Also that right padding needs no attention mask, and that soft caps and scalings of the logits are known."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", rows_in_chunk * SMALL["vocab_size"])
    model = trained(model_of(name))
    batch = collate(prompted(ROWS, STARTS))
    want = plain_loss(model, batch)
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    objective = Objective(model)
    assert objective.chunked, objective.why
    found = objective(batch)
    (2 * found).backward()
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * expected[key], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_learns(tied):
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    batch = collate(prompted(ROWS, STARTS))
    plain_loss(model, batch).backward()
    expected = gradients(model)
    model.zero_grad()
    Objective(model)(batch).backward()
    assert gradients(model).keys() == expected.keys() and "model.embed_tokens.weight" in expected
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)


def test_logits_never_exist_whole(llama):
    """The largest tensor that the head makes is a chunk."""
    batch = collate(prompted([tuple(range(3, 103))] * 4, [1] * 4))
    trained(llama)
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (300,):
                sizes.append(result.numel() // 300)
            return result

    objective = Objective(llama)
    cross_entropy.CHUNK_ELEMENTS["cpu"], before = 300 * 64, cross_entropy.CHUNK_ELEMENTS["cpu"]
    try:
        with Sizes():
            objective(batch).backward()
    finally:
        cross_entropy.CHUNK_ELEMENTS["cpu"] = before
    assert max(sizes) == 64


def test_an_unknown_treatment_of_logits_is_noticed(llama):
    class Strange(type(llama)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.sin()
            return output

    llama.__class__ = Strange
    trained(llama)
    objective = Objective(llama)
    assert not objective.chunked and "does not know" in objective.why
    batch = collate(prompted(ROWS, STARTS))
    assert objective(batch).item() == pytest.approx(plain_loss(llama, batch).item(), rel=1e-5)
    trainer = pf.Trainer(llama, pf.TrainConfig(max_steps=1), [Example.after_prompt(ROWS[0], 1, None, "here")])
    assert "all label tokens' logits at once" in trainer.paths()[0]


def test_an_adapter_on_the_head_is_not_left_out(llama):
    pf.inject(llama, pf.Placement({"lm_head": (2, 4.0)}, [], "explicit", 0))
    llama.lm_head.lora_B.data.normal_()
    batch = collate(prompted(ROWS, STARTS))
    assert Objective(llama)(batch).item() == pytest.approx(plain_loss(llama, batch).item(), rel=1e-5)


def test_no_labels_is_no_loss(llama):
    trained(llama)
    batch = collate(prompted([(5, 6, 7)], [3]))
    total = Objective(llama)(batch)
    assert total.item() == 0.0
    total.backward()
    assert all(not g.any() for g in gradients(llama).values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_an_objective_is_copied_with_its_own_head(llama, copied):
    """As wrappers of other trainers do; what happens to the copy's head is the copy's alone."""
    trained(llama)
    objective, batch = Objective(llama), collate(prompted(ROWS, STARTS))
    other = copied(objective)
    assert other.head.module is other.model.lm_head and other.head.module is not llama.lm_head
    want = objective(batch)
    want.backward()
    found = other(batch)
    found.backward()
    assert torch.equal(found, want)
    for key, gradient in gradients(other.model).items():
        assert torch.equal(gradient, gradients(llama)[key])
    torch.nn.init.zeros_(other.model.lm_head.weight)
    assert other(batch).item() != want.item() == objective(batch).item()


def test_padding_cannot_be_seen(any_model):
    """Without a mask, what stands in the padding changes nothing."""
    batch = collate(prompted(ROWS, STARTS))
    objective = Objective(any_model)
    with torch.no_grad():
        want = objective(batch).item()
        batch["input_ids"][batch["attention_mask"] == 0] = 77
        assert objective(batch).item() == want
    assert set(inputs_of(batch)) == {"input_ids"}


def test_no_gradient_below_the_lowest_adapter(llama):
    """Nor for the inputs of frozen modules there: nothing of those layers is kept."""
    pf.inject(llama, pf.Placement({"model.layers.2.mlp.down_proj": (2, 4.0)}, [], "explicit", 0))
    needs = {}
    for i, layer in enumerate(llama.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: needs.update({i: torch.as_tensor(out[0]).requires_grad}))
    Objective(llama)(collate(prompted(ROWS, STARTS))).backward()
    assert needs == {0: False, 1: False, 2: True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_steps_equal_single_calls(any_model, dtype):
    """Modules that share an input compute together, and adapters are cast once: loss and gradients are the same."""
    model = trained(any_model).to(dtype)
    for module in adapters(model).values():
        module.lora_A.data, module.lora_B.data = module.lora_A.data.float(), module.lora_B.data.float()
    batch = collate(prompted(ROWS, STARTS))
    objective = Objective(model)
    want = objective(batch)
    want.backward()
    expected = gradients(model)
    model.zero_grad()
    groups = find_shared_inputs(model)
    with Prepared(model):
        found = objective(batch)
        found.backward()
    torch.testing.assert_close(found, want, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)
    for key, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 0.05  # both ways lie up to 0.06 from float64
        assert (gradient - expected[key]).norm() <= tolerance * expected[key].norm(), key
    fused = any("qkv_proj" in name or "c_attn" in name for name in adapters(model))
    lasts = [[name.split(".")[-1] for name in names] for names in groups]
    if not fused:
        assert lasts[:2] == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] and len(groups) == 6
    assert all(module.low is None for module in adapters(model).values())


def test_shrinks_and_casts_are_counted(llama, monkeypatch):
    """7 modules a layer, 4 distinct inputs: 4 shrinks a layer; all adapters are cast by one call for two micro-batches."""
    from plopfast.kernels import library

    model = trained(llama).to(torch.bfloat16)
    for module in adapters(model).values():
        module.lora_A.data, module.lora_B.data = module.lora_A.data.float(), module.lora_B.data.float()
    find_shared_inputs(model)
    objective, batch = Objective(model), collate(prompted(ROWS, STARTS))
    shrinks, casts, copies = [], [], []
    plain_shrink, plain_to, plain_copy = library.shrink, torch.Tensor.to, torch._foreach_copy_
    monkeypatch.setattr(library, "shrink", lambda *a: shrinks.append(a) or plain_shrink(*a))
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a: copies.append(len(a[0])) or plain_copy(*a))
    weights = {p.data_ptr() for n, p in model.named_parameters() if "lora" in n}

    def to(tensor, *args, **kwargs):
        if tensor.data_ptr() in weights and args[0] == torch.bfloat16:
            casts.append(tensor.shape)
        return plain_to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with Prepared(model):
        objective(batch).backward()
        objective(batch).backward()
    assert len(shrinks) == 2 * 3 * 4
    assert not casts and copies == [2 * len(adapters(model))] == [2 * 21]
    assert {s[1].shape[0] for s in shrinks} == {9, 6, 3}, "stacked ranks: q, k, v; gate, up; the others"


class Waits(TorchDispatchMode):
    """Notes who reads values on the host, for which a GPU would have to be waited for."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.readers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.READS:
            frames = [frame.filename for frame in traceback.extract_stack()]
            self.readers.append(next(name for name in reversed(frames) if "/torch/" not in name and name != __file__))
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_within_a_step(llama):
    """From the batch to the gradients, so that a GPU's step can be enqueued ahead, or captured. transformers looks once at
    the positions, for packed rows."""
    model = trained(llama)
    find_shared_inputs(model)
    objective, batch = Objective(model), collate(prompted(ROWS, STARTS))
    with torch.autograd.set_multithreading_enabled(False), Waits() as waits, Prepared(model):
        objective(batch).backward()
    assert [name for name in waits.readers if "transformers/masking_utils" not in name] == []
    assert len(waits.readers) <= 1


def test_a_shared_input_that_changes_in_place_is_shrunk_again(llama):
    pf.inject(llama, everywhere(llama, rank=2))
    q, k, _ = group = [adapters(llama)[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"]
    for module in group:
        module.lora_B.data.normal_()
    find_shared_inputs(llama)
    x = torch.randn(4, 32)

    def alone(module):
        return x @ module.weight.T + (x @ module.lora_A.T) @ module.lora_B.T * module.scaling

    with Prepared(llama):
        assert q.shared is k.shared
        for module in (q, k):
            torch.testing.assert_close(module(x), alone(module), rtol=1e-4, atol=1e-5)
            x.mul_(-2.0)
