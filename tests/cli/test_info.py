"""plopfast info: the modules and their paths, and each reason once."""

import re

import pytest
import torch
from helpers import plopfast

from plopfast.cli.info import module_paths, table
from plopfast.kernels import dispatch

CPU = torch.device("cpu")


def test_a_reason_is_said_once(model_folder, capsys):
    assert plopfast("info", "--model", model_folder) == 0
    text = capsys.readouterr().out
    assert text.count("Triton") == 1 and text.splitlines()[-1].startswith("why: ")
    rows = re.findall(r"^ +3 (\w+) +(\d+ -> \d+) +(.*)$", text, re.M)
    assert len(rows) == 7 and {path for *_, path in rows} == {"torch, lora-first"}
    assert rows[0][:2] == ("q_proj", "32 -> 32")


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "cannot_run", lambda device: "")
    monkeypatch.setattr(dispatch, "target_of", lambda device: dispatch.Target("sm_90", 132))
    dispatch.plan.cache_clear()
    yield
    dispatch.plan.cache_clear()


def test_several_reasons_have_numbers(llama, a_gpu):
    rows = module_paths(llama, CPU, torch.bfloat16)
    _, *lines = table(rows, CPU, 16)
    modules, reasons = lines[: len(rows)], lines[len(rows) :]
    assert all(
        re.search(r"torch, lora-first \[1\]; with dropout triton, lora-first, expand .* \[2\]$", line)
        for line in modules
    )
    assert [reason[:4] for reason in reasons] == ["[1] ", "[2] "] and "dropout makes no mask" in reasons[1]
    for reason, line in zip(reasons, modules, strict=False):
        assert reason[4:] in rows[0][3] and reason[4:] not in line


def test_a_reason_with_brackets_of_its_own():
    rows = [
        (1, "q", "1 -> 2", "torch, lora-first (a (b) c); with dropout triton, fused (d)"),
        (2, "a_long_name_of_a_type", "3 -> 4", "torch, lora-first (d)"),
    ]
    head, first, second, *reasons = table(rows, CPU, 8)
    assert first.endswith("  torch, lora-first [1]; with dropout triton, fused [2]")
    assert second.endswith("torch, lora-first [2]") and reasons == ["[1] a (b) c", "[2] d"]
    assert head.index("in -> out") == first.index("1 -> 2") == second.index("3 -> 4") and "rank 8" in head
