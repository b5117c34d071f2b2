"""MLPs some rows at a time: the same numbers, the memory that it saves, how often it computes, and what it leaves alone."""

from collections import Counter

import pytest
import torch
import transformers
from helpers import CONFIGS, ROWS, SMALL, STARTS, build, everywhere, gradients, made, prompted, same, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.lora.layer import LoRALinear, adapters
from plopfast.lora.shared import Prepared, SharedInput, find_shared_inputs
from plopfast.models.linears import blocks
from plopfast.models.tiles import Tiled, token_wise
from plopfast.support.errors import ConfigError
from plopfast.training.blocks import prepared_blocks
from plopfast.training.estimate import MIB, estimate
from plopfast.training.loss import Objective
from plopfast.training.meter import Meter

BATCH = collate(prompted(ROWS, STARTS))  # 3 rows of 19 tokens, of which 18 are read
MLP = "model.layers.0.mlp"


def step(model, dropout=0.0, seed=3, autocast=False, **settings):
    """(loss, gradients, notes) of a forward and a backward pass as the trainer takes them."""
    objective = Objective(model, recomputed=bool(settings.get("checkpointing")))
    for module in adapters(model).values():
        module.dropout = dropout
    find_shared_inputs(model)
    model.zero_grad()
    model.train()
    torch.manual_seed(seed)
    with prepared_blocks(model, pf.TrainConfig(**settings)) as notes, Prepared(model):
        with torch.autocast("cpu", torch.bfloat16, autocast):
            loss = objective(BATCH)
        loss.backward()
    return loss.detach(), gradients(model), notes


def double(name, placement=None):
    model = build(name).double()
    if placement is None:
        trained(model)
    else:
        pf.inject(model, placement)
        for module in adapters(model).values():
            module.lora_B.data.normal_(std=0.2)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def agree(one, other, within=1e-12):
    assert one.keys() == other.keys()
    for key, gradient in one.items():
        assert (gradient - other[key]).norm() <= within * gradient.norm(), key


def whole(tiled, x):
    """What `Tiled` computes, by plain autograd: every tile keeps what it needs."""
    x_MK = x.reshape(1, -1, x.shape[-1])
    return torch.cat([tiled.forward(part) for part in x_MK.split(tiled.rows, dim=1)], dim=1).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in sorted(CONFIGS)), ("llama", True), ("gemma3", True)]
)
def test_gradients_are_those_of_whole_mlps(name, checkpointing):
    model = double(name)
    want, got = step(model), step(model, mlp_rows=5, checkpointing=checkpointing)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    agree(want[1], got[1])
    assert "3 MLPs 5 tokens at a time" in got[2][-1] and not any("tokens at a time" in note for note in want[2])
    assert all(type(vars(m).get("forward")) is not Tiled for m in model.modules())


@pytest.mark.parametrize(
    ("name", "autocast", "checkpointing"),
    [("llama", False, True), ("llama", True, False), ("gpt2", False, True)],  # which has dropout of its own, too
)
def test_what_is_drawn_is_drawn_again(name, autocast, checkpointing, monkeypatch):
    model = build(name) if autocast else double(name)
    model = trained(model) if autocast else model
    settings = {"mlp_rows": 7, "checkpointing": checkpointing}
    got = step(model, 0.3, autocast=autocast, **settings)
    after = torch.get_rng_state()
    monkeypatch.setattr(Tiled, "__call__", whole)
    want = step(model, 0.3, autocast=autocast, **settings)
    agree(want[1], got[1], 2e-2 if autocast else 1e-12)
    assert torch.equal(after, torch.get_rng_state()), "the backward pass moves no generator on"
    assert not same(got[1], step(model, 0.3, seed=4, autocast=autocast, **settings)[1])


@pytest.mark.parametrize("reach", ["mlp", "attention", "all weights"])
def test_parts_that_need_no_gradient(reach):
    """The lowest MLP's input needs none where only MLPs are trained; its weights need none where attention is."""
    if reach == "all weights":
        model = build("llama").double().requires_grad_(True)
    else:
        chosen = {n: v for n, v in everywhere(build("llama"), 3).modules.items() if ("mlp" in n) == (reach == "mlp")}
        model = double("llama", pf.Placement(chosen, [], "all", 0))
    agree(step(model)[1], step(model, mlp_rows=8)[1])


