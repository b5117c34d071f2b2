"""Prints, as one line of JSON, what launches send and cost: see tests/kernels/test_launch.py. Runs on stub_driver.Stub."""

import functools
import itertools
import json
import os
import random

import stub_driver

STUB = stub_driver.Stub()

import quantized  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import nn  # noqa: E402

from plopfast.kernels import (  # noqa: E402
    dispatch,
    groups,
    launch,
    library,
    triton_blocks,
    triton_groups,
    triton_ops,
    triton_rows,
    triton_segments,
)
from plopfast.lora.experts import ExpertLoRA, inject_experts  # noqa: E402
from plopfast.lora.layer import LoRALinear  # noqa: E402
from plopfast.lora.many_ops import lora_linear_grouped  # noqa: E402
from plopfast.lora.ops import lora_linear  # noqa: E402
from plopfast.lora.shared import Prepared, SharedInput  # noqa: E402
from plopfast.lora.warmup import warm_up  # noqa: E402
from plopfast.models.experts import Mixture  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
CARD = dispatch.Target("sm_90", 132, "stub")


def as_a_gpu():
    """CPU tensors are taken for those of the recording driver's GPU."""
    launch.current_device, launch.current_stream = int, {0: 7}.__getitem__
    dispatch.target_of, dispatch.cannot_run = lambda device: CARD, lambda device: ""
    dispatch.plan.cache_clear()


def operands(m, k, n, r, adapters=FP32):
    draw = torch.Generator().manual_seed(0)
    made = lambda *shape, dtype=BF16: torch.randn(*shape, generator=draw).to(dtype)  # noqa: E731
    return {
        "x": made(m, k), "dy": made(m, n), "s": made(m, r), "w": made(n, k), "bias": made(n),
        "a": made(r, k, dtype=adapters), "b": made(n, r, dtype=adapters),
    }  # fmt: skip


def work(o, p, seed):
    """Calls every launcher of plans, with pointers of its own each time."""
    c = 2.0
    triton_ops.shrink_stacked(o["x"], (o["a"],), c, p, (seed,))
    triton_ops.shrink_stacked(o["x"], (o["a"], o["a"]), c, p, (seed, seed + 1))
    triton_ops.low_rank(o["s"], o["b"], o["bias"])
    triton_ops.low_rank(o["s"], o["a"].T, p=p, seed=seed)
    triton_ops.grad_s_and_b(o["dy"], o["s"], o["b"], c)
    triton_ops.grad_a(o["s"], o["x"], p, seed, FP32)
    triton_ops.gemm(o["x"], o["w"], o["s"], o["b"], o["bias"], norms=True, tiles=dispatch.SAFE_TILES[0])
    triton_ops.gemm(o["dy"], o["w"].T, o["s"], o["a"].T, p=p, seed=seed, tiles=dispatch.SAFE_TILES[0])
    triton_ops.row_norms(o["x"], o["x"][0])
    triton_groups.low_ranks([o["s"], o["s"]], [o["b"], o["b"][:17]], [None, o["bias"][:17]])
    triton_groups.low_rank_sum([o["s"]] * 3, [o["a"].T] * 3, p, (seed, seed + 1, seed + 2))
    blocks(o, p, seed)
    rows(o["x"], o["dy"])
    segments(o["x"], o["dy"], *(o[name].expand(3, *o[name].shape) for name in ("w", "a", "b")))
    quantized.decodings(len(o["w"]), o["w"].shape[1], (BF16,), "cpu")
    quantized.products(o["x"].new_zeros(len(o["x"]), 64), 48, o["s"], o["b"][:48])


