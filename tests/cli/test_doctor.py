"""The doctor calls a sound machine healthy, and says what is wrong with a sick one. Every defect here is planted."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import SMALL as SIDES, build

import plopfast as pf
from plopfast.cli import doctor, doctor_blocks
from plopfast.kernels import compile_time, dispatch, philox, torch_ops
from plopfast.support import machine
from plopfast.support.errors import BackendError, ConfigError

SMALL = [case for case in doctor.CASES if case.m * case.n * case.k < 4e6][:6]
WITH_DROPOUT = [case for case in SMALL if case.dropout][:1]
KERNELS = ["torch kernels in torch.float32", "torch kernels in torch.bfloat16"]


@pytest.fixture
def examine(model_folder, monkeypatch):
    """examine(cases=..., options...) -> (all lines in one text, the names of the failed checks)"""

    def run(*, cases=SMALL[:1], **options):
        monkeypatch.setattr(doctor, "CASES", cases)
        lines = []
        healthy = doctor.examine(**{"model": str(model_folder), "device": "cpu", "out": lines.append} | options)
        failed = [line[8:].split(": ")[0] for line in lines if line.startswith("FAILED")]
        verdict = f" checks failed: {'; '.join(failed)} (" if failed else " checks passed ("
        assert verdict in lines[-1] and healthy == (not failed) == lines[-1].startswith("healthy: ")
        return "\n".join(lines), failed

    return run


def test_healthy(examine):
    text, failed = examine(cases=SMALL)
    assert not failed and "healthy: 16 checks passed" in text, text
    for name in KERNELS:
        assert f"ok      {name}: 6 of 6 cases; the worst: " in text
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"{name}: relative difference from PEFT's: y " in text and f"   3 x {name} " in text
    assert "backend: auto is torch on cpu: " in text and "32 -> 48" in text and "layers.1." in text


def test_every_shape_is_tried_in_every_variant():
    cases = doctor.CASES
    assert set(cases) == {doctor.Case(*shape, *variant) for shape in doctor.SHAPES for variant in doctor.VARIANTS}
    least = cases[: doctor.LEAST]
    assert {(case.m, case.n, case.k, case.r) for case in least} == set(doctor.SHAPES)
    assert {(case.dropout, case.bias, case.views) for case in least} == set(doctor.VARIANTS)


def test_the_seed_is_of_the_kind_that_training_draws(examine, monkeypatch):
    """Triton compiles one kernel for seeds of 32 bits and another for 64 bits; training draws from 0 to 2^62."""
    seen, drop = [], torch_ops._drop
    monkeypatch.setattr(torch_ops, "_drop", lambda x, p, seed: seen.append((p, seed)) or drop(x, p, seed))
    assert not examine(cases=WITH_DROPOUT)[1]
    assert all(1 << 32 <= seed < 1 << 62 for p, seed in seen if p) and any(p for p, _ in seen)


def scaled(function, factor):
    return lambda *arguments: function(*arguments) * factor


@pytest.mark.parametrize(
    ("name", "result"),
    [("forward", "y"), ("grad_x", "x"), ("grad_a", "lora_A"), ("grad_b", "lora_B"), ("row_norms", "row_norms"),
     ("frozen_norms", "linear_norms")],
)  # fmt: skip
def test_a_kernel_that_is_off_by_a_percent(examine, monkeypatch, name, result):
    monkeypatch.setattr(torch_ops, name, scaled(getattr(torch_ops, name), 1.01))
    text, failed = examine()
    assert KERNELS[0] in failed and f"FAILED  {KERNELS[0]}: 1 wrong in 1 of 1 cases" in text
    assert " of the allowed error at M=63 N=507 K=123 R=5 dropout=0.0" in text and f"the worst: {result} has" in text
    assert any("q_proj" in check for check in failed) == (not name.endswith("norms")), "PEFT's layer tells, too"
    assert "32 -> 48" in text, "the other checks ran"


def test_nan(examine, monkeypatch):
    monkeypatch.setattr(torch_ops, "grad_a", scaled(torch_ops.grad_a, float("nan")))
    text, failed = examine()
    assert failed[:2] == KERNELS and "lora_A has inf of the allowed error" in text


def test_one_bit_of_the_mask(examine, monkeypatch):
    def flipped(x, p, seed):
        if not p:
            return x
        keep = philox.keep_mask(seed, *x.shape, p)
        keep[-1, -1] ^= True
        return x * keep

    monkeypatch.setattr(torch_ops, "_drop", flipped)
    text, failed = examine(cases=WITH_DROPOUT)
    assert failed == KERNELS and "the dropout mask of y, lora_A, lora_B is not the CPU's at M=" in text


def test_results_that_change_from_run_to_run(examine, monkeypatch):
    factors = iter(1 + 1e-6 * i for i in range(1000))
    forward = torch_ops.forward
    monkeypatch.setattr(torch_ops, "forward", lambda *arguments: forward(*arguments) * next(factors))
    text, failed = examine()
    assert KERNELS[0] in failed and "a second run gives other bits in y" in text


def test_a_layer_that_is_wrong_where_the_kernels_are_right(examine, monkeypatch):
    monkeypatch.setattr(pf.LoRALinear, "scaling", property(lambda self: self.alpha / self.rank**0.5))
    text, failed = examine()
    assert len(failed) == 7 and all(name.startswith("model.layers.1.") for name in failed)
    assert "the error is too large; relative difference from PEFT's: " in text


def test_a_check_that_crashes_leaves_the_others(examine, monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda: 1 // 0)
    text, failed = examine()
    assert failed == ["machine"] and "FAILED  machine: ZeroDivisionError: " in text and "1 of 16 checks" in text


def test_a_case_that_crashes_counts_as_one(examine, monkeypatch):
    forward = torch_ops.forward

    def crashing(x, *arguments):
        if len(x) == 1:
            raise RuntimeError("no kernel image\nis available")
        return forward(x, *arguments)

    monkeypatch.setattr(torch_ops, "forward", crashing)
    text, failed = examine(cases=SMALL)
    assert failed == KERNELS
    assert "1 wrong in 6 of 6 cases; the worst: RuntimeError: no kernel image is available at M=1 " in text


def test_ctrl_c_passes(examine, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "describe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        examine()


def test_without_peft(examine, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    text, failed = examine()
    assert not failed and text.count("relative difference from plain torch's (") == 7
    assert "to compare with PEFT's: pip install peft" in text


def test_time_limit(examine):
    tiny = [case for case in doctor.CASES if case.m * case.n * case.k < 2e5]
    assert len(tiny) > doctor.LEAST
    text, failed = examine(cases=tiny, seconds=0)
    assert not failed and text.count(f": {doctor.LEAST} of {len(tiny)} cases") == 2, "so many, whatever the limit"
    text, failed = examine(cases=tiny, seconds=600)
    assert not failed and text.count(f": {len(tiny)} of {len(tiny)} cases") == 2


def test_modules_smaller_than_the_rank(examine, tmp_path, tokenizer):
    config = transformers.LlamaConfig(**SIDES | {"num_key_value_heads": 1})  # keys and values of 8
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    text, failed = examine(model=str(tmp_path / "narrow"))
    assert not failed and "32 -> 8" in text, text


def test_no_such_model(examine, tmp_path):
    text, failed = examine(model=str(tmp_path / "absent"))
    assert failed == ["model"] and "ModelError: " in text and "proj" not in text


def test_no_such_device(examine):
    with pytest.raises(ConfigError, match="cannot be used on this machine"):
        examine(device="cuda:7")


@pytest.mark.parametrize("backend", ["triton", "fused", "lora-first"])
def test_a_backend_that_cannot_run(examine, backend):
    text, failed = examine(backend=backend)
    assert failed == ["backend"] and f"BackendError: backend '{backend}' cannot run on cpu: " in text
    assert "the checks below use backend auto is torch on cpu" in text


def test_triton_kernels_under_the_interpreter():
    code = f"""