@pytest.mark.parametrize(
    ("settings", "runs"), [({}, 1), ({"mlp_rows": 8}, 2), ({"mlp_rows": 8, "checkpointing": True}, 2)]
)
def test_a_recomputed_block_computes_its_mlp_no_more_often(settings, runs):
    """Its input is saved before it runs, so torch stops the block's second pass there."""
    model, counted = trained(build("llama")), Counter()
    find_shared_inputs(model)
    down = model.get_submodule(f"{MLP}.down_proj")
    with down.register_forward_hook(lambda _, args, __: counted.update([args[0].shape[-2]])):
        step(model, **settings)
    for tokens in (2, 4, 5):
        del counted[tokens]  # those that tell kinds and find groups
    want = {8: 6 * runs, 6: runs} if "mlp_rows" in settings else {18: runs}
    assert counted == want


def test_members_of_a_group_compute_together_in_each_tile(monkeypatch):
    model, together, plain = trained(build("llama")), Counter(), SharedInput.together
    monkeypatch.setattr(
        SharedInput, "together", lambda self, x, p: (together.update([len(self.members)]), plain(self, x, p))[1]
    )
    step(model, mlp_rows=29)
    assert together == {3: 3, 2: 3 * 2 * 2}, (
        "query, key and value once; gate and up in two tiles, forwards and backwards"
    )


def test_a_group_is_split_where_a_member_is_outside():
    """Attention and MLP may read one norm, side by side. Then the tiles' members compute each by itself."""
    model = trained(build("llama"))
    find_shared_inputs(model)
    mlp, attention = model.get_submodule(MLP), model.get_submodule("model.layers.0.self_attn")
    mixed, own = mlp.gate_proj.shared, attention.q_proj.shared
    mixed.members.append(attention.o_proj)
    attention.o_proj.shared = mixed
    assert mixed.producer is not None
    with prepared_blocks(model, pf.TrainConfig(mlp_rows=4)):
        assert mlp.gate_proj.shared is mlp.up_proj.shared is attention.o_proj.shared is mixed.producer is None
        assert attention.q_proj.shared is own and own.producer is not None
        other = model.get_submodule("model.layers.1.mlp").gate_proj
        assert other.shared is not None and other.shared.producer is None, "its S would be that of all rows"
    assert mlp.gate_proj.shared is attention.o_proj.shared is mixed and mixed.producer is not None


