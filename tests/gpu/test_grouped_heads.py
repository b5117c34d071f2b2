"""An estimate on a GPU, whose attention takes grouped heads as they are. Needs the card: no interpreter runs this file."""

import pytest
import torch
from helpers import build, everywhere

import plopfast as pf
from plopfast.training.estimate import estimate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_estimate_counts_them_as_on_the_cpu(dtype):
    model = build("llama").to(dtype)
    found = {}
    for device in ("cpu", "cuda"):
        model.to(device)
        (found[device],) = estimate(model, {"all": everywhere(model)}, pf.TrainConfig(), rows=2, row_tokens=16)
    assert found["cuda"].tflops_per_step == pytest.approx(found["cpu"].tflops_per_step, rel=0.05)
