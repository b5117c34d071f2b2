"""What test_ranks.py compares: `python rank_program.py FOLDER CHECK...` runs checks on the ranks that torchrun starts, and
writes what each rank found into FOLDER; `python rank_program.py command_line ARGUMENT...` is plopfast with a rank that breaks."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import build, everywhere, random_batches
from torch.distributed.tensor import DTensor

import plopfast as pf
from plopfast.cli import main
from plopfast.data.example import Example
from plopfast.lora.layer import adapters
from plopfast.models.streaming import stream
from plopfast.support import ranks
from plopfast.support.errors import Interrupted, TrainingError
from plopfast.training import evaluate, likelihoods, parallel
from plopfast.training.together import Together, job_of
from plopfast.training.trainer import Trainer

STEPS = 6


def examples(count=64):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 30, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    return [Example.after_prompt(tuple(row), len(row) // 2, None, f"row {i}") for i, row in enumerate(rows)]


def adapted(kind="ddp", dropout=0.0):
    model = build("llama")
    if kind.startswith("fsdp") and ranks.size() > 1:
        parallel.shard(model, torch.device("cpu"))
    if kind == "streamed":
        stream(model, "cpu")
    if kind != "full":
        pf.inject(model, everywhere(model), dropout=dropout, dora=kind == "fsdp-dora")
    return model


def trainer(model, out=None, kind=Trainer, **config):
    """Two micro-batches a step, however many ranks there are."""
    settings = {
        "max_steps": STEPS,
        "batch_tokens": 90,
        "eval_every": 3,
        "lr": 1e-2,
        "accumulate": 2 // ranks.size(),
        **config,
    }
    return kind(model, pf.TrainConfig(**settings), examples()[:50], examples()[50:], out=out)


def train(folder, kind):
    made = trainer(adapted(kind), folder / kind, ema=0.5)
    made.fit()
    if kind == "full":
        state = {name: p.detach() for name, p in made.parameters.items()}
        write(folder / kind / "weights", {name: p.double().norm().item() for name, p in state.items()})
    else:
        pf.save_adapter(made.model, folder / kind / "adapter")
    held = {"weights": 0, "adapters": 0, "optimizer": 0}
    for parameter in made.model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held["adapters" if parameter.requires_grad else "weights"] += local.nbytes
    held["optimizer"] = sum(t.nbytes for state in made.optimizer.state.values() for t in state.values())
    write(folder / kind / "held", held)


def ddp(folder):
    train(folder, "ddp")


def streamed(folder):
    train(folder, "streamed")


def fsdp(folder):
    train(folder, "fsdp")


def fsdp_dora(folder):
    train(folder, "fsdp-dora")


def full(folder):
    train(folder, "full")


def score(folder):
    for kind, architecture in (("ddp", "llama"), ("fsdp", "qwen2")):  # qwen2 has biases
        for name, options in {
            "plain": {"batch_tokens": 40},  # 5 groups: one rank has one more
            "monte-carlo": {"baseline": "monte-carlo", "tokens": "completion"},
            "stopped": {"confidence": 0.5, "k": 1, "batch_tokens": 40},
            "official": {"compat": "official"},
        }.items():
            model = build(architecture)
            if kind == "fsdp" and ranks.size() > 1:
                parallel.shard(model, torch.device("cpu"))
            report = pf.score(model, random_batches(8 if name == "stopped" else 3), **options)
            scores = {n: [s.nfn, s.std, s.tokens] for n, s in report.scores.items()}
            write(folder / "score" / kind / name, [report.prompts, report.tokens, scores])
    eva = pf.score(build("llama"), random_batches(), eva_rank=2, batch_tokens=40)
    write(folder / "score" / "eva", {n: (v.T @ v).tolist() for n, v in eva.eva.items()})


def evaluation(folder):
    """Rows of choices that begin alike, of an odd number, and fewer rows than ranks."""
    answers = [(20, 21), (20, 22, 23), (24, 25)]
    rows = []
    for i, row in enumerate(examples()[:33]):
        tokens, answer = (1, 5, 6, *row.tokens), answers[i % 3]
        rows.append(Example.after_prompt((*tokens, *answer, 2), len(tokens), str(answer), f"row {i}", closing=1))
    for kind in ("ddp", "fsdp"):
        model, run = adapted(kind), [0]
        model.register_forward_pre_hook(lambda *_, run=run: run.__setitem__(0, run[0] + 1))
        for name, some, plain in (("trees", rows, False), ("plain", rows, True), ("one", rows[:1], False)):
            run[0] = 0
            with patch.object(evaluate, "likelihoods", partial(likelihoods.likelihoods, plain=plain)):
                found = evaluate.evaluate(model, some, choices=evaluate.choices_of(rows), batch_tokens=96)
            write(folder / "evaluation" / kind / name, {**found.summary(), "seconds": 0, "right": found.right})
            write(folder / "evaluation" / kind / f"{name} passes", run[0])


def one_fails(folder):
    """Rank 1 breaks while it evaluates."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    model = adapted()
    if ranks.rank():
        model.model.layers[0].register_forward_hook(lambda *_: os._exit(7))
    try:
        evaluate.evaluate(model, examples())
    except Exception as error:
        write(folder / "one_fails", ranks.is_loss(error))
        os._exit(2)


