"""Two processes on the CPU against one that accumulates two micro-batches: what they compute, and how they fail."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_program
import torch
from helpers import build, torchrun
from safetensors.torch import load_file

import plopfast as pf
from plopfast.cli import main
from plopfast.data.rows import DEMO
from plopfast.support import peers
from plopfast.support.errors import ConfigError, TrainingError

HERE = Path(__file__).parent
CHECKS = ("ddp", "streamed", "fsdp", "fsdp_dora", "full", "score", "evaluation", "resume", "together")


def run(*command):
    """The finished torchrun."""
    return torchrun(*command, PYTHONWARNINGS="error::FutureWarning:plopfast")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(one process's results, two processes', what torchrun printed when rank 1 had died at last)"""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    done = run(HERE / "rank_program.py", folders[1], *CHECKS, "not_finite", "dies")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does
    for check in CHECKS:
        rank_program.CHECKS[check](folders[0])
    torch.set_num_threads(threads)
    return *folders, done


def read(path):
    return json.loads(path.read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ddp", "streamed", "fsdp", "fsdp-dora", "full"])
def test_training_equals_one_process_with_the_doubled_batch(found, kind):
    print(found[2].stderr)
    one, two = (metrics(folder / kind) for folder in found[:2])
    assert len(one) == len(two) == 8, "one rank alone writes"
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5), (key, a["step"])
    losses = [record["loss"] for record in one if "loss" in record]
    assert len(set(losses)) == 6
    if kind == "full":
        one, two = (read(folder / kind / "weights.0.json") for folder in found[:2])
        assert two == pytest.approx(one, rel=1e-6)
        assert two == read(found[1] / kind / "weights.1.json"), "both ranks hold the same"
    else:
        one, two = (load_file(folder / kind / "adapter" / "adapter_model.safetensors") for folder in found[:2])
        # by norm: sharded blocks keep torch's own norms and MLPs, which round otherwise
        for name, value in one.items():
            assert (two[name] - value).norm() <= 1e-5 * value.norm(), name
        assert all(value.abs().max() > 0 for value in one.values())
        pf.load_adapter(build("llama"), found[1] / kind / "adapter")  # knows its base again


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["plain", "monte-carlo", "stopped", "official"])
def test_scores_are_those_of_one_process_to_the_last_bit(found, kind, how):
    one = read(found[0] / "score" / kind / f"{how}.0.json")
    for rank in (0, 1):
        assert read(found[1] / "score" / kind / f"{how}.{rank}.json") == one


