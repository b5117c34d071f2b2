"""The formulas of traffic.py give exactly the bytes and FLOPs that the checked interpreter counts, for every launch.

So what they say about real shapes, which are too large to count, can be relied on.
"""

import peft_path
import pytest
import torch
from cases import BF16, FP32, operands as random_operands
from interpreter import checked
from traffic import FORMULAS, PATHS, SEED, SMALL, cost, launches_of, operands, recorded, table_bytes

from plopfast.kernels import dispatch, reference, triton_ops

H100, A100 = dispatch.Target("sm_90", 132), dispatch.Target("sm_80", 108)
MANY = dispatch.Target("interpreter", 64)  # as many programs as make parts of dS and of dB, and of S
LLAMA_3_8B = {
    "q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
    "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
}  # fmt: skip
TOKENS, RANK = 16384, 16

COUNTED = ["fused", "lora-first", "peft"]
# M, N, K, R, dtypes of X and of the adapters, bias; p, target
CASES = [
    (1, 1, 1, 1, BF16, FP32, True, 0.25, SMALL),
    (7, 33, 20, 3, BF16, BF16, False, 0.25, SMALL),
    (65, 47, 40, 5, BF16, FP32, True, 0.0, MANY),
    (32, 64, 64, 16, BF16, FP32, False, 0.25, MANY),
    (20, 150, 24, 8, BF16, FP32, True, 0.0, SMALL),
    (20, 40, 24, 100, FP32, FP32, True, 0.25, SMALL),
    (20, 24, 520, 16, BF16, FP32, False, 0.0, H100),
    (70, 136, 72, 24, BF16, FP32, True, 0.25, H100),
    (66, 40, 136, 16, BF16, BF16, False, 0.0, A100),
]


def compare(launches, check):
    """Every Triton launch's formula with what was counted, argument by argument."""
    launches = [launch for launch in launches if launch.kernel != "addmm_"]
    assert [launch.kernel for launch in launches] == [counted.kernel for counted in check.launches]
    for launch, counted in zip(launches, check.launches, strict=True):
        formula = cost(launch)
        loaded = {name: found.load.launch_bytes for name, found in counted.args.items() if found.load.lanes}
        stored = {name: found.store.launch_bytes for name, found in counted.args.items() if found.store.lanes}
        assert (launch.kernel, formula.loads, formula.stores) == (launch.kernel, loaded, stored)
        assert sum(counted.flops.values()) == formula.executed >= formula.useful
        assert formula.bytes == counted.compulsory()
    assert not check.atomics()


