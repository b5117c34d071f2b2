"""One process at a time writes into a folder; a process that is killed leaves no lock behind."""

import os
import signal
import subprocess
import sys

import pytest

from plopfast.support.errors import FileError
from plopfast.support.lock import LOCK, locked

HOLD = "import sys, time; from pathlib import Path; from plopfast.support.lock import locked\nwith locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "--hf-token", "abc"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    process = holder(tmp_path / "new")
    try:
        with (
            pytest.raises(
                FileError, match=rf"new: in use by `plopfast .*` \(process {process.pid} on .*, since 20.*wait"
            ) as error,
            locked(tmp_path / "new"),
        ):
            pass
        assert "abc" not in str(error.value)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).exists()


def test_within_one_process_it_can_be_taken_again(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path), locked(tmp_path / "trial" / "arm"):
            pass
        assert not (tmp_path / "trial").exists(), "the lock above counts"
        assert subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True).returncode == 1
    process = holder(tmp_path)
    process.kill()
    process.wait()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "own").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "own")
    with pytest.raises(FileError, match="cannot write there"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "own").read_text() == "mine"


@pytest.mark.parametrize("kind", ["text", "json", "pipe"])
def test_a_lock_of_another_program_stays(tmp_path, kind):
    path = tmp_path / LOCK
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("mine" if kind == "text" else "{}")
    with pytest.raises(FileError, match=r"\.lock: in the way, and not a lock of plopfast"), locked(tmp_path):
        pass
    assert kind == "pipe" or path.read_text() in ("mine", "{}")
