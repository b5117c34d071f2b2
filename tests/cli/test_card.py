"""bench/card.sh: its pieces in their order, once each; and the whole of it dry on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIECES = (
    "tests doctor-bfloat16 doctor-float32 host tune bench training-small training-large memory beside peers variants".split()  # noqa: SIM905
)
PYTHON = """#!/bin/sh
case "$*" in -c*) exit "${NO_GPU:-0}" ;; esac
echo "$*" >>"$CALLS"
echo "said: $*"
case "$*" in *"${BROKEN:-no piece}"*) exit 3 ;; esac
"""


@pytest.fixture
def card(tmp_path):
    """A function of arguments: (exit code, what was said, the commands) of card.sh with a Python that only takes notes."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*arguments, **environment):
        calls.write_text("")
        environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), **environment}
        command = ["bash", ROOT / "bench" / "card.sh", "--out", tmp_path / "a folder", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    run.out = tmp_path / "a folder"
    return run


def test_each_piece_runs_once_in_the_order_of_what_is_learned(card):
    code, said, calls = card()
    assert code == 0 and [line[3:] for line in said.splitlines() if line in {f"== {p}" for p in PIECES}] == PIECES
    words = (
        "tests/gpu", "card_gpu", "doctor --dtype bfloat16", "card_gpu", "doctor --dtype float32", "card_profile", "--tune", "bench --out", "--size small",
        "--size large", "card_gpu", "card_memory", "card_gpu", "card_beside", "card_gpu", "bench --train", "card_variants", "card_table",
    )  # fmt: skip
    assert len(calls) == len(words) and all(word in call for word, call in zip(words, calls, strict=True)), calls
    assert {path.name for path in card.out.iterdir()} == {*(f"{piece}.txt" for piece in PIECES), "table.txt"}
    code, said, calls = card()
    assert code == 0 and len(calls) == 1 and "card_table" in calls[0] and said.count("finished before") == len(PIECES)
    assert len(card("--again", "host")[2]) == 2 and len(card("host", "tune")[2]) == 1


def test_a_piece_that_fails_is_run_again_and_stops_no_other(card):
    code, said, calls = card("host", "tune", "bench", BROKEN="--tune")
    assert code == 1 and "card.sh: failed: tune" in said and len(calls) == 4
    assert {path.name for path in card.out.iterdir()} == {"host.txt", "tune.failed", "bench.txt", "table.txt"}
    assert "said: -m plopfast bench --tune" in (card.out / "tune.failed").read_text()
    code, _, calls = card("host", "tune", "bench")
    assert code == 0 and len(calls) == 2 and "--tune" in calls[0]
    assert {path.name for path in card.out.iterdir()} == {"host.txt", "tune.txt", "bench.txt", "table.txt"}


def test_settings_reach_the_pieces(card, tmp_path):
    _, _, calls = card("--seconds", "100", "--model", "owner/name", "doctor-float32", "bench", "peers")
    assert "doctor --dtype float32 --seconds 26 --model owner/name" in calls[1]
    assert "--seconds 100" in calls[2] and "--seconds 100 --model owner/name" in calls[4]


def test_a_dry_run_leaves_the_users_model_alone(card):
    _, _, calls = card("--dry", "--model", "mine", "doctor-float32")
    tiny = card.out / "tiny"
    assert calls[1].endswith(f"card_tiny.py {tiny}") and calls[2].endswith(f"--device cpu --model {tiny}")


@pytest.mark.parametrize("arguments", [["hosts"], ["--again"], ["--fast"], ["--out"], ["--seconds", "soon"]], ids=str)
def test_wrong_words_are_refused(card, arguments):
    code, said, calls = card(*arguments)
    assert code == 2 and not calls and "bench/card.sh [--out DIR]" in said and "training-large" in said


def test_without_a_gpu_nothing_runs(card):
    code, said, calls = card(NO_GPU="1")
    assert code == 2 and "no GPU" in said and "--dry" in said and not calls
    assert card("--dry", "host", NO_GPU="1")[0] == 0


HOST = {"step_us": 30.4, "one_thread_us": 20.0, "forward_us": 9.0, "gpu_us": 5.0, "launches": 7, "operators": 11}
TRAINED = {
    "tokens": 64, "path": "fused", "tokens_per_s": 1234.5, "step_ms": 5.0, "gpu_ms": 4.0, "kernels": 9, "peak_mib": 321.0,
}  # fmt: skip
STEP = {"op": "linear step", "case": "smollm2 q/o", "M": 512, "R": 16, "relative_to": "peft"}
FIGURES = {
    "host.json": {"host": {"linear": {"PEFT": HOST}}, "launch_us": {"planned": 5.25}},
    "cache/tune.json": {
        "rows": {
            "a": {"strategy": "fused", "measured": {"torch": 3.0, "fused": 2.0}},
            "b": {"strategy": "torch", "measured": {"torch": 1.0, "fused": 2.0}},
        }
    },
    "timings/bench.jsonl": [
        STEP | {"variant": "fused", "median_ms": 1.0, "relative": 0.5}, STEP | {"variant": "peft", "median_ms": 2.0, "relative": 1.0},
        {"op": "shrink"},
    ],
    "training-small.json": {"trainings": [TRAINED], "graphs": []},
    "memory.json": {"table": ["arm   peak MiB", "nf4       70"]},
    "peers/bench_train.jsonl": [
        {"arm": "plopfast", "seconds": 1, "tokens_per_s": speed, "peak_mib": 7.0, "loss": 1.5} for speed in (10.0, 30.0, 40.0)
    ],
    "variants.json": {"variants": {"lora_gemm": 2}, "compile_s": {"lora_gemm": [1.0, 3.0]}, "tokens": 200},
}  # fmt: skip
TABLE = """tests: 396 passed in 100s [tests.txt]
doctor-bfloat16: FAILED, 1 of 6 checks failed [doctor-bfloat16.failed]
doctor-float32: not run
host [host.json]
  linear, us        step  one thread   forward      GPU  launches
  PEFT                30          20         9        5         7
  one launch, planned: 5.2 us
tune [cache/tune.json]
  fastest: fused for 1 of 2 shapes, torch for 1 of 2 shapes
  plain torch over the fastest: median 1.25, most 1.50
bench [timings/bench.jsonl]
  a step, relative                             fused        peft    base, ms
  smollm2 q/o, 512 tokens, rank 16              0.50        1.00       2.000
training-small [training-small.json]
   tokens path          tokens/s  step, ms  GPU, ms  kernels  peak MiB
       64 fused             1234       5.0      4.0        9       321
training-large: no figures [training-large.txt]
  left out: what needs transformers, which is not installed
memory [memory.json]
  arm   peak MiB
  nf4       70
beside: no figures [beside.txt]
peers [peers/bench_train.jsonl]
              tokens/s  peak MiB     loss
  plopfast          30         7   1.5000
variants [variants.json]
  over 200 token counts: lora_gemm 2 (4 s)
"""


def test_the_table_names_the_file_of_each_figure(tmp_path):
    for name, value in FIGURES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = value if isinstance(value, list) else [value]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for piece in {*PIECES} - {"doctor-float32", "doctor-bfloat16"}:
        (tmp_path / f"{piece}.txt").write_text("")
    (tmp_path / "tests.txt").write_text("....\n396 passed in 100s\n\n")
    (tmp_path / "doctor-bfloat16.failed").write_text("bad\n\r 50%\r1 of 6 checks failed\n")
    left_out = "left out: what needs transformers, which is not installed\n"
    (tmp_path / "training-large.txt").write_text(2 * left_out)
    command = [sys.executable, ROOT / "bench" / "card_table.py", tmp_path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == TABLE


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_dry(tmp_path):
    command = ["bash", ROOT / "bench" / "card.sh", "--dry", "--out", tmp_path]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    table = (tmp_path / "table.txt").read_text()
    assert [line.split(":")[0].split(" [")[0] for line in table.splitlines() if line[0] != " "] == PIECES
    for words in (
        "4 passed",
        "healthy: ",
        "  PEFT ",
        "tiny q/o, 48 tokens, rank 4",
        "  plopfast ",
        "nothing was compiled",
    ):
        assert words in table
    for path in (
        "host.json",
        "timings/bench.jsonl",
        "training-small.json",
        "memory.json",
        "beside.json",
        "peers/bench_train.jsonl",
        "variants.json",
    ):
        assert f"[{path}]" in table and (tmp_path / path).exists()