import torch
from plopfast.cli import doctor, doctor_blocks
doctor.CASES = [case for case in doctor.CASES if str(case) in {[str(case) for case in SMALL[2:4]]}]
for strategy in ("fused", "lora-first"):
    print(doctor.kernels(torch.device("cpu"), strategy, torch.float32, 60))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 cases; the worst: ") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transposed_weights_in_16_bits(examine, tmp_path, tokenizer, dtype):
    build("gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text, failed = examine(model=str(tmp_path), dtype=dtype)
    assert not failed and f"torch kernels in {dtype}: 1 of 1" in text, text
    assert "attn.c_proj: relative difference from PEFT's: y " in text


def test_module_paths(llama):
    rows = doctor.module_paths(llama, torch.device("cpu"), torch.float32, backend="torch")
    assert [row[:3] for row in rows] == [
        (3, "q_proj", "32 -> 32"), (3, "k_proj", "32 -> 16"), (3, "v_proj", "32 -> 16"), (3, "o_proj", "32 -> 32"),
        (3, "gate_proj", "32 -> 48"), (3, "up_proj", "32 -> 48"), (3, "down_proj", "48 -> 32"),
    ]  # fmt: skip
    assert {row[3] for row in rows} == {"torch, lora-first (chosen)"}
    with pytest.raises(BackendError, match="'fused' cannot run on cpu: "):
        doctor.module_paths(llama, torch.device("cpu"), torch.float32, backend="fused")


def test_the_path_with_dropout_is_named_where_it_differs(llama, monkeypatch):
    monkeypatch.setattr(dispatch, "cannot_run", lambda device: "")
    monkeypatch.setattr(dispatch, "target_of", lambda device: dispatch.Target("sm_90", 132))
    dispatch.plan.cache_clear()
    try:
        paths = {row[3] for row in doctor.module_paths(llama, torch.device("cpu"), torch.bfloat16)}
    finally:
        dispatch.plan.cache_clear()
    (path,) = paths
    assert (
        path.startswith("torch, lora-first (default: not measured")
        and "; with dropout triton, lora-first, expand" in path
    )


class SlowCompiler:
    """Each case takes a minute, all of which the compiler needs, or none."""

    def __init__(self, monkeypatch, compiles):
        self.now, self.running, self.kernels = 0.0, [], 0
        monkeypatch.setattr(doctor.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(doctor.compile_time, "watched", self.watched)
        case = doctor._case

        def slow(*arguments):
            self.now += 60
            for one in self.running if compiles else ():
                one.seconds, one.kernels = one.seconds + 60, one.kernels + 2
            return case(*arguments)

        monkeypatch.setattr(doctor, "_case", slow)

    @contextlib.contextmanager
    def watched(self):
        one = compile_time.Compiling()
        self.running.append(one)
        yield one
        self.running.remove(one)


def test_the_time_of_compiling_does_not_count(examine, monkeypatch):
    """The first visit checks as much as later ones, and says how long it compiled."""
    tiny = [case for case in doctor.CASES if case.m * case.n * case.k < 2e5]
    SlowCompiler(monkeypatch, compiles=True)
    text, failed = examine(cases=tiny, seconds=60)
    each = (
        f": {len(tiny)} of {len(tiny)} cases, and {60 * len(tiny)} s for compiling {2 * len(tiny)} kernels; the worst: "
    )
    assert not failed and text.count(each) == 2, text
    assert f"checks passed ({120 * len(tiny)} s, and {120 * len(tiny)} s for compiling {4 * len(tiny)} kernels)" in text


def test_slow_cases_count(examine, monkeypatch):
    tiny = [case for case in doctor.CASES if case.m * case.n * case.k < 2e5]
    SlowCompiler(monkeypatch, compiles=False)
    text, failed = examine(cases=tiny, seconds=60)
    assert not failed and text.count(f": {doctor.LEAST} of {len(tiny)} cases; the worst: ") == 2, text


def test_dense_cases_take_copies_of_the_adapters_as_training_does(monkeypatch):
    """So the kernels that are checked are those that training compiles: adapters in x's dtype, gradients in float32."""
    seen, linear = [], doctor.lora_linear

    def noted(x, *arguments, low, **options):
        seen.append(None if low is None else (low[0].dtype, low[1].dtype, low[0].requires_grad))
        return linear(x, *arguments, low=low, **options)

    monkeypatch.setattr(doctor, "lora_linear", noted)
    for case in SMALL:
        seen.clear()
        doctor._case(torch.device("cpu"), "torch", torch.bfloat16, case)
        assert set(seen) == {None if case.views else (torch.bfloat16, torch.bfloat16, False)}
    assert {case.views for case in SMALL} == {False, True}


@pytest.mark.parametrize(
    "name", ["rms_norm", "gate", "rotary", "chunked_cross_entropy", "apply", "lora_linear_grouped"]
)
def test_a_wrong_operation_beside_the_products_is_named(name, monkeypatch):
    places = {
        "rotary": doctor_blocks.library_rows,
        "chunked_cross_entropy": doctor_blocks,
        "apply": doctor_blocks.Adapted,
        "lora_linear_grouped": doctor_blocks,
    }
    where = places.get(name, doctor_blocks.block_ops)
    right, cpu = getattr(where, name), torch.device("cpu")
    assert doctor_blocks.blocks(cpu, "auto", torch.float32).startswith("68 results")
    said = {
        "rms_norm": "RMSNorm", "rotary": "rotary embedding", "chunked_cross_entropy": "cross-entropy", "apply": "experts",
        "lora_linear_grouped": "several adapters",
    }.get(name, name)  # fmt: skip

    def wrong(*arguments, **how):
        backend = how.get("backend", arguments[-1])
        found = right(*arguments, **how)
        if backend == "torch":
            return found
        return tuple(one * 1.001 for one in found) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(ArithmeticError, match=f"results are wrong; the worst: {said}'s (result|gradient)"):
        doctor_blocks.blocks(cpu, "auto", torch.float32)
