"""What a launch sends to the GPU and what it costs the host, on a driver that only records (tests/kernels/host)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HOST = Path(__file__).parent / "host"
sys.path.insert(0, str(HOST))
import stub_driver  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton exists for Linux only")
KERNELS = {
    "lora_shrink", "lora_expand", "lora_expands", "lora_expand_sum", "lora_grads", "lora_gemm", "sum_partials", "sum_both",
    "row_norms", "rms_norm", "rms_norm_grad", "rms_norm_shrink", "gate", "gate_grad",
    "rotary", "cross_entropy", "lora_gemm_nf4", "decode_nf4", "decode_scaled",
    "segment_shrink", "segment_gemm", "segment_grads",
}  # fmt: skip
GUARDS = {"misaligned", "64 bits", "seed in memory", "enter hook", "exit hook", "debug", "device", "switch"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What host/launches.py found, by section."""
    command = [sys.executable, HOST / "launches.py"]
    environment = stub_driver.build(tmp_path_factory.mktemp("stub"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_ways_send_the_same(found):
    """The grid, the stream, the kernel and every parameter, of each kernel that has plans."""
    assert found["same"].keys() == KERNELS
    for kernel, (direct, launches, different) in found["same"].items():
        assert launches >= direct >= 6 and not different, f"{kernel}: {different}"


def test_what_a_plan_does_not_cover_goes_through_triton(found):
    """Misaligned pointers, numbers beyond 32 bits, hooks, debugging, another device: Triton chooses the kernel."""
    assert found["guarded"] == dict.fromkeys(GUARDS, "plain")


def test_a_step_of_one_linear(found):
    """At most 250 calls of the host and five launches of Triton's, forward and backward; on torch's path none, and no more
    calls than PEFT."""
    calls, launches = ({name: row[what] for name, row in found["step"].items()} for what in ("calls", "launches"))
    assert sum(calls["lora-first"]) <= 250 and launches["lora-first"] <= 5
    assert sum(calls["torch"]) <= sum(calls["peft"]) and launches["torch"] == 0


def test_a_step_of_query_key_and_value(found):
    """Together they cost no more launches of Triton's than nine, and fewer calls than apart."""
    alone, together = found["step"], found["group"]
    assert together["lora-first"]["launches"] <= 9 and together["torch"]["launches"] == 0
    for strategy, row in together.items():
        assert sum(row["calls"]) < 3 * sum(alone[strategy]["calls"]), strategy


def test_a_step_of_several_adapters(found):
    """Eight on one weight in one call: no more launches of Triton's than eight, where eight linears have five each; and fewer
    calls of the host on each path."""
    rows = found["many"]
    for strategy in ("lora-first", "fused"):
        together, apart = rows[f"together, {strategy}"], rows[f"apart, {strategy}"]
        assert together["launches"] <= 8 and apart["launches"] >= 3 * 8
        assert sum(together["calls"]) < sum(apart["calls"]) / 2.5
    assert rows["together, torch"]["launches"] == 0
    assert sum(rows["together, torch"]["calls"]) < sum(rows["apart, torch"]["calls"]) / 1.5


def test_a_second_step_makes_no_plan(found):
    """What depends on shapes is done by then: a step of the same shape only launches."""
    for section in ("step", "group", "many"):
        assert {row["plans"] for name, row in found[section].items() if name != "peft"} == {0}


def test_a_launch_costs_few_calls(found):
    assert len(found["each"]) == 8
    for launcher, (python, c) in found["each"].items():
        assert python <= 15 and c <= 15, (launcher, python, c)


def test_few_variants_are_compiled(found):
    """Numbers of tokens differ from step to step, and none of them compiles a kernel anew."""
    assert found["variants"].keys() == {"0.0", "0.1"}
    for rate, kernels in found["variants"].items():
        product = kernels.pop("segment_gemm")
        assert product <= 14, "of three ranks each way, and without adapters, in two sizes of tiles"
        assert max(kernels.values()) <= 6, (rate, kernels)
        assert len(kernels) >= 6


def test_after_the_warm_up_nothing_is_compiled(found):
    assert found["warmed"].keys() == {"0.0", "0.1"}
    for rate, (warm, later) in found["warmed"].items():
        assert warm >= 6 and later == 0, rate


def test_plans_do_not_pile_up(monkeypatch):
    from plopfast.kernels import launch

    made = []
    make = lambda number: made.append(number) or str(number)  # noqa: E731
    monkeypatch.setattr(launch, "MOST_PLANS", 5)
    launch.forget_plans()
    assert [launch.plan(make, number) for number in (1, 1, 2, 3, 4, 5)] == ["1", "1", "2", "3", "4", "5"]
    assert made == [1, 2, 3, 4, 5]
    assert launch.plan(make, 6) == "6" and launch.plan(make, 1) == "1" and made == [1, 2, 3, 4, 5, 6, 1]
    launch.forget_plans()
    assert launch.plan(make, 6) == "6" and made[7:] == [6]
    launch.forget_plans()
