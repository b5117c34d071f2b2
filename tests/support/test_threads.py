"""Cores and threads on machines of all sorts, played by files in a folder."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from plopfast.support import threads


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(cores, others=..., own=..., files={path: text}): a root folder; cores 0 to cores - 1 belong to us, others'
    and our own work are in cores, one more core is busy and not ours."""

    def build(cores=4, others=0.0, own=0.0, files=()):
        clock = {"now": 0.0}
        monkeypatch.setattr(threads, "affinity", lambda: set(range(cores)))
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
        monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
        monkeypatch.setattr(time, "process_time", lambda: 5 + clock["now"] * own)

        def stat(seconds):
            clock["now"] += seconds
            assert seconds <= 0.2
            busy, all_ = (others + own) * 100 * clock["now"], 100 * clock["now"]
            lines = [f"cpu  {7 + busy:.0f} 0 0 0 0 0 0 0 0 0"]
            for core in range(cores):
                mine = min(max(busy - core * all_, 0), all_)
                rest = all_ - mine
                lines.append(f"cpu{core} {7 + mine:.0f} 0 3 {11 + rest / 2:.0f} {rest / 2:.0f} 0 0 0 0 0")
            lines.append(f"cpu{cores} {all_:.0f} 0 0 0 0 0 0 0 0 0\nintr 12 0 0")
            (tmp_path / "proc/stat").write_text("\n".join(lines))

        (tmp_path / "proc/self").mkdir(parents=True)
        for path, text in dict(files).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        stat(0.0)
        monkeypatch.setattr(time, "sleep", stat)
        return tmp_path

    return build


V2 = "proc/self/cgroup", "0::/user/job\n"
V1 = "proc/self/cgroup", "4:memory:/other\n3:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        (dict([V2]), 8),
        ({**dict([V2]), "sys/fs/cgroup/user/job/cpu.max": "max 100000\n"}, 8),
        ({**dict([V2]), "sys/fs/cgroup/user/job/cpu.max": "300000 100000\n"}, 3),
        ({**dict([V2]), "sys/fs/cgroup/user/job/cpu.max": "350000 100000\n"}, 3),
        ({**dict([V2]), "sys/fs/cgroup/user/job/cpu.max": "50000 100000\n"}, 1),
        ({**dict([V2]), "sys/fs/cgroup/user/job/cpu.max": "1600000 100000\n"}, 8),
        ({**dict([V2]), "sys/fs/cgroup/user/cpu.max": "200000 100000\n"}, 2),
        ({**dict([V2]), "sys/fs/cgroup/cpu.max": "500000 100000\n"}, 5),
        ({**dict([V2]), "sys/fs/cgroup/cpu.max": "500000 100000\n", "sys/fs/cgroup/user/job/cpu.max": "4 1\n"}, 4),
        ({**dict([V2]), "sys/fs/cpu.max": "100000 100000\n"}, 8),
        (
            {
                **dict([V1]),
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "200000\n",
            },
            3,
        ),
        (
            {
                **dict([V1]),
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_usable_cores(fake, files, cores):
    assert threads.usable_cores(fake(8, files=files)) == cores


@pytest.mark.parametrize(("others", "own"), [(0.0, 0.0), (1.0, 0.0), (1.5, 2.0), (0.0, 3.0), (4.0, 0.0)])
def test_busy_cores_are_those_of_others(fake, others, own):
    fake(4, others, own)
    assert threads.busy_cores() == pytest.approx(others, abs=0.15)


def test_busy_cores_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert threads.busy_cores() == 0.0
    assert threads.usable_cores(tmp_path) >= 1


QUOTA = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}


@pytest.mark.parametrize(
    ("count", "others", "policy", "files", "expected"),
    [
        (4, 0.0, None, {}, []),
        (4, 0.3, None, {}, []),
        (4, 1.0, "passive", {}, ["1.0 of 4 cores busy"]),
        (
            4,
            1.0,
            "ACTIVE",
            {},
            ["1.0 of 4 cores busy", "OMP_WAIT_POLICY=PASSIVE before Python starts, or pass --threads 3"],
        ),
        (2, 1.0, None, {}, []),
        (1, 4.0, None, {}, ["4.0 of 4 cores busy"]),
        (4, 4.0, None, {}, ["4.0 of 4 cores busy", "--threads 1"]),
        (6, 0.0, "PASSIVE", {}, ["6 CPU threads, but this process may use 4 cores: pass --threads 4"]),
        (4, 0.0, None, QUOTA, ["--threads 2", "OMP_WAIT_POLICY=PASSIVE"]),
        (2, 1.0, "PASSIVE", QUOTA, []),
        (2, 3.0, "PASSIVE", QUOTA, ["3.0 of 4 cores busy"]),
    ],
)
def test_advice(fake, monkeypatch, count, others, policy, files, expected):
    if policy is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    advice = threads.thread_advice(count, fake(4, others, files=files))
    assert len(advice) == len(expected), advice
    for line, part in zip(advice, expected, strict=True):
        assert part in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")
def test_a_real_spinning_process_is_seen(monkeypatch):
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(threads, "affinity", lambda: {core})
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as spinning:
        spinning.stdout.readline()
        try:
            assert threads.busy_cores() > 0.6
        finally:
            spinning.kill()