def test_eva_vectors_span_the_same(found):
    one = read(found[0] / "score" / "eva.0.json")
    for rank in (0, 1):
        for name, projector in read(found[1] / "score" / f"eva.{rank}.json").items():
            torch.testing.assert_close(torch.tensor(projector), torch.tensor(one[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["trees", "plain", "one"])
def test_an_evaluation_is_that_of_one_process(found, kind, way):
    """To the last bit on both ranks, which share the work and run the model equally often."""
    folder = Path("evaluation") / kind
    one = read(found[0] / folder / f"{way}.0.json")
    for rank in (0, 1):
        assert read(found[1] / folder / f"{way}.{rank}.json") == one
    alone = read(found[0] / folder / f"{way} passes.0.json")
    passes = [read(found[1] / folder / f"{way} passes.{rank}.json") for rank in (0, 1)]
    assert passes[0] == passes[1] == (-(-alone // 2) if way == "plain" else passes[0])
    if way == "trees":  # the first rows are run both ways on each rank
        assert 5 < passes[0] < alone


def test_a_signal_to_one_rank_stops_all_and_they_go_on_as_if_uninterrupted(found):
    for rank in (0, 1):
        assert read(found[1] / "resume" / f"message.{rank}.json").startswith("stopped after step 2 of 6")
        assert read(found[1] / "resume" / f"found.{rank}.json") == [True, True]
        assert read(found[1] / "resume" / f"own masks.{rank}.json") == [True]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_jobs_at_once_are_those_alone_and_those_of_one_process(found, kind):
    folder = Path("together") / kind
    for rank in (0, 1):
        want = {"a": "TrainResult", "b": "TrainResult", "bad": "TrainingError"}
        assert read(found[1] / folder / f"ended.{rank}.json") == want
        for name, steps in (("a", 8), ("b", 6)):
            apart, (losses, alone), norms = read(found[1] / folder / f"{name}.{rank}.json")
            one_apart, (one, _), one_norms = read(found[0] / folder / f"{name}.0.json")
            assert max(apart, one_apart) < 1e-3 and len(losses) == steps
            assert losses == pytest.approx(alone, rel=1e-5) and losses == pytest.approx(one, rel=1e-5)
            assert norms == pytest.approx(one_norms, rel=1e-4)


def test_another_number_of_ranks_cannot_resume(found):
    with pytest.raises(TrainingError, match=r"on 2 ranks, this one has 1: .*--nproc-per-node = 2.*--overwrite"):
        rank_program.trainer(rank_program.adapted(dropout=0.2), found[1] / "resume").fit(resume=True)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(found):
    for rank in (0, 1):
        message = read(found[1] / "not_finite" / f"message.{rank}.json")
        assert message.startswith("step 5: loss nan") and "adapters are those of step 3" in message


def per_rank(model, rank, processes):
    """docs/distributed.md's formula for --parallel fsdp in float32: weights, adapters, AdamW's moments, in bytes."""
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    outside = sum(p.numel() for p in model.parameters()) - blocks
    adapters = sum(rank * (info.n_in + info.n_out) for info in pf.linear_modules(model))
    return {"weights": 4 * (blocks / processes + outside), "adapters": 4 * adapters, "optimizer": 8 * adapters}


@pytest.mark.parametrize(("kind", "processes"), [("ddp", 1), ("fsdp", 2)])
def test_memory_by_the_formula(found, kind, processes):
    want = per_rank(build("llama"), 4, processes)
    for rank in (0, 1):
        held = read(found[1] / kind / f"held.{rank}.json")
        held["optimizer"] -= 4 * len(pf.linear_modules(build("llama"))) * 2  # a step count for each parameter
        assert held == want


def test_full_training_is_not_sharded():
    with pytest.raises(ConfigError, match="--full trains them: leave one of them out"):
        pf.RunConfig(full=True, parallel="fsdp")


@pytest.fixture
def options(model_folder, tmp_path):
    rows = []
    for split, count in (("train", 40), ("valid", 8), ("test", 12)):
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(line + "\n" for line in DEMO[split].read_text().splitlines()[:count]))
        rows += [f"--{split}", file]
    quick = ["--score-prompts", 12, "--max-steps", 4, "--rank", 2, "--eval-every", 2, "--device", "cpu"]
    return ["--model", model_folder, *rows, *quick]


def test_the_command_line_on_two_ranks(options, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    done = run("-m", "plopfast", "run", *options, "--parallel", "fsdp", "--out", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapters ") == done.stdout.count(f"{two}: ") == 1, "rank 0 alone prints"
    assert done.stderr.count("loading") == 1
    assert main.main([str(a) for a in ["run", *options, "--accumulate", 2, "--out", one]]) == 0
    torch.testing.assert_close(*(load_file(f / "adapter" / "adapter_model.safetensors") for f in (two, one)))
    scores = [pf.NFNReport.load(folder / "scores.json").modules for folder in (two, one)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    for who in ("base", "tuned"):
        a, b = (read(f / "eval.json")[who] for f in (two, one))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["accuracy"] == b["accuracy"]
    left = [{p.name for p in folder.iterdir()} for folder in (two, one)]
    assert left[0] | {"estimate.json"} == left[1]
    assert "estimate: weights spread over several processes are not modelled" in done.stderr


def test_a_rank_that_dies_ends_the_others(found):
    assert found[2].returncode != 0
    for line in ("Root Cause", "rank      : 1 (local_rank: 1)", "exitcode  : 7"):
        assert line in found[2].stderr
    assert read(found[1] / "dies.0.json"), "rank 0 knows that it is not to blame"


@pytest.mark.slow
def test_a_rank_that_dies_in_an_evaluation_ends_the_others(tmp_path):
    done = run(HERE / "rank_program.py", tmp_path, "one_fails")
    assert done.returncode != 0 and "exitcode  : 7" in done.stderr
    assert read(tmp_path / "one_fails.0.json"), "rank 0 knows that it is not to blame"


def test_a_rank_that_fails_ends_the_others_with_its_message(options, tmp_path):
    out = ["--out", tmp_path / "run"]
    assert main.main([str(a) for a in ["score", *options[:-8], *out]]) == 0
    assert main.main(["place", *map(str, out)]) == 0
    for command, message in (
        (["-m", "plopfast", "score", *out], r"rank 0 of 2: .*scores\.json: exists already; choose another --out"),
        (
            [HERE / "rank_program.py", "command_line", "train", "--max-steps", "4", *out],
            "rank 1 of 2: RuntimeError: the cat sat on the power",
        ),
    ):
        done = run(*command)
        assert done.returncode != 0 and done.stderr.count("plopfast: error") == 1, done.stderr
        assert re.search(f"plopfast: error: {message}", done.stderr), done.stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_those_that_are_left_name_the_rank_that_was_killed(options, tmp_path, killed):
    out = ["--out", tmp_path / "run"]
    assert main.main([str(a) for a in ["score", *options[:-8], *out]]) == 0
    assert main.main(["place", *map(str, out)]) == 0
    program = [sys.executable, HERE / "kill_a_rank.py", tmp_path, killed, "train", "--max-steps", 4, *out]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, program)], capture_output=True, text=True, timeout=120, env=environment)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL if rank == killed else 2 for rank in range(3)], done.stderr
    for rank in {0, 1, 2} - {killed}:
        told = (tmp_path / f"{rank}.stderr").read_text()
        assert "Traceback" not in told
        (line,) = [line for line in told.splitlines() if line.startswith("plopfast: error:")]
        assert re.match(
            rf"plopfast: error: rank {rank} of 3: ranks? .*\b{killed}\b.* of 3 (has|have) ended; its own", line
        )


def test_a_rank_on_another_machine_is_named_as_far_as_it_can_be(monkeypatch):
    monkeypatch.setattr(peers, "NOTICED_S", 0.0)
    store = torch.distributed.HashStore()
    store.set("process/1", "1 elsewhere")
    store.set("process/2", f"{os.getpid()} {peers._machine()}")
    found = peers.Peers(store, 0, 3)
    assert found.message().startswith("one of the ranks on other machines (1 of 3) has ended or not answered")
    found.far = []
    assert found.message() == "another rank did not answer within --timeout, though all of them run"


def test_the_first_rank_to_look_says_which_rank_ended_first():
    store = torch.distributed.HashStore()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    store.set("process/1", f"{gone.pid} {peers._machine()}")
    store.set("process/2", f"{gone.pid} {peers._machine()}")
    found = peers.Peers(store, 0, 3)
    store.set("ended", "1")  # by rank 2, which has ended since
    assert found.message() == "rank 1 of 3 has ended"
    gone.wait()
    assert found.message() == "rank 1 of 3 has ended"
