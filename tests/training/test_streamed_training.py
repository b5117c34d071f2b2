"""Training a streamed model: a whole run with validation, an interruption and a resume, and a model larger than its limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build, everywhere, made, parameters, quantize, same

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models.streaming import plain_copy, stream
from plopfast.support.errors import ConfigError, Interrupted, TrainingError
from plopfast.training import parallel
from plopfast.training.estimate import estimate

HERE = Path(__file__).parent


def streamed(kind=None, share=0.0):
    model = build("llama")
    stream(quantize(model, kind) if kind else model, "cpu", share)
    return model


def records(trainer):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.history]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (None, {"dropout": 0.1}), ("nf4", {"checkpointing": True}), (None, {"packing": True, "accumulate": 2}),
        (None, {"dora": True}),
    ],
)  # fmt: skip
def test_a_training_is_the_resident_models(kind, how, examples):
    """With groups that share an input, validation, and the best values kept."""
    dropout = how.pop("dropout", 0.0)
    found = []
    for model in (quantize(build("llama"), kind) if kind else build("llama"), streamed(kind), streamed(kind, 0.5)):
        pf.inject(model, everywhere(model), dropout=dropout, dora=how.get("dora", False))
        trainer = made(examples, model=model, max_steps=4, eval_every=2, **how)
        trainer.fit()
        found.append((records(trainer), trainer.paths(), parameters(trainer)))
    for one in found[1:]:
        assert one[:2] == found[0][:2] and same(one[2], found[0][2])


def test_an_interrupted_training_goes_on(examples, tmp_path):
    """Streamed and resident, each from the other's checkpoint."""
    whole = made(examples, max_steps=6, eval_every=2)
    whole.fit()
    for first, then in ((streamed, lambda: build("llama")), (lambda: build("llama"), streamed)):
        out = tmp_path / first.__name__.strip("<>")

        def stop(step, loss):
            if step == 2:
                raise KeyboardInterrupt

        model = first()
        pf.inject(model, everywhere(model))
        trainer = made(examples, out=out, model=model, max_steps=6, eval_every=2)
        trainer.on_valid = stop
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            trainer.fit()
        trainer.save()
        again = made(examples, out=out, model=then(), max_steps=6, eval_every=2)
        again.fit(resume=True)
        assert same(parameters(whole), parameters(again))


def test_what_a_streamed_model_cannot(examples):
    model = streamed()
    model.requires_grad_(True)  # what is left are norms and the embedding
    with pytest.raises(ConfigError, match=r"streamed weights are frozen: inject"):
        made_plain(examples, model).fit()
    pf.inject(model, everywhere(model))
    with pytest.raises(ConfigError, match="leave out compile, or stream"):
        made(examples, model=model, compile=True).fit()
    with pytest.raises(TrainingError, match="leave out --stream, or --parallel fsdp"):
        parallel.shard(streamed(), torch.device("cpu"))


def made_plain(examples, model):
    return pf.Trainer(model, pf.TrainConfig(max_steps=1, batch_tokens=300), examples[:8])


def test_an_estimate_counts_the_slots_and_no_payload():
    plain, model = build("llama"), streamed()
    config = pf.TrainConfig(max_steps=1)
    placements = {"all": everywhere(plain), "full": None}
    one, full = estimate(plain, placements, config, rows=2, row_tokens=16)
    other, whole = estimate(model, placements, config, rows=2, row_tokens=16)
    of_layers = sum(info.frozen.weight_NK.nbytes for info in pf.linear_modules(plain)) / 2**20
    slots = sum(slot.nbytes for slot in model.streaming.streamer.slots) / 2**20
    assert other.weights_mib == pytest.approx(one.weights_mib - of_layers + slots)
    assert whole.total_mib == pytest.approx(full.total_mib) and other.tflops_per_step == one.tflops_per_step


def test_a_plain_copy_has_all_weights():
    model = streamed()
    copied = plain_copy(model)
    assert sum(p.numel() for p in copied.parameters()) == sum(p.numel() for p in build("llama").parameters())
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(copied(ids).logits, model(ids).logits) and not adapters(copied)


PROGRAM = """
import json, re, resource, sys
import torch
import plopfast as pf
from plopfast.data.example import Example
from plopfast.lora.layer import adapters

folder, limit, how = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model, _ = pf.load_model(folder, **how)
names = [info.name for info in pf.linear_modules(model) if info.type == "v_proj"]
pf.inject(model, pf.Placement(dict.fromkeys(names, (4, 8.0)), [], "", 0))
rows = [Example.after_prompt(tuple(range(5 + n, 29 + n)), 8, None, f"row {n}") for n in range(6)]
trainer = pf.Trainer(model, pf.TrainConfig(max_steps=3, batch_tokens=48, eval_every=3), rows[:4], rows[4:])
trainer.fit()
losses = [record["loss"] for record in trainer.history if "loss" in record]
anonymous = re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(json.dumps({"losses": losses, "anonymous_mib": int(anonymous) / 1024, "said": str(getattr(model, "streaming", ""))}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other ways")
def test_a_model_larger_than_its_limit_trains(tmp_path, tokenizer):
    """540 MiB of weights under a limit of 512 MiB for all of the process's own data, of which Python and torch take 300."""
    import transformers

    torch.manual_seed(0)
    wide, layers = 768, 24
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=wide, intermediate_size=2 * wide, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    one = torch.randn(2 * wide * wide) * wide**-0.5
    for name, parameter in model.named_parameters():
        values = one[: parameter.numel()].view(parameter.shape).clone() if parameter.dim() == 2 else torch.ones(wide)
        model.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(values, requires_grad=False)
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    del model
    limit = 512

    def run(**how):
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(limit * 2**20), json.dumps(how)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PLOPFAST_CACHE": str(tmp_path / "cache")}
        return subprocess.run(arguments, capture_output=True, text=True, env=environment)

    assert size > limit
    done = run(stream=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == 3 and all(0 < loss < 20 for loss in found["losses"]) and "24 blocks" in found["said"]
    assert found["anonymous_mib"] < limit < size
    refused = run()
    assert refused.returncode and "memory" in refused.stderr, "without --stream the limit does not do"