@pytest.mark.parametrize("path", COUNTED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula_is_count(case, path):
    o, (p, target) = operands(*case[:7]), case[7:]
    with checked(race=False, compute=False) as check:
        step = launches_of(path, o, p, target)
    compare(step.forward + step.backward, check)


@pytest.mark.parametrize("target", [MANY, H100], ids=str)
def test_formula_is_count_for_norms_and_stacked_adapters(target):
    o, more = operands(12, 40, 264, 8, bias=True), [operands(12, 40, 264, 8).a for _ in range(2)]
    with checked(race=False, compute=False) as check, recorded(target) as launches:
        triton_ops.shrink_stacked(o.x, (o.a, *more), 1.0, 0.25, (1, 2, 3), norms=True)
        triton_ops.shrink_stacked(o.x, (o.a, more[0]), 1.0)
        triton_ops.gemm(o.x, o.w, norms=True)
        triton_ops.frozen_norms(o.x, o.w)
        triton_ops.row_norms(o.dy, o.bias)
        triton_ops.row_norms(o.dy)
    compare(launches, check)


def test_cases_reach_every_formula_and_every_sum_of_parts():
    kernels, split = set(), set()
    for case in CASES:
        for path in COUNTED:
            step = launches_of(path, operands(*case[:7], device="meta"), *case[7:])
            for launch in step.forward + step.backward:
                kernels.add(launch.kernel)
                if launch.kernel == "lora_shrink" and launch.grid[1] > 1:
                    split.add("S")
                if launch.kernel == "lora_grads":
                    names = ("dS", "dB") if launch.WITH_DS else ("", "dA")
                    split |= {name for name, parts in zip(names, launch.grid, strict=True) if parts > 1}
    assert kernels == set(FORMULAS) - {"row_norms"} and split - {""} == {"S", "dS", "dB", "dA"}


def outside(launches):
    return sum(cost(launch).outside for launch in launches)


def llama(path, p=0.0, target=H100, tokens=TOKENS):
    """((bytes outside the frozen products' operands, the table's) forward, the same backward), summed over a layer."""
    halves = [[0, 0], [0, 0]]
    for k, n in LLAMA_3_8B.values():
        o = operands(tokens, n, k, RANK, device="meta")
        step, table = launches_of(path, o, p, target), table_bytes(path, o, p)
        for half, launches, floor in zip(halves, (step.forward, step.backward), table, strict=True):
            half[0] += outside(launches)
            half[1] += floor
    return halves


@pytest.mark.parametrize("target", [H100, A100], ids=str)
@pytest.mark.parametrize("path", ["fused", "lora-first"])
def test_within_five_percent_of_the_floor(path, target):
    """One Llama-3-8B layer, forward and backward: fused X | Y + X, LoRA-first X + Y | Y + 2X."""
    forward, backward = llama(path, target=target)
    assert 1 <= forward[0] / forward[1] <= 1.05
    assert 1 <= (forward[0] + backward[0]) / (forward[1] + backward[1]) <= 1.05


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_peft_moves_what_the_table_says(p):
    for moved, table in llama("peft", p):
        assert 1 <= moved / table <= 1.01


@pytest.mark.parametrize("path", ["fused", "lora-first"])
def test_dropout_moves_no_byte(path):
    """The mask is never stored, in any dtype."""
    assert llama(path, 0.1) == llama(path)


def test_the_frozen_product_is_found_once_in_each_half():
    for path in PATHS:
        step = launches_of(path, operands(8, 8, 8, 8, bias=True, device="meta"), 0.5)
        assert [sum(launch.frozen for launch in half) for half in (step.forward, step.backward)] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------- PEFT
ATEN = {"lora_gemm": "mm", "scale": "mul", "add": "add", "dropout": "native_dropout",
        "dropout_backward": "native_dropout_backward"}  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_peft_path_launches_what_peft_launches(p, monkeypatch):
    """5 and 7 launches; with dropout 6 and 8."""
    peft = pytest.importorskip("peft")
    # on a GPU torch takes the op that makes y and mask in one kernel; on the CPU it takes three others
    monkeypatch.setattr(
        torch.nn.functional, "dropout", lambda x, p, train, inplace: torch.native_dropout(x, p, train)[0]
    )
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=["0"])
    base = torch.nn.Sequential(torch.nn.Linear(20, 33, bias=False, dtype=BF16))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    x, dy = torch.zeros(7, 20, dtype=BF16, requires_grad=True), torch.zeros(7, 33, dtype=BF16)
    with _Operations() as forward:
        y = model(x)
    with _Operations() as backward:
        y.backward(dy)
    step = launches_of("peft", operands(7, 33, 20, 4, device="meta"), p)
    assert [ATEN[launch.kernel] for launch in step.forward] == forward.names
    assert sorted(ATEN[launch.kernel] for launch in step.backward) == sorted(backward.names)
    assert (len(forward.names), len(backward.names)) == ((6, 8) if p else (5, 7))


class _Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operations that compute, which views do not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__.rstrip("_"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_peft_path_computes_a_lora_linear(p):
    o = random_operands(45, 40, 56, 5, BF16)
    with checked():
        y, saved = peft_path.forward(o.x, o.w, o.a, o.b, o.bias, 1.7, p, SEED)
        dx, da, db = peft_path.backward(o.dy, saved, o.w, o.a, o.b, 1.7, p)
    keep, q = (saved[2].bool(), 1 / (1 - p)) if p else (None, 1.0)
    assert p == 0 or abs(keep.double().mean() - (1 - p)) < 0.05
    want = reference.lora_linear_grads(o.dy, o.x, o.w, o.a, o.b, 1.7, keep, q)
    want["y"] = reference.lora_linear(o.x, o.w, o.a, o.b, 1.7, o.bias, keep, q)
    for name, got in {"y": y, "x": dx, "lora_A": da, "lora_B": db}.items():
        assert (got.double() - want[name]).norm() <= 0.01 * want[name].norm(), name
