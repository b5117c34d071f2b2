"""Streamed blocks: the order of copies and products, equal values, and what a streamed model refuses."""

import copy
import warnings

import pytest
import torch
from helpers import adapters, build, everywhere, gradients, logits, quantize, random_batches
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import plopfast as pf
from plopfast.lora.shared import Prepared, find_shared_inputs
from plopfast.models import streaming
from plopfast.models.fingerprints import fingerprint
from plopfast.models.frozen import frozen_of, streamed_in
from plopfast.models.lean import lean_modules
from plopfast.models.linears import blocks, number_of_weights
from plopfast.models.quantized_experts import make_dense
from plopfast.models.running import device_of
from plopfast.models.saved import save_model
from plopfast.models.streamer import ALIGNED, Streamer, in_one_buffer, payload_of
from plopfast.models.streaming import resident, stream, unstream
from plopfast.support.errors import AdapterError, ModelError
from plopfast.training.blocks import recomputed

IDS = torch.arange(24).view(2, 12)


def broken(trace, count=2):
    """The first event that a GPU could turn into wrong values, or None.

    A slot is read as block i only after i's copy, and after the compute stream waited for that. A copy comes only after a
    fence that is younger than the last read of its slot, and does not go into the slot of the block just entered.
    """
    holds, waited, fenced, inside = [None] * count, [False] * count, [False] * count, None
    for event in trace:
        match event:
            case "enter", block:
                inside = block
            case "fence", slot:
                fenced[slot] = True
            case "copy", slot, block:
                if not fenced[slot] or None is not holds[slot] == inside != block:
                    return event
                holds[slot], waited[slot], fenced[slot] = block, False, False
            case "wait", slot:
                waited[slot] = True
            case "use", slot, block:
                if holds[slot] != block or not waited[slot]:
                    return event
                fenced = [False] * count  # products may read until the next fence
    return None


def late(trace):
    """Blocks that were copied only when they were entered."""
    found, entered = [], None
    for event in trace:
        entered = event[1] if event[0] == "enter" else entered
        if event[0] == "copy" and event[2] == entered:
            found.append(entered)
    return found


def copies(trace):
    return [event[2] for event in trace if event[0] == "copy"]


def model_of(architecture="llama", kind=None, layers=3, seed=0):
    model = build(architecture, seed)
    if layers != 3:
        held = model.model.layers
        more = [copy.deepcopy(held[number % 3]) for number in range(layers)]
        for number, layer in enumerate(more):
            layer.self_attn.layer_idx = number
        model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(more), layers
    return quantize(model, kind) if kind else model


def adapted(model, where=None, dropout=0.0):
    placement = everywhere(model)
    if where is not None:
        placement.modules = {name: size for name, size in placement.modules.items() if where in name}
    pf.inject(model, placement, dropout=dropout)
    draw = torch.Generator().manual_seed(0)
    for module in adapters(model).values():
        module.lora_B.data.normal_(std=0.1, generator=draw)
    return model.train()


def traced(model, share=0.0):
    found = stream(model, "cpu", share)
    found.streamer.queue.trace = []
    return found.streamer


def steps(model, count=2, check=False):
    """Losses and gradients of some micro-batches."""
    torch.manual_seed(0)
    losses = []
    for number in range(count):
        ids = (IDS + 7 * number) % 299
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *gradients(model).values()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", None), ("llama", "nf4"), ("llama", "int8"), ("llama", "fp8"), ("gemma3", None), ("gpt2", None)],
)
def test_losses_and_gradients_are_the_resident_models(architecture, kind):
    """Streamed, with recomputation, and with every second block resident; with dropout."""
    plain = model_of(architecture, kind)
    expected = steps(adapted(copy.deepcopy(plain), dropout=0.1))
    for how in ("streamed", "recomputed", "every second"):
        model = copy.deepcopy(plain)
        streamer = traced(model, 0.5 if how == "every second" else 0.0)
        adapted(model, dropout=0.1)
        if how == "recomputed":
            with recomputed(model):
                found = steps(model)
        else:
            found = steps(model)
        assert equal(expected, found), how
        assert broken(streamer.queue.trace) is None
        assert len(streamer.payloads) == (2 if how == "every second" else 3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_micro_batch_takes_2n_minus_4_copies(count, checkpointing):
    model = model_of(layers=count)
    streamer = traced(model)
    adapted(model)
    with recomputed(model) if checkpointing else torch.enable_grad():
        steps(model, 1)
        first = copies(streamer.queue.trace)
        forward = list(range(count))
        assert first == forward + list(range(count - 3, -1, -1)), "the backward pass begins with what is there"
        steps(model, 1)
    assert len(copies(streamer.queue.trace)) - len(first) == max(0, 2 * count - 4)
    assert late(streamer.queue.trace) == [0], (
        "but for the first one, each copy begins while the block before it is computed"
    )
    assert broken(streamer.queue.trace, len(streamer.slots)) is None


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.fc(x))  # which saves its output, so there is something to compute again


