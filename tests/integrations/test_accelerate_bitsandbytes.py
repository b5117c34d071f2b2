"""PEFT's LoRA layers on bitsandbytes' codes, accelerated: against PEFT on the decoded weights, and on the codes."""

import copy
import pickle

import peft
import pytest
import torch
from helpers import OF_BITSANDBYTES, model_for_bitsandbytes, of_bitsandbytes
from peft_twins import LORA, assert_equal, errors, filled, results

import plopfast as pf
from plopfast.models.frozen import make_linears_dense

IDS = torch.arange(24).view(2, 12)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_for_bitsandbytes(tmp_path_factory.mktemp("model"))


def wrapped(model, **options):
    return filled(peft.get_peft_model(model, peft.LoraConfig(**LORA | options)))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_equal_to_peft(kind, shared, folder):
    fast, theirs, dense = (of_bitsandbytes(folder, kind) for _ in range(3))
    make_linears_dense(dense)
    fast, theirs, dense = wrapped(fast), wrapped(theirs), wrapped(dense)
    report = pf.accelerate(fast, shared=shared)
    assert len(report.linears) == 14 and not report.left
    assert {type(fast.get_submodule(name)).__name__ for name in report.linears} == {
        "FastLinear4bit" if "nf4" in kind else "FastLinear8bitLt"
    }
    ours = results(fast, BATCH)
    assert_equal(ours, results(dense, BATCH))
    # bitsandbytes rounds what goes into 8-bit layers to 8 bits, too
    assert max(errors(ours, results(theirs, BATCH)).values()) < (1e-5 if "nf4" in kind else 0.1)
    pf.restore(fast)
    restored, plain = results(fast, BATCH), results(theirs, BATCH)
    assert all(torch.equal(restored[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_copies_and_merged_codes(kind, folder):
    model = wrapped(of_bitsandbytes(folder, kind), target_modules=["q_proj", "v_proj"])
    pf.accelerate(model)
    want = results(model, BATCH)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(results(other, BATCH), want)
    with pytest.warns(UserWarning, match="Merge lora module"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerge lora module"):
        model.unmerge_adapter()  # other codes now, in other tensors: the ones that count
    fresh = wrapped(of_bitsandbytes(folder, kind), target_modules=["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match="Merge lora module"):
        fresh.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerge lora module"):
        fresh.unmerge_adapter()
    pf.accelerate(fresh)
    assert_equal(results(model, BATCH), results(fresh, BATCH))


def test_another_dtype_for_products_is_pefts_own(folder):
    model = wrapped(of_bitsandbytes(folder, "nf4"))
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.bfloat16, True
    theirs = results(model, BATCH)
    pf.accelerate(model, norms=False, shared=False, loss=False)
    ours = results(model, BATCH)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
