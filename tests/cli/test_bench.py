"""Dry runs of the benchmark: the code that runs on a GPU, on the CPU. Nothing here says how fast anything is."""

import importlib.util
import json
import sys
import types

import pytest
import torch

from plopfast.cli import bench as benchmark, bench_cases, bench_timing
from plopfast.cli.bench_cases import Case
from plopfast.kernels import dispatch, torch_ops
from plopfast.lora import tuning
from plopfast.support.errors import BackendError, ConfigError, FileError

OPS = {"shrink", "expand", "grads dS+dB", "grad dA", "row norms", "gemm", "gemm + low rank"}
PARTS = {f"{kind} {part}" for kind in ("linear", "layer") for part in ("forward", "backward", "step")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLOPFAST_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    dispatch.use_table({})


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new"
    rows, text = benchmark.run(out, dry=True)
    return out, rows, text


def test_dry_run_writes_marked_rows(dry):
    out, rows, text = dry
    assert [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()] == rows
    assert {row["op"] for row in rows} == OPS | PARTS
    for row in rows:
        assert row["dry"] is True and row["gpu"] == "" and row["peak_mib"] is None
        assert 0 < row["q20_ms"] <= row["median_ms"] <= row["q80_ms"] and row["repeats"] == 2
        assert row["dtype"] == "bfloat16" and min(row[side] for side in "MNKR") > 0
        assert row["versions"]["torch"] == torch.__version__ and row["versions"]["kernels"] == dispatch.VERSION
        variants = {"torch"} if row["op"] in OPS else {"lora-first", "peft", "frozen"}
        assert row["variant"] in variants
        assert (row["tflops"] is None) == (
            row["op"].startswith("layer") or row["op"] in OPS - {"gemm", "gemm + low rank"}
        )
        assert (row["gbytes_per_s"] is None) == (row["op"] not in OPS - {"gemm", "gemm + low rank"})
    assert text.startswith("DRY RUN") and text.count("linear step") == sum(r["op"] == "linear step" for r in rows)
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["bench.jsonl", "bench.png", "history.jsonl"]


def test_earlier_results_are_not_overwritten(dry):
    out = dry[0]
    with pytest.raises(FileError, match="overwrite"):
        benchmark.run(out, dry=True)
    rows, _ = benchmark.run(out, dry=True, overwrite=True, budget_s=0)
    assert rows == [] and (out / "bench.jsonl").read_text() == ""


@pytest.mark.parametrize("what", [lambda out: benchmark.run(out), lambda out: benchmark.tune()], ids=["run", "tune"])
def test_without_a_gpu_there_are_no_results(tmp_path, monkeypatch, what):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no GPU"):
        what(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("forward", lambda y: y * 1.05),
        ("forward", lambda y: y.index_fill(0, torch.tensor([y.shape[0] - 1]), 0.0)),
        ("shrink", lambda s: s * 1.2),
        ("grad_x", lambda dx: torch.full_like(dx, float("nan"))),
        ("grad_a", torch.zeros_like),
        ("grad_b", lambda db: -db),
    ],
)
@pytest.mark.parametrize("tuned", [False, True], ids=["run", "tune"])
def test_no_result_on_red(tmp_path, monkeypatch, name, wrong, tuned):
    good = getattr(torch_ops, name)
    monkeypatch.setattr(torch_ops, name, lambda *arguments: wrong(good(*arguments)))
    with pytest.raises(BackendError, match=r"linear .*lora-first is wrong: tensor \d of 4 is off by .*plain torch"):
        if tuned:
            benchmark.tune(dry=True, path=tmp_path / "tune.json")
        else:
            benchmark.run(tmp_path / "out", dry=True)
    assert not list(tmp_path.iterdir())


def test_a_layer_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "cases", lambda shapes, dry: [Case("layer", "tiny layer", 48, 64, 64, 4)])
    good = torch_ops.grad_b
    monkeypatch.setattr(torch_ops, "grad_b", lambda dy, s: good(dy, s) * (1.5 if dy.shape[1] == 96 else 1.0))
    with pytest.raises(BackendError, match=r"layer tiny layer .*lora-first is wrong: tensor \d+ of 16"):
        benchmark.run(tmp_path / "out", dry=True)


