"""The guards of launches, with fakes in place of GPUs: device, stream, CUDA graph. And what never makes a variant."""

import contextlib
import importlib.util
import random
from types import SimpleNamespace

import aot
import aot_jobs
import pytest
import torch

from plopfast.kernels import dispatch, library
from plopfast.lora.ops import new_seed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists for Linux only")
PLAN = dispatch.Plan("triton", "lora-first", dispatch.SAFE_TILES[0], "")


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of torch's, the first of them current; `now` is the current one."""
    state = SimpleNamespace(now=0)

    @contextlib.contextmanager
    def device(which):
        before, state.now = state.now, torch.device(which).index
        yield
        state.now = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.now)
    monkeypatch.setattr(torch.cuda, "device", device)
    return state


def on(index, kind="cuda", address=256):
    return SimpleNamespace(device=torch.device(kind, index), data_ptr=lambda: address, is_cuda=kind == "cuda")


def test_a_launch_makes_its_tensors_device_the_current_one(gpus):
    from plopfast.kernels.launch import on_device

    for index in (0, 1):
        with on_device(on(index)):
            assert gpus.now == index
        assert gpus.now == 0
    with on_device(on(0, "cpu")):
        assert gpus.now == 0


def recorder(seen, note):
    """A kernel that notes what it is launched with, and is never compiled."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append((note(), grid, arguments, constants))

    return Kernel()


def test_a_plain_launch_of_a_plan_is_on_the_tensors_device(gpus):
    from plopfast.kernels.launch import Planned

    seen, pointers = [], (on(1), on(1))
    Planned(recorder(seen, lambda: gpus.now), (3, 2), (5, 0.5), {"BM": 16}, torch.device("cuda", 1), num_warps=4)(
        pointers, (7,)
    )
    assert seen == [(1, (3, 2, 1), (*pointers, 7, 5, 0.5), {"BM": 16, "num_warps": 4})]


def planned(monkeypatch, device, seen):
    """A plan whose compiled kernel is a fake; and what is current, which can be changed."""
    from plopfast.kernels import launch

    current = SimpleNamespace(device=device, stream=11)
    monkeypatch.setattr(launch, "current_device", lambda: current.device)
    monkeypatch.setattr(launch, "current_stream", lambda index: (index, current.stream))
    found = launch.Planned(recorder(seen, lambda: "plain"), (3,), (5,), {"BM": 16}, torch.device("cuda", device))
    found.run, found.function, found.packed = lambda *all_: seen.append(all_), "function", "packed"
    found.small, found.tail = (True,), (5, 16)
    return found, current


def test_the_stream_is_read_at_each_direct_launch(monkeypatch, gpus):
    """Of the plan's device. A stream that was current when the plan was made may be gone."""
    seen, pointers = [], (on(1), on(1))
    launch, current = planned(monkeypatch, 1, seen)
    for current.stream in (11, 12):
        launch(pointers, (7,))
    head = ("function", "packed", None, None, None)
    assert seen == [(3, 1, 1, (1, stream), *head, *pointers, 7, 5, 16) for stream in (11, 12)]


@pytest.mark.parametrize("why", ["device", "pointer", "number"])
def test_what_the_compiled_kernel_was_not_made_for_takes_the_plain_way(why, monkeypatch, gpus):
    seen = []
    launch, current = planned(monkeypatch, 1, seen)
    current.device = 0 if why == "device" else 1
    launch((on(1), on(1, address=264 if why == "pointer" else 256)), (1 << 31 if why == "number" else 7,))
    assert [one[0] for one in seen] == ["plain"]