class Signalled(Trainer):
    """Only the last rank gets the signal."""

    def _train_step(self, groups):
        super()._train_step(groups)
        if self.step == 2 and ranks.rank() == ranks.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Noting(Trainer):
    """Keeps torch's generator as the last step left it, as `fit` gives the caller's back."""

    def _train_step(self, groups):
        super()._train_step(groups)
        self.generator = torch.get_rng_state()


def resume(folder):
    """With dropout, so that each rank's generator matters."""
    whole = trainer(adapted(dropout=0.2))
    whole.fit()
    stopped = trainer(adapted(dropout=0.2), folder / "resume", Signalled)
    try:
        stopped.fit()
    except Interrupted as error:
        write(folder / "resume" / "message", str(error))
    resumed = trainer(adapted(dropout=0.2), folder / "resume", Noting)
    resumed.fit(resume=True)
    same = all(torch.equal(p, resumed.parameters[name]) for name, p in whole.parameters.items())
    losses = [record.get("loss") for record in resumed.history]
    write(folder / "resume" / "found", [same, losses == [record.get("loss") for record in whole.history]])
    masks = ranks.gather(resumed.generator)
    write(folder / "resume" / "own masks", [not torch.equal(masks[0], mask) for mask in masks[1:]])


def together(folder):
    """Three jobs on one base, one of which diverges, and each of the others alone."""
    jobs = {"a": (4, {}), "b": (2, {"lr": 3e-3, "seed": 5, "max_steps": 4}), "bad": (4, {})}
    for kind in ("ddp", "fsdp"):

        def base(kind=kind):
            model = build("llama")
            if kind == "fsdp" and ranks.size() > 1:
                parallel.shard(model, torch.device("cpu"))
            return model

        model, made = base(), []
        for name, (rank, config) in jobs.items():
            pf.inject(model, everywhere(build("llama"), rank), name=name)
            make = partial(job_of, model, name)
            made.append(
                trainer(None, folder / kind / name, lambda _, *rest, make=make, **more: make(*rest, **more), **config)
            )
        with torch.no_grad():
            next(iter(adapters(model, "bad").values())).lora_A.fill_(float("inf"))
        ended = Together(model, made).fit()
        write(folder / "together" / kind / "ended", {name: type(result).__name__ for name, result in ended.items()})
        for job in made[:2]:
            rank, config = jobs[job.name]
            alone = base()
            pf.inject(alone, everywhere(build("llama"), rank))
            one = trainer(alone, **config)
            one.fit()
            apart = {
                key: ((p - one.parameters[key]).norm() / one.parameters[key].norm()).item()
                for key, p in job.parameters.items()
            }
            losses = [[h.get("loss", h.get("valid_loss")) for h in of.history] for of in (job, one)]
            norms = {key: p.double().norm().item() for key, p in job.parameters.items()}
            write(folder / "together" / kind / job.name, [max(apart.values()), losses, norms])


def not_finite(folder):
    """One rank's loss is NaN."""
    made = trainer(adapted(), folder / "not_finite")
    broken = lambda _m, _a, out: out * float("nan") if made.step == 4 and ranks.rank() else out  # noqa: E731
    made.model.model.embed_tokens.register_forward_hook(broken)
    try:
        made.fit()
    except TrainingError as error:
        write(folder / "not_finite" / "message", str(error))


def write(path, value):
    path = path.with_name(f"{path.name}.{ranks.rank()}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class Breaks(Trainer):
    """Rank 1 breaks in step 2."""

    def how(self):
        raise RuntimeError("the cat sat on the power switch")

    def _train_step(self, groups):
        super()._train_step(groups)
        if self.step == 2 and ranks.rank() == 1:
            self.how()


class Dies(Breaks):
    def how(self):
        os._exit(7)


def dies(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end rank 0 before it has written
    try:
        trainer(adapted(), kind=Dies).fit()
    except Exception as error:
        write(folder / "dies", ranks.is_loss(error))
        os._exit(2)


def command_line():
    """The command line, with a trainer that breaks."""
    from plopfast.run import apply

    apply.Trainer = Breaks
    return main.main(sys.argv[2:])


CHECKS = {
    check.__name__: check
    for check in (
        ddp,
        streamed,
        fsdp,
        fsdp_dora,
        full,
        score,
        evaluation,
        resume,
        together,
        not_finite,
        dies,
        one_fails,
    )
}

if __name__ == "__main__":
    if sys.argv[1] == "command_line":
        sys.exit(command_line())
    ranks.init(torch.device("cpu"), 60)
    for check in sys.argv[2:]:
        CHECKS[check](Path(sys.argv[1]))
    ranks.close()
    os._exit(0)  # see main.main