def test_a_block_that_is_computed_again_with_its_hooks_is_not_copied_again():
    """Their hooks run in the recomputation, too, as with some versions of transformers."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Block() for _ in range(6))
    streamer = traced(model)
    for _ in range(2):
        before, x = len(copies(streamer.queue.trace)), torch.ones(3, 8, requires_grad=True)
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        x.sum().backward()
    assert len(copies(streamer.queue.trace)) - before == 2 * 6 - 4 and late(streamer.queue.trace) == [0]
    assert broken(streamer.queue.trace) is None


def test_a_missing_fence_or_wait_is_seen():
    """The checker of the trace fails on streamers that lack one of the two rules, or copy into the slot in use."""
    model = model_of()
    streamer = traced(model)
    steps(adapted(model))
    trace = streamer.queue.trace
    assert broken(trace) is None
    assert broken([event for event in trace if event[0] != "fence"]) is not None
    assert broken([event for event in trace if event[0] != "wait"]) is not None
    moved = [("copy", 1 - event[1], event[2]) if event[0] == "copy" else event for event in trace]
    assert broken(moved) is not None


def test_no_adapter_in_a_block_and_adapters_in_one_alone():
    for where in ("layers.1", "layers.2"):
        expected = steps(adapted(model_of(), where))
        model = model_of()
        streamer = traced(model)
        assert equal(expected, steps(adapted(model, where))) and broken(streamer.queue.trace) is None


def test_two_forward_passes_before_a_backward_pass_and_evaluation_between():
    def losses(model):
        model.train()
        one, two = model(IDS, labels=IDS).loss, model(IDS + 9, labels=IDS + 9).loss
        one.backward()
        with torch.no_grad():
            seen = model(IDS + 3).logits
        two.backward()
        return [one.detach(), two.detach(), seen, *gradients(model).values()]

    expected = losses(adapted(model_of(layers=5)))
    model = model_of(layers=5)
    streamer = traced(model)
    assert equal(expected, losses(adapted(model))) and broken(streamer.queue.trace) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", ["copy", "product"])
def test_a_step_after_an_interrupted_one_is_right(error, at, monkeypatch):
    expected = steps(adapted(model_of(layers=4)), 1)
    model = model_of(layers=4)
    streamer = traced(model)
    adapted(model)
    loss, calls = model(IDS, labels=IDS).loss, []
    holder, name = (streamer.queue, "copy") if at == "copy" else (streamer, "views")
    before = getattr(holder, name)

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            if at == "copy":
                streamer.slots[args[2]].fill_(1)  # half of a copy has arrived
            raise error("stopped")
        return before(*args)

    monkeypatch.setattr(holder, name, fails)
    with pytest.raises(error):
        loss.backward()
    monkeypatch.undo()
    for slot, block in enumerate(streamer.owner):
        held = {} if block is None else streamer.payloads[block].views(streamer.slots[slot])
        for of, tensors in held.items():
            host = streamer.payloads[block].tensors[of]
            assert all(torch.equal(tensor, host[name]) for name, tensor in tensors.items()), "it is what it says"
    del loss
    model.zero_grad()
    assert equal(expected, steps(model, 1)) and broken(streamer.queue.trace) is None


def test_modules_that_are_called_outside_their_block_bring_it():
    """As lean_modules does to find out what an MLP computes; groups that share an input are found and computed, too."""
    plain, model = model_of(), model_of()
    streamer = traced(model)
    assert lean_modules(model).keys() == lean_modules(plain).keys() and len(lean_modules(plain)) == 0
    found = []
    for each in (plain, model):
        adapted(each)
        assert any(len(group) == 3 for group in find_shared_inputs(each))
        with Prepared(each):
            found.append(steps(each))
    assert equal(*found) and broken([event for event in streamer.queue.trace if event[0] != "enter"]) is None
    x = torch.randn(5, 32)
    for number in (2, 0, 1):  # in any order
        name = f"model.layers.{number}.mlp"
        assert torch.equal(model.get_submodule(name)(x), plain.get_submodule(name)(x))


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_scores_and_all_that_is_read_of_the_weights(kind, tmp_path):
    plain, model = model_of(kind=kind), model_of(kind=kind)
    stream(model, "cpu")
    batches = random_batches()
    assert pf.score(model, batches).modules == pf.score(plain, batches).modules
    names = [info.name for info in pf.linear_modules(plain)]
    assert fingerprint(model, names) == fingerprint(plain, names) and streamed_in(model) == names
    assert number_of_weights(model) == number_of_weights(plain) and device_of(model) == torch.device("cpu")
    assert model.state_dict().keys() == plain.state_dict().keys()
    one, other = frozen_of(model.get_submodule(names[0])), frozen_of(plain.get_submodule(names[0]))
    assert (one.kind, one.shape, one.dtype) == (other.kind, other.shape, other.dtype)
    assert one.weight_NK.stride() == other.weight_NK.stride() and one.weight_NK.nbytes == other.weight_NK.nbytes
    assert not {id(p) for p in model.parameters()} & {id(t) for t in one.weight_NK.host_tensors.values()}
    ids = IDS[:1, :5]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))
    for each, folder in ((model, tmp_path / "one"), (plain, tmp_path / "two")):
        save_model(each, folder)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_unstream_gives_a_plain_model(kind):
    plain, model = model_of(kind=kind), model_of(kind=kind)
    names = streamed = [info.name for info in pf.linear_modules(plain)]
    stream(model, "cpu")
    adapted(model, "q_proj")
    expected = steps(adapted(plain, "q_proj"))
    assert sorted(n.removesuffix(".base") for n in unstream(model)) == sorted(streamed)
    assert not streamed_in(model) and equal(expected, steps(model))
    pf.merge(model, into="dense" if kind else None)  # in place: the weights are memory of its own
    pf.merge(plain, into="dense" if kind else None)
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(type(model.get_submodule(n)) is type(plain.get_submodule(n)) for n in names)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks(model).values())
    model.to(torch.float64)


def test_a_copy_streams_on_its_own_and_shares_the_payload():
    model = model_of()
    streamer = stream(model, "cpu").streamer
    adapted(model)
    again = copy.deepcopy(model)
    other = again.streaming.streamer
    assert (
        other is not streamer and other.payloads[0] is streamer.payloads[0] and other.slots[0] is not streamer.slots[0]
    )
    other.queue.trace = []
    assert equal(steps(model), steps(again)) and copies(other.queue.trace)
    again.to("cpu")
    unstream(again)
    again.to(torch.bfloat16)
    assert model.dtype == torch.float32


def test_a_copy_without_values_streams_to_the_stand_in_of_a_card():
    """As the estimate makes it: nothing of the model's own tensors is read."""
    model = model_of(kind="nf4")
    stream(model, "cpu")
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    with mode:
        adapted(fake)
        fake.streaming.streamer.queue.trace, ids = [], torch.zeros(2, 12, dtype=torch.long)
        fake(ids, labels=ids, use_cache=False).loss.backward()
    assert len(copies(fake.streaming.streamer.queue.trace)) == 4
    plain = model_of()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(plain)
    with mode:
        streamer = stream(fake, "meta").streamer
        adapted(fake)
        ids = ids.to("meta")
        fake(ids, labels=ids, use_cache=False).loss.backward()
    assert streamer.slots[0].device.type == "meta" and streamer.payloads[0].tensors["mlp.up_proj"]["weight"].is_cpu


