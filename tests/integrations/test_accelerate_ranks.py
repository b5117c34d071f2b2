"""Accelerated PEFT models on two processes, under torch's DDP and FSDP2, equal PEFT's own there."""

from pathlib import Path

import pytest
from helpers import torchrun
from peft_twins import assert_equal
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(Path(__file__).parent / "peft_ranks.py", folder)
    assert not done.returncode, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2", "fsdp2_by_layer"])
def test_equal_to_peft(wrap, rank, found):
    ours, theirs = (load_file(found / f"{wrap}.{kind}.{rank}.safetensors") for kind in ("fast", "plain"))
    assert len(theirs) == 2 * (2 + 42), "loss, logits and the gradients of each A and B, of two steps"
    assert_equal(ours, theirs)
