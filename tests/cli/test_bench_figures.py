"""What a benchmark's figures are: work by the formula, time in its unit, shares of the time that is left."""

import statistics
from types import SimpleNamespace

import pytest

from plopfast.cli import bench as benchmark, bench_timing
from plopfast.cli.bench_cases import Case, cases, op_work

M, N, K, R = 7, 5, 3, 2
CASE = Case("linear", "tiny", M, N, K, R)


@pytest.fixture
def bench():
    return benchmark.Bench("float32", 4, dry=True)


def test_the_work_of_each_op():
    """FLOPs of a product with its low-rank part; bytes that the others read and write, each tensor once."""
    assert op_work("gemm", CASE, 4) == (2 * M * N * K, 0)
    assert op_work("gemm + low rank", CASE, 4) == (2 * M * N * (K + R), 0)
    moved = {
        "shrink": M * K + M * R,
        "expand": M * R + M * N,
        "grads dS+dB": M * N + M * R + M * R,
        "grad dA": M * K + M * R,
        "row norms": M * N,
    }
    for op, count in moved.items():
        for size in (2, 4):
            assert op_work(op, CASE, size) == (0, size * count)


def test_a_row_of_figures(bench, monkeypatch):
    times = {
        "torch": [2.0, 4.0, 3.0, 9.0, 3.5],
        "triton": [1.0, 2.0, 1.5, 1.75, 5.0],
        "peft": [4.0, 4.0, 4.0, 4.0, 4.0],
    }
    monkeypatch.setattr(bench, "time_ms", lambda calls, budget_s: {name: times[name] for name in calls})
    for names, base in ((("torch", "triton", "peft"), "peft"), (("torch", "triton"), "torch")):
        bench.rows.clear()
        bench.record(CASE, "linear step", dict.fromkeys(names), 1.0, 6e9, 3e6, "tiles")
        for row in bench.rows:
            ms = times[row["variant"]]
            median = statistics.median(ms)
            low, *_, high = statistics.quantiles(ms, n=5, method="inclusive")
            assert (row["median_ms"], row["q20_ms"], row["q80_ms"], row["repeats"]) == (median, low, high, 5)
            assert row["tflops"] == pytest.approx(6e9 / (median / 1e3) / 1e12)
            assert row["gbytes_per_s"] == pytest.approx(3e6 / (median / 1e3) / 1e9)
            assert (row["relative"], row["relative_to"]) == (median / statistics.median(times[base]), base)
            assert (row["M"], row["N"], row["K"], row["R"]) == (M, N, K, R)
            assert row["tiles"] == ("tiles" if row["variant"] == "triton" else "")


def test_a_forward_pass_is_one_product_and_a_step_two(bench, monkeypatch):
    case = Case("linear", "tiny q/o", 48, 64, 32, 4)
    seen = {}
    monkeypatch.setattr(
        bench, "record", lambda case, op, calls, budget_s, flops, *a, **k: seen.update({op: (flops, budget_s)})
    )
    bench.measure(case, 6.0)
    product = 2 * 48 * 64 * 32
    assert seen == {
        "linear forward": (product, 2.0),
        "linear step": (2 * product, 2.0),
        "linear backward": (product, 2.0),
    }


def test_each_case_has_its_share_of_the_time_that_is_left(bench, monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    shares = []

    def work(case, share_s):
        shares.append(share_s)
        clock["now"] += 3.0

    bench.each(work, [CASE] * 5, 10.0, False)
    assert shares == [10 / 5, 7 / 4, 4 / 3, 1 / 2], "and the last case none"
    assert "left out" in bench.lines[-1]


def test_calls_are_timed_in_milliseconds(monkeypatch):
    clock = iter([1.0, 1.25])
    monkeypatch.setattr(bench_timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert bench_timing.time_ms(lambda: None, None) == 250.0


@pytest.mark.parametrize("fastest", ["lora-first", "fused"])
def test_tuning_keeps_the_fastest(bench, monkeypatch, fastest):
    def time_ms(calls, budget_s, prepare):
        fused = [name for name in calls if name.startswith("fused")]
        best = fused[-1] if fastest == "fused" else fastest
        return {name: [1.0 if name == best else 2.0 + number] for number, name in enumerate(calls)}

    monkeypatch.setattr(bench, "time_ms", time_ms)
    before = dict(benchmark.dispatch.TABLE)
    (row,) = bench.tune(Case("linear", "tune", 48, 64, 32, 4), 1.0).values()
    assert row["strategy"] == fastest
    benchmark.dispatch.use_table(before)


def test_the_table_in_force_comes_back(monkeypatch, tmp_path):
    before = dict(benchmark.dispatch.TABLE)
    benchmark.tune(dry=True, repeats=2, budget_s=0.5)
    assert before == benchmark.dispatch.TABLE
    monkeypatch.setattr(benchmark.Bench, "each", lambda self, *a: (benchmark.dispatch.use_table({}), 1 / 0))
    kept = {"sm_90 bfloat16": ("fused", None)}
    benchmark.dispatch.use_table(kept)
    try:
        with pytest.raises(ZeroDivisionError):
            benchmark.tune(dry=True)
        assert kept == benchmark.dispatch.TABLE
    finally:
        benchmark.dispatch.use_table(before)


def test_cases_have_the_sides_of_their_models():
    sides = {case.label: (case.k, case.n) for case in cases("smollm2", False) if case.kind == "linear"}
    assert sides == {
        "smollm2 q/o": (576, 576), "smollm2 k/v": (576, 192), "smollm2 gate/up": (576, 1536), "smollm2 down": (1536, 576),
    }  # fmt: skip
    assert {(case.k, case.n) for case in cases([(3, 5), (7, 2)], False)} == {(3, 5), (7, 2)}