def test_through_ddp(tmp_path):
    model = double("llama")
    want = step(model, mlp_rows=8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model.zero_grad()
        parallel = DistributedDataParallel(Objective(model))
        with prepared_blocks(model, pf.TrainConfig(mlp_rows=8)), Prepared(model):
            torch.manual_seed(3)
            parallel(BATCH).backward()
        agree(want[1], gradients(model))
    finally:
        torch.distributed.destroy_process_group()


class Wide(nn.Module):
    """An MLP of another kind, `times` as wide; with `mixing` it sees the tokens before, too."""

    def __init__(self, mixing):
        super().__init__()
        self.wide, self.back, self.mixing = nn.Linear(32, 512), nn.Linear(512, 32), mixing

    def forward(self, x):
        return self.back(torch.relu(self.wide(x + x.cumsum(1) if self.mixing else x)) ** 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_saves_what_it_says(checkpointing):
    """And the estimate says so. Each MLP holds 512 numbers a token, three or four times."""
    peaks = {}
    for rows in (None, 8):
        model = build("llama")
        for layer in model.model.layers:
            layer.mlp = Wide(mixing=False)
        placement = everywhere(model, 2)
        config = pf.TrainConfig(mlp_rows=rows, checkpointing=checkpointing)
        if rows and checkpointing:
            (told,) = estimate(model, {"a": placement}, config, rows=4, row_tokens=64, label_tokens=8, best=False)
        pf.inject(model, placement)
        batch = collate(prompted([tuple(range(5, 69))] * 4, [56] * 4))
        with Meter() as meter:
            for tensor in (*model.parameters(), *model.buffers()):
                meter.add(tensor)
            objective = Objective(model, recomputed=checkpointing)
            model.train()
            with prepared_blocks(model, config), Prepared(model):
                for _ in range(2):
                    objective(batch).backward()
                    model.zero_grad()
        kept = 2 * 4 * placement_size(model)
        peaks[rows] = meter.peak
    mlp = 4 * 64 * 512 * 4  # bytes between its products
    if checkpointing:
        assert told.total_mib == pytest.approx((peaks[8] + kept) / MIB, rel=0.03)
    assert peaks[None] - peaks[8] > (1.5 if checkpointing else 3) * mlp


def placement_size(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_mixes_tokens_is_left_alone_and_named():
    model = build("llama")
    model.model.layers[1].mlp = Wide(mixing=True)
    found, others = token_wise(model)
    assert list(found) == [MLP, "model.layers.2.mlp"] and others == ["Wide"]
    trained(model)
    assert "2 MLPs 8 tokens at a time" in (note := step(model, mlp_rows=8)[2][-1]) and "left whole: Wide" in note
    for layer in model.model.layers:
        layer.mlp = Wide(mixing=True)
    with pytest.raises(ConfigError, match="no MLP that can be computed some tokens at a time.*Wide.*leave it out"):
        step(model, mlp_rows=8)


def test_mixtures_of_experts_are_left_alone_and_named():
    config = transformers.Qwen3MoeConfig(
        **SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found, others = token_wise(model)
    assert list(found) == ["model.layers.1.mlp"] and others == ["Qwen3MoeSparseMoeBlock"]


def test_attention_is_no_mlp():
    for name in CONFIGS:
        found, others = token_wise(build(name))
        assert [n.rpartition(".")[2] for n in found] == ["mlp"] * 3 and not others
    assert [*blocks(build("gpt2"))]


def test_a_parameter_must_not_change_in_between():
    model = trained(build("llama"))
    with prepared_blocks(model, pf.TrainConfig(mlp_rows=8)):
        loss = Objective(model)(BATCH)
        with torch.no_grad():
            model.get_submodule(f"{MLP}.up_proj").lora_B.add_(1)
        with pytest.raises(RuntimeError, match="changed between"):
            loss.backward()


def test_somebodys_forward_comes_back():
    model = trained(build("llama"))
    mlp = model.get_submodule(MLP)
    mlp.forward = mine = lambda x: type(mlp).forward(mlp, x)
    assert "3 MLPs" in step(model, mlp_rows=8)[2][-1]
    assert mlp.forward is mine and all("forward" not in vars(b.mlp) for b in [*model.model.layers][1:])


def test_evaluation_runs_in_tiles_too():
    model = trained(build("llama"))
    want, seen = model(**{"input_ids": BATCH["input_ids"]}).logits, []
    with prepared_blocks(model, pf.TrainConfig(mlp_rows=8)), torch.no_grad():
        down = model.get_submodule(f"{MLP}.down_proj")
        with down.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1])):
            got = model(input_ids=BATCH["input_ids"]).logits
    assert seen == [8] * 7 + [1] and isinstance(down, LoRALinear)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_training_resumes_bit_for_bit(examples, tmp_path):
    straight = made(examples, mlp_rows=16, dropout=0.1, max_steps=4, eval_every=2)
    straight.fit()
    assert any("MLPs 16 tokens at a time" in line for line in straight.paths())
    made(examples, tmp_path, mlp_rows=16, dropout=0.1, max_steps=4, eval_every=2, patience=1)
    first = made(examples, tmp_path, mlp_rows=16, dropout=0.1, max_steps=4, eval_every=2)
    first.on_valid = lambda step, loss: (_ for _ in ()).throw(KeyboardInterrupt) if step == 4 else None
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    again = made(examples, tmp_path, mlp_rows=16, dropout=0.1, max_steps=4, eval_every=2)
    again.fit(resume=True)
    assert again.history[-1]["valid_loss"] == straight.history[-1]["valid_loss"]


def test_it_excludes_compiling_and_spread_weights():
    with pytest.raises(ConfigError, match="mlp_rows and compile"):
        pf.TrainConfig(mlp_rows=8, compile=True)
    with pytest.raises(ConfigError, match="--parallel fsdp"):
        pf.RunConfig(mlp_rows=8, parallel="fsdp")
    model = trained(build("llama"))
    model.model.layers[0].mlp.gate_proj.base.weight.full_tensor = None  # as a sharded one has it
    with pytest.raises(ConfigError, match="--parallel fsdp"), prepared_blocks(model, pf.TrainConfig(mlp_rows=8)):
        pass
