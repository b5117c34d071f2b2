"""Where the time of a training step goes, ours and that of PEFT with the Hugging Face Trainer: cases (a) and (c) of
train_peers.py.

    python bench/train_profile.py [--dtype bfloat16]

torch.profiler runs over a few steps of each, after an unmeasured run. It gives CPU seconds of the operators themselves,
by kind. "frozen products" is what any trainer must compute: the products with the model's own weights, which are those
with both sides wider than the rank.
"""

import argparse
import copy
import dataclasses
import tempfile
import warnings

import measure
import torch
import train_peers
import transformers
from torch.profiler import ProfilerActivity, profile

KINDS = ("frozen products", "low-rank products", "attention", "softmax", "other")
SOFTMAX = ("aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::exp_", "aten::nll_loss_forward")


def kind_of(event) -> str:
    if event.key in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        sizes = [size for shape in event.input_shapes[:3] for size in shape]
        return "low-rank products" if train_peers.RANK in sizes else "frozen products"
    if event.key.startswith("aten::_scaled_dot_product"):
        return "attention"
    return "softmax" if event.key in SOFTMAX else "other"


def seconds_of(case, arm: str) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for looked_at in (False, True):
            job = train_peers.Job(case, copy.deepcopy(case.model), case.train, folder, 1)
            train = train_peers.ARMS[arm](job)
            if not looked_at:
                train()
                continue
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                train()
    for event in profiler.key_averages(group_by_input_shape=True):
        found[kind_of(event)] += event.self_cpu_time_total / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    dtype = getattr(torch, parser.parse_args().dtype)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    lines, figures = [f"{'case, trainer':<22}{'seconds':>9}" + "".join(f"{kind:>20}" for kind in KINDS)], {}
    for name, rows in (("a", 16), ("c", 8)):
        case = {"a": train_peers.case_a, "c": train_peers.case_c}[name](dtype, 0.5)
        case = dataclasses.replace(case, train=case.train[:rows], batch_tokens=0)
        for arm in ("plopfast", "peft+hf"):
            found = figures[f"{name} {arm}"] = seconds_of(case, arm)
            whole = sum(found.values())
            lines.append(f"({name}) {arm:<18}{whole:>9.2f}" + "".join(f"{found[k] / whole:>20.1%}" for k in KINDS))
    measure.save(f"train_profile_{str(dtype)[6:]}", "\n".join(lines), {"self_cpu_s": figures})


if __name__ == "__main__":
    main()
