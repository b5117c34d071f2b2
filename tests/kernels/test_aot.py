"""Every shipped kernel compiles for every target, fits it, and uses its fast instructions. Needs no GPU.

By default for one target, which has pointers and TMA; `-m ""` takes all eleven.
"""

import functools

import aot
import aot_jobs
import pytest
import torch
import triton

from plopfast.kernels import dispatch, grids, triton_ops

# registers are the compiler's choice: the tiles were chosen with Triton 3.9, older ones spill a few in places
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
PERFORMANCE = ("spills", "stack", "wgmma serialized", "narrow")


def marks(target, job="gemm"):
    return [pytest.mark.slow] if aot_jobs.is_slow(job, target) else []


TARGETS = [pytest.param(target, marks=marks(target)) for target in aot.LIMITS]
PAIRS = [pytest.param(job, target, marks=marks(target, job)) for job, target in aot_jobs.every_pair()]


@functools.cache
def _built(target, slow):
    found = {}
    for one in aot_jobs.build_all(
        pair for pair in aot_jobs.every_pair() if pair[1] == target and aot_jobs.is_slow(*pair) == slow
    ):
        found.setdefault(one.job, []).append(one)
    return found


def built(target, job):
    """What the job built for the target; every job of a target that is slow, or not, is built at once, by two processes."""
    return _built(target, aot_jobs.is_slow(job, target))[job]


@pytest.mark.parametrize(("job", "target"), PAIRS)
def test_shipped(job, target):
    for one in built(target, job):
        wrong = [text for text in one.wrong if not (OLDER and text.startswith(PERFORMANCE))]
        assert not wrong, f"{one.launch and one.launch.kernel} {one.launch and one.launch.constants}: {wrong}"
        assert one.resources.instructions["atomic"] == 0, "sums must not depend on the order of programs"
        assert one.launch.stream_reads == 1, "the current stream is read at each launch"
    kernels = {one.launch.kernel for one in built(target, job)}
    assert set(aot_jobs.JOBS[job].expect) & kernels or not aot_jobs.JOBS[job].expect


@pytest.mark.parametrize("target", TARGETS)
def test_hopper_and_blackwell_take_tiles_by_tma_and_the_others_by_copies(target):
    for one in built(target, "gemm"):
        count = one.resources.instructions
        if one.launch.kernel == "lora_gemm_tma":
            assert target in ("sm_90", "sm_100", "sm_103") and count["tma load"] >= 2
        elif one.launch.kernel == "lora_gemm" and target.startswith("sm_"):
            assert set(one.resources.copies) == {16} and count["cp.async"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_double_quantised_scale_is_rounded_twice(target):
    """As bitsandbytes does: no multiply-add is made of code * nested + offset. Products in float32 keep theirs."""
    for one in built(target, "nf4, decode"):
        assert one.resources.instructions["fma"] == 0
    for one in built(target, "nf4, float32") if target in aot_jobs.JOBS["nf4, float32"].targets else ():
        count = one.resources.instructions
        assert count["fma"] >= 128 or any(count[name] for name in aot.LIMITS[target].matrix)


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tf32_is_taken_where_it_is_allowed_and_nowhere_else(slow):
    found = {name: [one.launch.constants["PRECISION"] for one in built("sm_90", name) if "PRECISION" in one.launch.constants]
             for name, job in aot_jobs.JOBS.items() if "sm_90" in job.targets and job.slow == slow}  # fmt: skip
    for name, precisions in found.items():
        assert set(precisions) <= {"tf32" if name.startswith("tf32") else "ieee"}, name
    assert len(found["tf32, odd" if slow else "tf32"]) == 7


def test_the_targets_that_have_tiles_are_those_that_are_compiled_for():
    """And the architectures that have TMA take the tiles that need it."""
    assert dispatch.GEMM_TILES.keys() - {"interpreter"} == aot.LIMITS.keys()
    described = {target for target, tiles in dispatch.GEMM_TILES.items() if tiles[0].descriptor}
    assert described == {"sm_90", "sm_100", "sm_103"}
    assert grids.BANDWIDTH.keys() == aot.LIMITS.keys(), "and the grids know how fast their memory is"
    for target, limits in aot.LIMITS.items():
        assert grids.SHARED.get(target, 99 << 10) == limits.shared_per_block


def refuse(target, tiles, **shape):
    """What is wrong with a configuration that does not ship."""
    with aot.compiling(target) as launches:
        o = aot_jobs.operands(**shape)
        triton_ops.gemm(o.x, o.w, o.s, o.b, o.bias, tiles=tiles)
    return aot_jobs.problems(
        aot.resources(launches[0]), target, aot_jobs.Expect(matrix="large", loads=True, stores=True)
    )


def test_the_checks_see_what_they_look_for():
    assert any("shared memory" in text for text in refuse("sm_86", dispatch.Tiles(128, 128, 64, 8, 5)))
    assert any("spills" in text for text in refuse("sm_80", dispatch.Tiles(128, 256, 32, 4, 3)))
    assert any("narrow loads" in text for text in refuse("sm_80", dispatch.Tiles(64, 64, 32, 4, 2), k=4099))
    assert any("no mma.sync" in text for text in refuse("sm_80", dispatch.FLOAT32_TILES, dtype=torch.float32))


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_more_than_2_to_the_31_elements_are_addressed_in_64_bits(target):
    x = torch.empty(1 << 20, 4096, dtype=torch.bfloat16, device="meta")  # 2^32 elements
    with aot.compiling(target) as launches:
        triton_ops.row_norms(x)
        triton_ops.gemm(x, x[:64])
    assert all(not aot_jobs.problems(aot.resources(one), target, aot_jobs.Expect()) for one in launches)


def test_an_unknown_gpu_gets_tiles_that_fit_every_known_one():
    for target, limits in aot.LIMITS.items():
        with aot.compiling(target) as launches:
            o = aot_jobs.operands()
            triton_ops.gemm(o.x, o.w, o.s, o.b, tiles=dispatch.SAFE_TILES[0])
        found = aot.resources(launches[0])
        assert found.shared <= min(65536, limits.shared_per_block) and not found.spills