def test_a_kernel_without_plans_is_launched_on_the_tensors_device(monkeypatch):
    from plopfast.kernels import launch, triton_ops

    entered, seen = [], []

    @contextlib.contextmanager
    def guard(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    monkeypatch.setattr(triton_ops, "on_device", guard)
    monkeypatch.setattr(dispatch, "target_of", lambda device: dispatch.Target("sm_90", 3))
    monkeypatch.setattr(triton_ops, "lora_gemm_tma", recorder(seen, lambda: len(entered)))
    launch.forget_plans()
    x, w = torch.zeros(300, 64, dtype=torch.bfloat16), torch.zeros(520, 64, dtype=torch.bfloat16)
    triton_ops.gemm(x, w, tiles=dispatch.GEMM_TILES["sm_90"][0])
    launch.forget_plans()
    ((guards, grid, _, constants),) = seen
    assert (guards, grid, constants["GROUP"]) == (1, (3,), 8)  # one program for each SM, nine tiles


@pytest.mark.parametrize("m, programs", [(300, 5 * 9), (16, 9)])
def test_programs_of_the_nf4_kernels(m, programs, monkeypatch):
    """A program for each tile, 64 tiles of blocks; tiles are grouped, and no multiply-add is made of a double-quantised
    absmax."""
    from plopfast.kernels import launch, nf4, nf4_ops

    seen, second = [], (torch.ones(256), torch.ones(3), 0.5)
    for kernel in ("lora_gemm_nf4", "decode_nf4"):
        monkeypatch.setattr(nf4, kernel, recorder(seen, lambda: 0))
    launch.forget_plans()
    x, w = torch.zeros(m, 64, dtype=torch.bfloat16), torch.zeros(520, 64, dtype=torch.bfloat16)
    packed, absmax = torch.zeros(520 * 32, dtype=torch.uint8), torch.zeros(520, dtype=torch.uint8)
    nf4_ops.gemm(x, packed, absmax, second, 520)
    nf4_ops.decode(packed, absmax, second, w)
    launch.forget_plans()
    product, decoding = seen
    assert product[1] == (programs, 1, 1) and product[3]["GROUP"] == 8 and decoding[1] == (9, 1, 1)
    for _, _, arguments, constants in seen:
        assert 0.5 in [one for one in arguments if type(one) is float] and constants["DOUBLE"]
        assert constants["enable_fp_fusion"] is False


@pytest.mark.parametrize("capturing", [False, True])
def test_dropout_in_a_cuda_graph_is_refused(capturing, monkeypatch):
    """A replay would repeat its mask. Nothing is refused without dropout, on the path of torch, and with a seed that the graph
    draws."""
    from plopfast.kernels import torch_ops, triton_ops

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(triton_ops, "shrink_stacked", lambda *_, **__: ["kernel"])
    monkeypatch.setattr(triton_ops, "shrink", lambda *_, **__: "kernel")
    monkeypatch.setattr(torch_ops, "shrink", lambda *_: "torch")
    a = torch.zeros(2, 4)
    refused = pytest.raises(RuntimeError, match="would repeat one mask") if capturing else contextlib.nullcontext()
    with refused:
        assert library.shrink(on(0), a, 1.0, 0.5, 3, PLAN) == "kernel"
    assert library.shrink(on(0), a, 1.0, 0.0, 3, PLAN) == "torch"
    assert library.shrink(on(0), a, 1.0, 0.5, torch.tensor(3), PLAN) == "kernel"
    assert library.shrink(on(0, "cpu"), a, 1.0, 0.5, 3, PLAN) == "kernel"


def test_a_seed_is_drawn_where_it_is_read(monkeypatch):
    """In a CUDA graph by the GPU, whose generator draws anew at each replay, and never read by the host; else on the CPU."""
    drawn = []
    monkeypatch.setattr(torch, "randint", lambda high, size, device: drawn.append((high, size, str(device))))
    for device, capturing in (("cuda", True), ("cuda", False), ("cpu", True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        new_seed(torch.device(device))
    assert drawn == [(1 << 62, (), "cuda"), (1 << 62, (), "cpu"), (1 << 62, (), "cpu")]


def test_a_seed_on_a_gpu_is_not_waited_for():
    there = torch.empty((), dtype=torch.int64, device="meta")  # reading it would be an error
    c, seed = library.factors(2.0, 0.5, there)
    assert seed is there and c == 4.0
    assert library.factors(2.0, 0.5, torch.tensor(7)) == (4.0, 7) and library.factors(2.0, 0.0, there) == (2.0, 0)


def specialisations(calls):
    """kernel -> {what it would be compiled for, constants apart}, over `calls` made for one GPU. Compiles nothing."""
    from triton.runtime.jit import JITFunction

    found = {}

    def run(kernel, *arguments, grid, warmup, **options):
        binder = kernel.device_caches["sm_90"][-1]
        bound, specialization, _ = binder(*arguments, debug=False, **options)
        free = [kind for param, kind in zip(kernel.params, specialization, strict=True) if not param.is_constexpr]
        assert len(bound) == len(specialization) == len(kernel.params)
        found.setdefault(kernel.fn.__name__, set()).add(str(free))

    with aot.compiling("sm_90"):
        compiling, JITFunction.run = JITFunction.run, run
        try:
            for call in calls:
                call()
        finally:
            JITFunction.run = compiling
    return found


# 1 and multiples of 16 are what Triton specialises, numbers from 2^31 on are of another type
TOKENS = sorted({1, 2, 15, 16, 17, 32, 1024, 16384} | {random.Random(0).randrange(1, 16384) for _ in range(25)})
SEEDS = ((1 << 32) + 1, (1 << 40) + 16, (1 << 62) - 3)


def test_neither_tokens_nor_seeds_nor_dropout_rates_make_a_variant():
    """A step with another number of tokens must not wait for a compiler."""
    settings = [(m, p, seed) for m, seed in zip(TOKENS, SEEDS * len(TOKENS), strict=False) for p in (0.1, 0.25)]
    for name in aot_jobs.launchers(1, 0.1, SEEDS[0]):
        found = specialisations(aot_jobs.launchers(*one)[name] for one in settings)
        assert found and all(len(kinds) == 1 for kinds in found.values()), f"{name}: {found}"


def test_tf32_is_taken_where_torch_may_and_the_gpu_has_it(monkeypatch):
    from plopfast.kernels.launch import precision

    matmul, found = torch.backends.cuda.matmul, {}
    default = matmul.fp32_precision
    try:
        for name in aot.LIMITS:
            monkeypatch.setattr(dispatch, "target_of", lambda device, name=name: dispatch.Target(name, 100))
            for matmul.fp32_precision in ("tf32", "ieee"):
                for dtype in (torch.float32, torch.bfloat16):
                    found[name, matmul.fp32_precision, dtype] = precision(torch.zeros(1, dtype=dtype))
    finally:
        matmul.fp32_precision = default
    have = {name for name in aot.LIMITS if name.startswith("sm_") or name == "gfx942"}
    assert {key for key, value in found.items() if value == "tf32"} == {(name, "tf32", torch.float32) for name in have}


CARDS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@pytest.mark.parametrize("name", CARDS)
def test_launches_fill_the_card_and_load_ahead(name, monkeypatch):
    """At least two programs for three SMs, and two tiles in flight or more in each, whatever the tokens."""
    from plopfast.kernels import grids, launch

    target, made = dispatch.Target(name, CARDS[name]), []
    monkeypatch.setattr(dispatch, "target_of", lambda device: target)
    monkeypatch.setattr(launch.Planned, "__call__", lambda planned, *_: made.append(planned))
    for m in (2048, 8192, 16384):
        launch.forget_plans()
        for call in aot_jobs.launchers(m, 0.1, SEEDS[0], n=4096, k=4096).values():
            call()
    launch.forget_plans()
    split = [one for one in made if one.kernel.__name__ in ("lora_shrink", "lora_grads")]
    assert len(split) >= 9 and grids.STAGES > 1
    for one in split:
        assert one.grid[0] * one.grid[1] >= 2 / 3 * target.units, (one.kernel.__name__, one.grid)
        assert one.options["num_stages"] > 1


def test_segments_of_rank_32_take_eight_warps():
    """dA of segments spills in four, beside the numbers of the segments; other ranks and one linear do not."""
    from plopfast.kernels.grids import grads_grid

    target, bf16 = dispatch.Target("sm_90", 132), torch.bfloat16
    found = [grads_grid(target, bf16, 4096, 4096, rank, False, segments=8)[2] for rank in (16, 17, 32, 64)]
    assert found == [4, 8, 8, 8]
    assert grads_grid(target, bf16, 4096, 4096, 32, False)[2] == 4
    rdna = dispatch.Target("gfx1100", 48)
    assert grads_grid(rdna, bf16, 4096, 4096, 8, True, segments=8)[:2] == (32, 64), "64 rows spill there"


def test_compile_time_is_counted(monkeypatch):
    """Once for each kernel, in nested blocks too; a kernel from the cache on disk takes time, but is not compiled."""
    from triton import knobs

    from plopfast.kernels import compile_time, reduce

    with aot.compiling("sm_90"), compile_time.watched() as outer:
        for anew, kernels in ((True, 1), (False, 0)):
            monkeypatch.setattr(knobs.compilation, "always_compile", anew)
            reduce.sum_partials.device_caches.clear()
            with compile_time.watched() as inner:
                for _ in range(2):
                    reduce.sum_partials[1,](x := torch.zeros(9), x, 3, 3, 2.5, ROOT=False, BLOCK=64, num_warps=1)
            assert inner.kernels == kernels and inner.seconds > 0
    assert outer.kernels == 1 and outer.seconds > inner.seconds and knobs.compilation.listener is None