def segments(x, dy, w, a, b):
    ends = (len(x) * torch.arange(1, len(w) + 1, device="cpu") // len(w)).int().to(x.device)
    s = triton_segments.forward(x, w, a, b, ends, 2.0)[1]
    triton_segments.backward(dy, x, s, w, a, b, ends, 2.0, (True, True, True))
    triton_segments.product(x, w, ends)


def blocks(o, p, seed):
    triton_blocks.SHARE = 0.0  # few tokens take the kernel that hands out S too
    x, w = o["x"], o["x"][0].clone()
    for residual in (None, x.clone()):
        rstd = triton_blocks.rms_norm(x, w, 1e-6, "narrow", residual)[1]
        triton_blocks.rms_norm_grad(x, x, w, rstd, "narrow", residual)
    triton_blocks.rms_norm_shrink(x, w, 1e-6, "offset", (o["a"],) * 2, 2.0, p, (seed, seed + 1))
    for g, u in ((o["dy"], o["dy"].clone()), torch.cat([o["dy"]] * 2, dim=1).chunk(2, dim=1)):
        triton_blocks.gate(g, u, "silu")
        triton_blocks.gate_grad(o["dy"], g, u, "silu", (g, u))


def rows(x, z):
    """Two heads for a key head in the columns of `x` [M, at least 48], and `z` [M, V] as logits."""
    q, k = (x[None, :, : 16 * heads].unflatten(2, (heads, 16)).transpose(1, 2) for heads in (2, 1))
    for backward in (False, True):
        triton_rows.rotary(q, k, x[None, :, 32:48], x[None, :, 16:32], backward=backward)
    targets = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    triton_rows.cross_entropy(z, targets, z[0], multiplier=0.5, cap=30.0)
    triton_rows.cross_entropy(z, targets, gradient=False)


def sent(call, count, narrow):
    """(grid, kernel, parameters) of the one launch that `call` makes; of 4-byte parameters only these count."""
    ((grid, values, kernel),) = STUB.launches(call, count)
    return grid, kernel, [value & 0xFFFFFFFF if i in narrow else value for i, value in enumerate(values)]


def same():
    """kernel -> (direct launches, all launches, what differed) over shapes, strides, dropout rates and seeds."""
    found, call = {}, launch.Planned.__call__

    def compared(planned, pointers, free):
        row = found.setdefault(planned.kernel.__name__, [0, 0, []])
        row[1] += 1
        call(planned, pointers, free)
        if planned.run is None:
            return
        kinds = [kind for kind in planned.kept.src.signature.values() if kind != "constexpr"]
        narrow = {i for i, kind in enumerate(kinds) if kind in ("i32", "u32", "fp32")}
        ways = [sent(lambda: call(planned, pointers, free), len(kinds), narrow)]
        arguments = *pointers, *free, *planned.numbers
        plain = lambda: planned.kernel[planned.grid](*arguments, **planned.constants, **planned.options)  # noqa: E731
        ways.append(sent(plain, len(kinds), narrow))
        row[0] += 1
        row[2] += [] if ways[0] == ways[1] else [str(ways)]

    launch.Planned.__call__ = compared
    try:
        large, odd, far = (200, 64, 304, 16), (33, 50, 70, 5), (1 << 40) + 3
        for shape, adapters, p, seed in (
            (large, FP32, 0.0, 0), (large, FP32, 0.3, far), (large, FP32, 0.3, 16), (odd, BF16, 0.3, far)
        ):  # fmt: skip
            for _ in range(3):  # with pointers of its own each time
                work(operands(*shape, adapters), p, seed)
    finally:
        launch.Planned.__call__ = call
    return found


def guarded():
    """What is changed -> (the way that a launch took, whether Triton got the same arguments)."""
    o, found, taken = operands(40, 64, 48, 16), {}, []
    planned = launch.Planned(
        triton_ops.lora_expand, (1, 1), (48, 0, 16, 16, 1, 48),
        {"RANK": 16, "BR": 16, "MASK": False, "BIAS": False, "PRECISION": "ieee", "BM": 64, "BN": 128}, torch.device("cpu"),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    plainly, y = launch.Planned._plainly, o["x"].new_empty(40, 48)
    pointers = o["s"], o["b"], o["s"], y

    def way(pointers, free):
        """Which way the launch goes."""
        taken.clear()
        planned(pointers, free)
        return "plain" if taken else "direct"

    launch.Planned._plainly = lambda self, *given: (taken.append(given), plainly(self, *given))[1]
    runtime, device = triton.knobs.runtime, launch.current_device
    try:
        assert way(pointers, (40, 0)) == "plain" and way(pointers, (40, 0)) == way(pointers, (17, 1)) == "direct"
        moved = torch.empty(40 * 16 + 1, dtype=BF16)[1:].view(40, 16)
        found["misaligned"] = way((moved, *pointers[1:]), (40, 0))
        found["64 bits"] = way(pointers, (40, 1 << 31))
        found["seed in memory"] = way(pointers, (40, torch.empty((), dtype=torch.int64, device="meta")))
        for name, hooks in (("enter hook", runtime.launch_enter_hook), ("exit hook", runtime.launch_exit_hook)):
            hook = lambda metadata: None  # noqa: E731
            hooks.add(hook)
            found[name] = way(pointers, (40, 0))
            hooks.remove(hook)
        runtime.debug = True
        found["debug"] = way(pointers, (40, 0))
        runtime.debug = False
        launch.current_device = lambda: 1
        found["device"] = way(pointers, (40, 0))
        launch.current_device = device
        os.environ["PLOPFAST_LAUNCH"] = "plain"
        other = launch.Planned(
            planned.kernel, planned.grid, planned.numbers, planned.constants, torch.device("cpu"), **planned.options
        )
        planned, kept = other, planned
        found["switch"] = [way(pointers, (40, 0)) for _ in range(2)][-1]
        planned = kept
        del os.environ["PLOPFAST_LAUNCH"]
        assert way(pointers, (40, 0)) == "direct"
    finally:
        launch.Planned._plainly = plainly
    return found


class Linear(nn.Module):
    def __init__(self, k, n):
        super().__init__()
        self.linear = nn.Linear(k, n, bias=False, dtype=BF16)

    def forward(self, x):
        return self.linear(x)


def step():
    """strategy -> launches of Triton's, (Python, C) calls, and plans that a second step makes, of one linear: forward and backward."""
    found, (m, k, n, r) = {}, (512, 1024, 768, 16)
    x, dy = torch.randn(m, k, dtype=BF16, requires_grad=True), torch.randn(m, n, dtype=BF16)
    for strategy in ("torch", "lora-first", "fused"):
        model = Linear(k, n)
        model.linear = LoRALinear(model.linear, r, 2.0 * r, backend=strategy)

        def one(model=model):
            model(x).backward(dy)

        with Prepared(model):
            one()
            plans = len(launch._plans)
            found[strategy] = {"launches": len(STUB.launches(one)), "calls": STUB.calls(one)}
            found[strategy]["plans"] = len(launch._plans) - plans
    try:
        import peft
    except ImportError:
        return found
    theirs = peft.get_peft_model(
        Linear(k, n), peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["linear"]), autocast_adapter_dtype=False
    )
    found["peft"] = {"launches": 0, "calls": STUB.calls(lambda: theirs(x).backward(dy))}
    return found


def group():
    """strategy -> as in `step`, of query, key and value together."""
    found, (m, k, r) = {}, (512, 1024, 16)
    x = torch.randn(m, k, dtype=BF16, requires_grad=True)
    dy = [torch.randn(m, n, dtype=BF16) for n in (1024, 256, 256)]
    for strategy in ("torch", "lora-first"):
        bases = [nn.Linear(k, one.shape[1], bias=False, dtype=BF16) for one in dy]
        model = nn.ModuleList([LoRALinear(base, r, 2.0 * r, backend=strategy) for base in bases])
        shared = SharedInput(list(model))
        for module in model:
            module.shared = shared

        def one(model=model):
            torch.autograd.backward([module(x) for module in model], dy)

        with Prepared(model):
            one()
            plans = len(launch._plans)
            found[strategy] = {"launches": len(STUB.launches(one)), "calls": STUB.calls(one)}
            found[strategy]["plans"] = len(launch._plans) - plans
    return found


def many():
    """ "together" and "apart", with a strategy -> as in `step`, of eight adapters on one weight: one call, and one linear for each."""
    found, (m, k, n, r, count) = {}, (512, 1024, 768, 16, 8)
    x, dy, w = (
        torch.randn(m, k, dtype=BF16, requires_grad=True),
        torch.randn(m, n, dtype=BF16),
        torch.randn(n, k, dtype=BF16),
    )
    a = [torch.randn(r, k, dtype=BF16, requires_grad=True) for _ in range(count)]
    b = [torch.randn(n, r, dtype=BF16, requires_grad=True) for _ in range(count)]
    cuts, scalings = [m * e // count for e in range(count + 1)], [2.0] * count

    def together(strategy):
        lora_linear_grouped(x, w, a, b, cuts, scalings, backend=strategy).backward(dy)

    def apart(strategy):
        parts = zip(x.split(m // count), a, b, strict=True)
        torch.cat([lora_linear(one, w, a_, b_, scaling=2.0, backend=strategy) for one, a_, b_ in parts]).backward(dy)

    for strategy in ("torch", "lora-first", "fused"):
        for way in (together, apart):
            run = functools.partial(way, strategy)
            run()
            plans = len(launch._plans)
            row = {"launches": len(STUB.launches(run)), "calls": STUB.calls(run)}
            found[f"{way.__name__}, {strategy}"] = row | {"plans": len(launch._plans) - plans}
    return found


def each():
    """launcher -> (Python, C) calls of one launch, once its plan is there."""
    o = operands(512, 1024, 768, 16)
    sums, parts = launch.summing(torch.device("cpu"), 2, (40, 4), BF16, 1.0), torch.randn(2, 40, 4)
    calls = {
        "expand": lambda: triton_ops.low_rank(o["s"], o["b"]),
        "row norms": lambda: triton_ops.row_norms(o["x"]),
        "sum": lambda: sums(parts),
        "norm": lambda: triton_blocks.rms_norm(o["x"], o["x"][0], 1e-6, "narrow"),
        "gate": lambda: triton_blocks.gate(o["x"], o["x"], "silu"),
        "d gate": lambda: triton_blocks.gate_grad(o["x"], o["x"], o["x"], "silu"),
    }
    calls |= quantized.each(o["w"])
    return {name: STUB.calls(call) for name, call in calls.items()}


def variants():
    """rate of dropout -> kernel -> how many variants 200 numbers of tokens and three ranks ask for in training.

    All weights have one shape. Nothing is compiled: Triton's hook sees the key of each variant and stops there.
    """
    draw, found, rate = random.Random(0), {0.0: {}, 0.1: {}}, 0.0

    def note(*, key, fn, **_):
        found[rate].setdefault(fn.name.split(".")[-1], set()).add(key)
        return True

    def train(m, rank, p, strategy):
        made = lambda *shape, dtype=BF16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        x, low = made(m, 1024), [(made(rank, 1024), made(n, rank)) for n in (1024, 1024, 1024)]
        weights, dy = [made(len(b), 1024) for _, b in low], [made(m, len(b)) for _, b in low]
        plan = library.plan_of(x, weights[0], rank, strategy, p > 0)
        seeds, dtypes = (1 << 40, 1 << 41, 1 << 42), (FP32, FP32)
        (a, b), w, need = low[0], weights[0], (True, True, True)
        s = library.shrink(x, a, 2.0, p, seeds[0], plan)
        library.forward(x, s, w, b, None, plan)
        library.backward(dy[0], x, s, w, a, b, 2.0, p, seeds[0], plan, need, dtypes)
        group = groups.Group(2.0, p, seeds, (rank,) * 3, plan)
        all_a, all_b = zip(*low, strict=True)
        s = groups.shrink(x, all_a, made(3 * rank, 1024), group)
        groups.forward(x, s, weights, all_b, [None] * 3, group)
        groups.backward(dy, x, s, weights, all_a, all_b, group, need, dtypes)
        rows(x, dy[0])
        segments(x, dy[0], made(8, 1024, 1024), made(8, rank, 1024, dtype=FP32), made(8, 1024, rank, dtype=FP32))
        if m == tokens[0]:
            for shape in ((1024, 1024), (999, 112)):
                quantized.decodings(*shape, (BF16, FP32, torch.float16), "meta")
        quantized.products(x, 1024, made(m, rank), made(1024, rank), plain=False)

    triton.knobs.runtime.jit_cache_hook = note
    try:
        tokens = [draw.randint(1, 16384) for _ in range(200)]
        for (i, m), rank, rate in itertools.product(enumerate(tokens), (8, 16, 64), found):  # note reads it
            if rate or i % 5 == 0:
                train(m, rank, rate, dispatch.STRATEGIES[i % 2])
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        launch.forget_plans()
    return {rate: {name: len(keys) for name, keys in kernels.items()} for rate, kernels in found.items()}


def warmed():
    """rate of dropout -> (variants that a warm-up asks for, those that steps of other numbers of tokens ask for, too)."""
    return {rate: _warmed(rate) for rate in (0.0, 0.1)}


class Experts(nn.Module):
    """The second weight of the two has an adapter."""

    has_gate, has_post_expert_norm, act_fn = True, False, nn.SiLU()

    def __init__(self, experts=4, width=256, inner=128):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * inner, width, dtype=BF16))
        self.down_proj = nn.Parameter(torch.zeros(experts, width, inner, dtype=BF16))

    def _apply_gate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x, chosen, weights):
        raise NotImplementedError  # its account in plopfast/models/experts.py is what runs


def adapted_experts(model):
    """Puts them into a model, with an adapter."""
    model["experts"] = Experts()
    mixture = Mixture(model["experts"], True)
    frozen = mixture.weight("down_proj")
    adapter = ExpertLoRA(frozen, 8, 16.0, rslora=False, lora_A=torch.zeros(4, 8, 128), backend="triton")
    inject_experts(model, "experts.down_proj", mixture, adapter)


def _warmed(rate):
    model = nn.ModuleDict({
        "q": nn.Linear(256, 256, dtype=BF16), "k": nn.Linear(256, 64, dtype=BF16), "o": nn.Linear(256, 256, dtype=BF16)
    })  # fmt: skip
    for name, base in [*model.items()]:
        model[name] = LoRALinear(base, 8, 16.0, dropout=rate, backend="lora-first")
    adapted_experts(model)
    shared = SharedInput([model["q"], model["k"]])
    model["q"].shared = model["k"].shared = shared
    kept, asked = Prepared(model.train()), []

    def note(*, key, fn, **_):
        asked.append((fn.name, key))
        return True

    triton.knobs.runtime.jit_cache_hook = note
    try:
        warm_up(kept, 4096)
        before = set(asked)
        for tokens in (2, 17, 60, 1000, 2500, 4096, 7000):
            x = torch.zeros(tokens, 256, dtype=BF16, requires_grad=True)
            with kept:
                sum(one(x).sum() for name, one in model.items() if name != "experts").backward()
                chosen = torch.arange(2 * tokens).view(tokens, 2) % 4
                model["experts"](x, chosen, torch.ones(tokens, 2, dtype=BF16)).sum().backward()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        launch.forget_plans()
    return len(before), len(set(asked) - before)


if __name__ == "__main__":
    as_a_gpu()
    sections = [
        variants,
        warmed,
        same,
        guarded,
        step,
        group,
        many,
        each,
    ]  # the first two compile nothing, and must come first
    import sys

    only = sys.argv[1:]
    print(json.dumps({section.__name__: section() for section in sections if not only or section.__name__ in only}))
