"""The suite computes on the CPU on every machine, so that a GPU changes no result. tests/gpu alone uses one."""

import os
import subprocess
import sys

import pytest
import torch

from plopfast.support.devices import device_for


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_gpus_are_hidden_from_this_process_and_from_its_children(name):
    assert os.environ[name] == ""
    code = f"import os; print(repr(os.environ[{name!r}]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "''\n"


def test_auto_is_the_cpu():
    assert not torch.cuda.is_available() and device_for("auto") == torch.device("cpu")