def test_moves_casts_and_updates_are_refused():
    model = model_of()
    stream(model, "cpu")
    for change in (lambda: model.to(torch.bfloat16), lambda: model.to("meta"), lambda: model.half()):
        with pytest.raises(ModelError, match=r"unstream\(model\) first"):
            change()
    assert model.dtype == torch.float32 and model.to("cpu") is model
    with pytest.raises(ModelError, match="streamed already"):
        stream(model, "cpu")
    adapted(model)
    with pytest.raises(AdapterError, match=r"is streamed.*unstream\(model\) first"):
        pf.merge(model)
    with pytest.raises(ModelError, match="take no update"):
        next(iter(adapters(model).values())).frozen.add_(torch.zeros(32, 32))
    with pytest.raises(ModelError, match="before they are injected"):
        stream(adapted(model_of()), "cpu")


def test_what_cannot_be_streamed():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ModelError, match="from 0 to below 1"):
            stream(model_of(), "cpu", share)
    flat = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ModelError, match="repeated layers"):
        stream(flat, "cpu")
    tied = model_of()
    first, *others = tied.model.layers
    for layer in others:
        for name, module in first.named_modules():
            if isinstance(module, torch.nn.Linear):
                layer.get_submodule(name).weight = module.weight
    with pytest.raises(
        ModelError, match="no linear modules .*; left out: modules that share their weight with other modules"
    ):
        stream(tied, "cpu")