class TestBench:
    @pytest.fixture
    def bench(self):
        return benchmark.Bench("float32", 4, dry=True)

    def test_what_does_not_compile_is_left_out_with_a_note(self, bench):
        exact = torch.ones(3, dtype=torch.float64)
        failure = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})("shared memory")

        def fails():
            raise failure

        calls = {"good": lambda: exact.float(), "bad": fails}
        assert list(bench.right("gemm", calls, exact.float(), exact)) == ["good"]
        assert "gemm: bad left out" in bench.lines[-1] and "shared memory" in bench.lines[-1]
        failure = ValueError("ours")
        with pytest.raises(ValueError, match="ours"):
            bench.right("gemm", calls, exact.float(), exact)

    def test_a_rival_that_fails_or_is_wrong_is_left_out_with_a_note(self, bench):
        exact = torch.ones(3, dtype=torch.float64)

        def fails():
            raise RuntimeError("no such kernel")

        calls = {"ours": exact.float, "peft": fails, "liger": lambda: 2 * exact.float()}
        assert list(bench.right("layer", calls, exact.float(), exact)) == ["ours"]
        assert "layer: peft left out" in bench.lines[-2] and "no such kernel" in bench.lines[-2]
        assert "layer: liger left out, it is wrong: tensor 1 of 1" in bench.lines[-1]

    def test_twice_the_error_of_plain_torch_passes_and_more_does_not(self, bench):
        exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(1))
        off = lambda by: (exact + by * noise).float()  # noqa: E731
        assert bench.right("op", {"ours": lambda: off(1.9e-3)}, off(1e-3), exact)
        with pytest.raises(BackendError, match="op: ours is wrong"):
            bench.right("op", {"ours": lambda: off(2.1e-3)}, off(1e-3), exact)

    def test_variants_are_interleaved_in_a_rotating_order(self, bench, monkeypatch):
        log, bench.repeats = [], 4
        monkeypatch.setattr(bench_timing, "time_ms", lambda call, flush: call() or 1.0)
        calls = {name: lambda name=name: log.append(name) for name in "abc"}
        ms = bench.time_ms(calls, 60.0, {"b": lambda: log.append("prepare b")})
        rounds = "".join(log).replace("prepare bb", "b")
        assert "".join(log).count("prepare bb") == rounds.count("b") == bench_timing.WARM + 4
        assert [rounds[i : i + 3] for i in range(0, len(rounds), 3)] == ["bca", "cab", "abc", "bca", "cab", "abc"]
        assert {name: len(times) for name, times in ms.items()} == {"a": 4, "b": 4, "c": 4}, "warm-up is not measured"

    def test_a_spent_budget_leaves_a_few_repeats(self, bench):
        bench.repeats = 50
        assert len(bench.time_ms({"a": lambda: None}, 0.0)["a"]) == bench_timing.LEAST

    def test_cases_beyond_time_and_memory_are_named(self, bench):
        case = Case("ops", "big", 8192, 4096, 4096, 16)

        def work(case, left_s):
            raise torch.OutOfMemoryError("CUDA out of memory")

        bench.each(work, [case], 60.0, False)
        bench.each(work, [case], 0.0, False)
        assert bench.lines[-2] == "ops big 8192x4096->4096 R16 left out: too little GPU memory"
        assert bench.lines[-1] == "ops big 8192x4096->4096 R16 left out: 0 s are spent"

    def test_every_variant_has_the_same_adapters(self, bench):
        base, _, _ = bench_cases.operands(Case("layer", "tiny layer", 48, 64, 64, 4), bench.dtype, bench.device)
        ours = bench_cases.adapters(bench_cases.adapted(base, bench_cases.LoRALinear, 4))
        peft = bench_cases.adapted(base, "peft", 4)
        assert len(ours) == 14
        for one, two in zip(ours, bench_cases.adapters(peft), strict=True):
            assert torch.equal(one, two) and torch.equal(one, one.bfloat16())
        assert type(peft.layer.mlp.down_proj).__module__ == "peft.tuners.lora.layer"
        assert peft.layer.mlp.down_proj.base_layer.weight is base.layer.mlp.down_proj.weight, "weights are shared"
        assert not any("lora_" in name for name, _ in base.named_parameters())


