"""Saved tensors in CPU memory: the order of copies and products as a property, the same gradients, and the bytes that go."""

import copy
import itertools
import weakref

import pytest
import torch
import transformers
from helpers import ROWS, SMALL, STARTS, build, everywhere, gradients, prompted, trained
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.lora.shared import Prepared
from plopfast.models.linears import blocks
from plopfast.training.blocks import prepared_blocks, recomputed
from plopfast.training.loss import Objective
from plopfast.training.meter import Meter
from plopfast.training.offload import offloaded

BATCH = collate(prompted(ROWS, STARTS))
OTHER = collate(prompted([tuple(range(60, 79))] * 3, STARTS))
INPUT = 3 * 17 * 32 * 4  # bytes of a block's input


class Late:
    """Copies as late as they may be: when somebody waits for them. Until then they hold NaN.

    `log` holds (what, place of the source). A source that has gone or changed until then is an error: its copy would have
    read another tensor's values.
    """

    def __init__(self):
        self.log, self.numbers, self.jobs = [], itertools.count(), {}

    def copy(self, source, device):
        number, target = next(self.numbers), torch.full_like(source, torch.nan)
        self.jobs[number] = weakref.ref(source.untyped_storage()), source.clone(), target
        self.log.append(("copy", number))
        return target, number

    def wait(self, number):
        self.log.append(("wait", number))
        storage, value, target = self.jobs.pop(number, (None, None, None))
        if storage is None:
            return  # somebody has waited before
        alive = storage()
        assert alive is not None, "let go before its copy was made"
        now = torch.empty(0, dtype=value.dtype).set_(alive, 0, value.shape, value.stride())
        assert torch.equal(now, value), "overwritten before its copy was made"
        target.copy_(value)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("plopfast.training.offload.OFFLOADED_BYTES", 3000)


def stepped(model, objective, *batches, lane=None, checkpointing=True):
    """The gradients of several forward passes and their backward passes, and the hooks."""
    model.zero_grad()
    model.train()
    with recomputed(model) if checkpointing else torch.enable_grad():
        if lane is None:
            sum(objective(batch) for batch in batches).backward()
            return gradients(model), None
        with offloaded(model, lane) as hooks:
            sum(objective(batch) for batch in batches).backward()
    return gradients(model), hooks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batches", [(BATCH,), (BATCH, OTHER)], ids=["one", "two before a backward pass"])
def test_no_tensor_is_used_before_its_copy_or_let_go_in_flight(batches, checkpointing):
    model = trained(build("llama"))
    objective = Objective(model, recomputed=checkpointing)
    want, _ = stepped(model, objective, *batches, checkpointing=checkpointing)
    lane = Late()
    for _ in range(2):  # a step leaves nothing behind for the next one
        got, hooks = stepped(model, objective, *batches, lane=lane, checkpointing=checkpointing)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
        assert not hooks._leaving and not any(hooks.moved.values())


def test_a_block_ahead_and_no_more():
    """While a block is computed again, the next one's input has begun to come, and that of the one after it has not."""
    model = six_layers()
    objective, lane = Objective(trained(model), recomputed=True), Late()
    for number, block in enumerate(blocks(model).values()):
        block.input_layernorm.register_forward_pre_hook(lambda *_, n=number: lane.log.append(("run", n)))
    stepped(model, objective, BATCH, lane=lane)
    turn = max(at for at, entry in enumerate(lane.log) if entry == ("run", 5) and ("run", 5) in lane.log[:at])
    first = lane.log.index(("copy", 7))
    assert lane.log[first - 1] == ("wait", 6), "six inputs and the last output have left before that comes back"
    coming = {8 + ahead: 5 - ahead for ahead in range(6)}  # the copy's number -> the block whose input it brings
    begun = [coming[n] for what, n in lane.log[first:] if what == "copy" and n in coming]
    assert begun == [5, 4, 3, 2, 1, 0] and first < turn
    for number in range(6):
        run = max(at for at, entry in enumerate(lane.log) if entry == ("run", number))
        there = {coming[n] for what, n in lane.log[first:run] if what == "copy" and n in coming}
        assert there == set(range(max(0, number - 1), 6))
        waited = {coming[n] for what, n in lane.log[first:run] if what == "wait" and n in coming}
        assert waited == set(range(number, 6))


def test_at_most_two_blocks_inputs_are_held_while_they_leave():
    model, held, lane = six_layers(), [], Late()
    objective = Objective(trained(model), recomputed=True)
    with recomputed(model), offloaded(model, lane) as hooks:
        for block in blocks(model).values():
            block.register_forward_hook(lambda *_: held.append(len(hooks._leaving)))
        model.train()
        objective(BATCH)
    assert held == [1, 2, 2, 2, 2, 2]


def test_what_an_error_leaves_is_forgotten():
    model, lane = trained(build("llama")), Late()
    objective = Objective(model, recomputed=True)
    want, _ = stepped(model, objective, BATCH)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.model.layers[1].mlp.register_forward_hook(fail):
        stepped(model, objective, BATCH, lane=lane)
    assert not any(block._forward_pre_hooks for block in blocks(model).values())
    got, _ = stepped(model, objective, BATCH, lane=lane)
    assert all(torch.equal(want[key], got[key]) for key in want)


def six_layers():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 6})
    ).eval()


class OfTheCard(Meter):
    """Counts the storages of the "meta" device, the stand-in for a card, and apart from them those of the CPU."""

    def __init__(self):
        super().__init__()
        self.host = Meter()

    def add(self, tensor):
        (super() if tensor.device.type == "meta" else self.host).add(tensor)


def test_on_a_card_the_bytes_are_the_hosts():
    found = {}
    for on in (False, True):
        moved = Objective(six_layers(), recomputed=True)
        moved.model.to("meta")
        with FakeCopyMode(mode := FakeTensorMode()):
            objective = copy.deepcopy(moved)
        with mode:
            pf.inject(objective.model, everywhere(objective.model), backend="torch")
            ids = torch.zeros(3, 18, dtype=torch.long, device="meta")
            row, column = torch.zeros(4, dtype=torch.long, device="meta"), torch.arange(4, device="meta")
            batch = {"input_ids": ids, "labels": ids, "at": (row, column)}
            objective.model.train()
            settings = pf.TrainConfig(checkpointing=True, offload=on)
            with (
                prepared_blocks(objective.model, settings, {}) as notes,
                Prepared(objective.model),
                OfTheCard() as meter,
            ):
                host = meter.host.now
                loss = objective(batch)
                found[on] = meter.now, meter.host.now - host
                loss.backward()
    assert any("fetched a block ahead" in note for note in notes)
    assert found[True][1] - found[False][1] == 7 * INPUT, "six blocks' inputs, and the last one's output"
    assert found[False][0] - found[True][0] == 3 * INPUT, (
        "of seven, what two blocks saved is held until it has been copied, and the lowest input is a leaf"
    )