def test_a_device_with_a_number_is_the_one_that_tensors_name():
    model = model_of()
    streaming = stream(model, "cpu:0")
    assert streaming.streamer.device == next(model.parameters()).device
    pf.inject(model, everywhere(model))
    model(IDS).logits.sum().backward()
    assert all(module.lora_B.grad.norm() > 0 for module in adapters(model).values())


def test_a_model_that_finds_no_room_on_the_device_is_as_before(monkeypatch):
    model = model_of()
    want = logits(model)

    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_move", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            stream(model, "cpu")
    assert not streamed_in(model) and torch.equal(logits(model), want)
    stream(model, "cpu")
    assert torch.equal(logits(model), want)


def test_nothing_is_loaded_into_streamed_weights_or_made_dense():
    model = model_of(kind="nf4")
    state = model.state_dict()
    stream(model, "cpu")
    with pytest.raises(ModelError, match=r"is streamed and cannot be loaded into: unstream\(model\) first"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(ModelError, match=r"is streamed: unstream\(model\) first"):
        make_dense(model)


def test_a_weight_that_two_modules_share_stays():
    model = model_of()
    one, two = model.model.layers[0].mlp, model.model.layers[1].mlp
    two.up_proj.weight = one.up_proj.weight
    expected = logits(model)
    stream(model, "cpu")
    assert "model.layers.0.mlp.up_proj" not in streamed_in(model) and len(streamed_in(model)) == 3 * 7 - 2
    assert torch.equal(expected, logits(model))


def test_resident_blocks_are_spread_evenly():
    assert resident(6, 0.5) == {1, 3, 5} and resident(4, 0.0) == set() and resident(4, 0.25) == {3}
    assert resident(32, 0.75) == {i for i in range(32) if i % 4} and len(resident(3, 0.99)) == 2


def test_fields_are_aligned_and_one_buffer_holds_them():
    tensors = {
        "a": {"weight": torch.arange(7.0)},
        "b": {"weight": torch.arange(3, dtype=torch.uint8), "s": torch.ones(2)},
    }
    payload = payload_of(tensors)
    assert list(payload.begins.values()) == [0, ALIGNED, 2 * ALIGNED] and payload.size == 3 * ALIGNED
    whole = in_one_buffer(payload, torch.zeros(payload.size, dtype=torch.uint8))
    streamer = Streamer([whole, payload], torch.device("cpu"))
    for block in (0, 1):
        found = streamer.views(block)
        assert all(torch.equal(found[m][n], t) for m, of in tensors.items() for n, t in of.items())
    begin = streamer.slots[streamer.owner.index(0)].data_ptr()
    assert streamer.views(0)["b"]["s"].data_ptr() == begin + 2 * ALIGNED and streamer.nbytes == 2 * (28 + 3 + 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU refuses pinned memory")
def test_without_pinned_memory_a_warning_says_so(monkeypatch):
    """As a machine does that has no more of it. Each block is one buffer, which one copy brings."""
    monkeypatch.setattr(streaming, "PINNED_FOR", ("cpu",))
    plain, model = model_of(kind="nf4"), model_of(kind="nf4")
    with pytest.warns(UserWarning, match="no more pinned memory.*pageable") as said:
        found = stream(model, "cpu")
    assert len(said) == 1 and "partly pageable memory" in str(found)
    for payload in found.streamer.payloads:
        begin, end = payload.whole.data_ptr(), payload.whole.data_ptr() + payload.size
        assert all(begin <= t.data_ptr() < end for of in payload.tensors.values() for t in of.values())
    assert equal(steps(adapted(plain)), steps(adapted(model)))
    assert unstream(model) and torch.equal(logits(plain), logits(model))


def test_it_says_what_it_streams():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = str(stream(model_of(), "cpu", 0.5))
    assert "2 blocks" in said and "through 2 slots" in said and "1 stay on cpu" in said