def test_liger_kernel_computes_norms_mlp_and_positions_of_its_layer_alone(monkeypatch):
    from transformers.models.llama import modeling_llama

    used, rotate = [], modeling_llama.apply_rotary_pos_emb

    def noted(name, function):
        return lambda *arguments, **options: used.append(name) or function(*arguments, **options)

    def apply(rope, fused_linear_cross_entropy, model):
        assert rope is False and fused_linear_cross_entropy is False
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = None  # liger-kernel changes the source file, too
        (layer,) = model.layers
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            module = getattr(layer, name)
            module.forward = noted(name, module.forward)

    liger = types.ModuleType("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama, liger.liger_rotary_pos_emb = apply, noted("positions", rotate)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    before = dict(vars(modeling_llama))
    find = importlib.util.find_spec
    found = lambda name, *rest: object() if name == "liger_kernel" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", found)
    bench = benchmark.Bench("float32", 2, dry=True)
    layer = Case("layer", "tiny layer", 48, 64, 64, 4)
    bench.measure(Case("linear", "tiny q/o", 48, 64, 64, 4), 60.0)
    assert "liger" not in {row["variant"] for row in bench.rows} and not used
    bench.measure(layer, 60.0)
    assert {row["variant"] for row in bench.rows if row["op"] == "layer step"} == {
        "lora-first",
        "peft",
        "liger",
        "frozen",
    }
    assert set(used) == {"input_layernorm", "post_attention_layernorm", "mlp", "positions"}
    assert dict(vars(modeling_llama)) == before, "other layers keep transformers' functions"


def test_a_gpu_call_is_timed_between_events_after_the_flush(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 7.0

    flush = type("Flush", (), {"zero_": lambda self: log.append("flush")})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert bench_timing.time_ms(lambda: log.append("call"), flush) == 7.0
    assert log == ["flush", "record", "call", "record", "synchronize"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = benchmark.importlib.util.find_spec
    gone = ("peft", "transformers", "matplotlib")
    monkeypatch.setattr(
        benchmark.importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest)
    )
    rows, text = benchmark.run(tmp_path, dry=True)
    assert "variants peft and liger left out" in text and "whole layers left out" in text and "no plot" in text
    assert {row["variant"] for row in rows} == {"lora-first", "frozen", "torch"}
    assert {row["relative_to"] for row in rows} == {"frozen", "torch"}
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".png"] == []


def test_cases():
    llama = bench_cases.cases("llama-8b", False)
    assert {(c.k, c.n) for c in llama if c.kind == "linear"} == {
        (4096, 4096),
        (4096, 1024),
        (4096, 14336),
        (14336, 4096),
    }
    smollm2 = bench_cases.cases("smollm2", False)
    assert {(c.k, c.n) for c in smollm2 if c.kind == "ops"} == {(576, 576), (576, 192), (576, 1536), (1536, 576)}
    assert bench_cases.cases("all", False) == llama + smollm2
    assert {c.m for c in llama} == {8192, 512} and {c.rank for c in llama} == {16, 64}
    assert sum(c.kind == "layer" for c in llama) == 1
    assert [(c.kind, c.n, c.k) for c in bench_cases.cases([(2048, 8192)], False)] == [
        ("linear", 8192, 2048),
        ("ops", 8192, 2048),
    ]


@pytest.mark.parametrize("setting", [{"dtype": "float64"}, {"repeats": 1}], ids=str)
def test_impossible_settings(tmp_path, setting):
    with pytest.raises(ConfigError, match="expected"):
        benchmark.run(tmp_path, dry=True, **setting)
    with pytest.raises(ConfigError, match="llama-8b"):
        bench_cases.cases("llama-9b", False)


def test_dry_tuning_writes_only_where_asked(tmp_path, cache):
    dispatch.use_table({"kept": ("fused", dispatch.SAFE_TILES[0])})
    rows, text = benchmark.tune(dry=True)
    assert text.startswith("DRY RUN") and not cache.exists()
    assert dict(dispatch.TABLE) == {"kept": ("fused", dispatch.SAFE_TILES[0])}
    assert len(rows) == 4
    for key, row in rows.items():
        assert key.startswith("dry-run bfloat16 M32 ") and key in text
        best = min(row["measured"], key=row["measured"].get)
        assert row["strategy"] == best.split()[0] in dispatch.CHOICES
        assert len(row["measured"]) == 4, "lora-first, plain torch and two tilings"
    path = tmp_path / "tune.json"
    rows, text = benchmark.tune(dry=True, path=path)
    assert f"written: {path}" in text and tuning.load(path) == "" and dispatch.TABLE.keys() == rows.keys()


def test_tuning_forces_each_tiling_in_turn(monkeypatch):
    bench = benchmark.Bench("bfloat16", 3, dry=True)
    seen = []
    good = torch_ops.forward

    def forward(*arguments):
        seen.append(dict(dispatch.TABLE))
        return good(*arguments)

    monkeypatch.setattr(torch_ops, "forward", forward)
    case = Case("linear", "tune", 32, 64, 64, 4)
    key = dispatch.key(bench.target, torch.bfloat16, *case.sizes)
    bench.tune(case, 60.0)
    tilings = dispatch.candidates(bench.target, torch.bfloat16)
    assert all({key: ("fused", tiles)} in seen for tiles in tilings) and len(tilings) == 2


def test_tuning_stops_where_time_is_up(tmp_path):
    rows, text = benchmark.tune(dry=True, budget_s=0, path=tmp_path / "tune.json")
    assert rows == {} and text.count("0 s are spent") == 4
