"""A family of models, tried end to end: each step is "ok", "refused: ..." (an error of plopfast's own) or WRONG or CRASH.

    run("qwen3_next")   {"family": ..., "class": ..., "steps": {"build": "ok", "score": "ok", ...}, "facts": {...}}

A step begins with a model of its own, so that one that fails leaves the others as they are.
"""

import contextlib
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import families
import reference
import torch
from peft import PeftModel
from torch import nn

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models.linears import linear_modules
from plopfast.models.running import first_logits
from plopfast.support.errors import AdapterError, PlacementError, PlopfastError

RANK, SCALING = 2, 2.0
STEPS = ("build", "score", "inject", "gradients", "train", "peft", "merge", "load", "resume")
TOLERANCE = 1e-4  # of scores and logits
GRADIENTS = 1e-3  # of all gradients together
TRAINED = 0.02  # of the way that three steps of AdamW went, which takes small gradients' signs for its own


class Wrong(Exception):  # noqa: N818  # it is a finding, not an error of the test
    """A result that is not what the reference says."""


def run(family, steps=STEPS):
    """All that is known of a family. Steps after a failing build are left out."""
    trial = Trial(family)
    results = {"build": trial.attempt(trial.build)}
    if results["build"] == "ok":
        results |= {name: trial.attempt(getattr(trial, name)) for name in steps[1:]}
    return {"family": family, "class": families.names()[family], "steps": results, "facts": trial.facts}


class Trial:
    def __init__(self, family):
        self.family, self.facts = family, {}
        self.vocabulary = families.VOCABULARY
        self.modules = {}  # what is injected: name -> (rank, alpha)
        self.report = None

    def attempt(self, step):
        """How a step ended, in a line."""
        try:
            with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
                warnings.simplefilter("ignore")
                self.folder = Path(folder)
                step()
        except PlopfastError as error:
            return f"refused: {_line(error)}"
        except Wrong as error:
            return f"WRONG: {_line(error)}"
        except Exception as error:
            at = next(
                (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/plopfast/" in f.filename), None
            )
            where = f" ({Path(at.filename).name}, {at.name})" if at else ""
            return f"CRASH: {type(error).__name__}: {_line(error)}{where}"
        return "ok"

    def build(self):
        if self.family in families.CANNOT:
            raise RuntimeError(families.CANNOT[self.family])
        model = self.plain()
        self.batches = reference.batches_of(self.vocabulary)
        logits = reference.logits_of(model, self.batches[0])
        assert logits.shape[-1] == self.vocabulary and torch.isfinite(logits).all(), tuple(logits.shape)
        self.facts["weights"] = sum(p.numel() for p in model.parameters())
        self.facts["share_in_experts"] = round(share_in_experts(model), 3)
        with contextlib.suppress(PlopfastError):
            infos = linear_modules(model)
            self.facts["types"] = sorted({info.type for info in infos})
            self.modules = {info.name: (RANK, RANK * SCALING) for info in infos}

    def plain(self):
        return families.build(self.family)

    def score(self):
        report = pf.score(self.plain(), self.batches)
        self.modules = dict.fromkeys(report.modules, (RANK, RANK * SCALING))
        self.report = report
        try:
            exact, never = reference.nfn(self.plain(), self.batches, report.modules)
        except RuntimeError as error:  # some classes write float32 into their code
            self.facts["score_reference"] = f"float32, as float64 raises {_line(error)[:80]}"
            exact, never = reference.nfn(self.plain(), self.batches, report.modules, torch.float32)
        if never:
            raise Wrong(f"{never[0]} has a score and is never called")
        worst = max(exact, key=lambda name: abs(report.modules[name] / exact[name] - 1))
        got, want = report.modules[worst], exact[worst]
        self.facts["score_off"] = abs(got / want - 1)
        if not abs(got / want - 1) <= TOLERANCE:
            raise Wrong(f"{worst}: NFN {got:.6f}, and {want:.6f} by hooks in float64")

    def inject(self):
        """Where the score came, what the rule "all" places; else every linear module."""
        before = reference.real_logits(self.plain(), self.batches[0])
        try:
            if self.report:
                self.modules = pf.place(self.report, rule="all", rank=RANK, alpha=RANK * SCALING).modules
            model = self.injected(random_b=False)
        except PlacementError:  # the steps that follow take what it asks for
            self.modules = self.fitting()
            raise
        _same("logits at B = 0", reference.real_logits(model, self.batches[0]), before)

    def injected(self, random_b=True):
        """A model with adapters, whose B is 0 or random."""
        linear_modules(model := self.plain())  # says why there are none
        torch.manual_seed(1)
        pf.inject(model, pf.Placement(dict(self.modules), [], "explicit", 0))
        if random_b:
            with torch.no_grad():
                for module in adapters(model).values():
                    module.lora_B.normal_(std=0.1)
        return model

    def fitting(self):
        """The modules whose weight is their own, with ranks up to the weight's smaller side."""
        model = self.plain()
        infos = {info.name: info for info in linear_modules(model)}
        owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        ranks = {name: min(rank, infos[name].n_in, infos[name].n_out) for name, (rank, _) in self.modules.items()}
        alone = [name for name in ranks if owners[id(infos[name].module.weight)] == 1]
        return {name: (ranks[name], ranks[name] * SCALING) for name in alone}

    def adapted(self, model):
        """The reference's account of an injected model."""
        values = {name: p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
        scaling = {name: alpha / rank for name, (rank, alpha) in self.modules.items()}
        return reference.Adapted(self.plain(), values, scaling)

    def gradients(self):
        model, batch = self.injected(), self.batches[0]
        plain, learned = self.adapted(model), batch["attention_mask"].bool()
        first_logits(model)  # refuses what no training can use
        logits = reference.logits_of(model, batch)
        real = batch["attention_mask"].bool()
        _same("logits at a random B", logits[real].detach().float(), plain.logits(batch)[real].detach().float())
        reference.loss_of(logits, batch["input_ids"], learned).backward()
        reference.loss_of(plain.logits(batch), batch["input_ids"], learned).backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        theirs = plain.gradients()
        largest = max(float(g.norm()) for g in theirs.values())
        self.facts["no_gradient"] = sorted(
            {n.rpartition(".")[0] for n in plain.values if n not in theirs or not theirs[n].any()}
        )
        for name, want in theirs.items():
            got = ours.get(name, torch.zeros_like(want))
            off = float((got - want).norm()) / max(float(want.norm()), 1e-3 * largest)
            if not off <= GRADIENTS:
                raise Wrong(f"{name}: the gradient is {off:.1%} off")

    def train(self):
        model = self.injected()
        plain = self.adapted(model)
        trainer = self.trainer(model, max_steps=3, eval_every=3)
        rows = [group for _, group in zip(range(3), trainer.plan.groups(), strict=False)]
        start = {name: value.detach().clone() for name, value in plain.values.items()}
        losses = reference.train(plain, [[self.rows[i] for i in group] for group in rows], lr=0.01)
        trainer.fit()
        logged = [record["loss"] for record in trainer.history if "loss" in record]
        for at, (got, want) in enumerate(zip(logged, losses, strict=True), 1):
            if not abs(got - want) <= 5e-4 * abs(want):
                raise Wrong(f"step {at}: loss {got:.5f}, and {want:.5f} by hand")
        now = dict(model.named_parameters())
        largest = max(float(g.norm()) for g in plain.gradients().values())
        learned = [
            n for n, g in plain.gradients().items() if g.norm() > 1e-4 * largest
        ]  # AdamW makes steps of noise, too
        way = sum(float((plain.values[n].detach() - start[n]).norm()) ** 2 for n in learned) ** 0.5
        off = sum(float((now[n].detach() - plain.values[n].detach()).norm()) ** 2 for n in learned) ** 0.5
        self.facts["trained_off"] = off / way
        if not off <= TRAINED * way:
            raise Wrong(f"the adapters are {off / way:.1%} of their way off those by hand")

    def trainer(self, model, **settings):
        self.rows = reference.examples_of(self.vocabulary, 8)
        config = {"lr": 0.01, "schedule": "constant", "warmup": 0.0, "clip": 0.0, "batch_rows": 3, **settings}
        return pf.Trainer(model, pf.TrainConfig(**config), self.rows, out=self.folder / "run")

    def peft(self):
        model = self.injected()
        want = reference.real_logits(model, self.batches[0])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pf.save_adapter(model, self.folder / "adapter")
        told = [str(one.message).partition(": ")[2] for one in said if ": PEFT " in str(one.message)]
        base = self.plain()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                theirs = PeftModel.from_pretrained(base, self.folder / "adapter").eval()
            except Exception as error:
                if told:
                    raise AdapterError(told[0]) from error
                raise Wrong(f"PEFT raises {type(error).__name__}: {_line(error)}") from error
        missing = [w for w in said if "missing adapter keys" in str(w.message)]
        got = reference.real_logits(theirs.get_base_model(), self.batches[0])
        off = _off(got, want)
        if told and missing:
            raise AdapterError(told[0])
        if told:
            raise Wrong(f"plopfast says in vain: {told[0]}")
        if missing or off > TOLERANCE:
            dropped = f"; PEFT drops adapters with a warning: {_line(missing[0].message)[:120]}" if missing else ""
            raise Wrong(f"the logits in PEFT are {off:.1%} off{dropped}")

    def merge(self):
        model, base = self.injected(), self.plain().state_dict()
        plain, names = self.adapted(model), set(adapters(model))
        want = reference.real_logits(model, self.batches[0])
        pf.merge(model)
        _same("merged logits", reference.real_logits(model, self.batches[0]), want)
        weights, now = plain.weights(), model.state_dict()
        if now.keys() != base.keys():
            raise Wrong(f"the merged model has other names: {sorted(now.keys() ^ base.keys())[:3]}")
        for name, value in now.items():
            expected = weights[name].detach() if name in weights else base[name]
            if {name, name.rpartition(".")[0]} & names and name in weights:
                _same(f"merged {name}", value, expected)
            elif not torch.equal(value, base[name]):
                raise Wrong(f"{name} is not adapted, and merging changed it")

    def load(self):
        model = self.injected()
        want = reference.real_logits(model, self.batches[0])
        pf.save_adapter(model, self.folder / "adapter")
        fresh = self.plain()
        pf.load_adapter(fresh, self.folder / "adapter")
        _same("logits of the loaded adapter", reference.real_logits(fresh, self.batches[0]), want)

    def resume(self):
        whole = self.trainer(self.injected(), max_steps=4, save_every=2)
        whole.fit()
        newest = max((self.folder / "run" / "checkpoints").iterdir())
        newest.unlink()
        again = self.trainer(self.injected(), max_steps=4, save_every=2)
        again.fit(resume=True)
        for name, value in whole.parameters.items():
            if not torch.equal(value, again.parameters[name]):
                raise Wrong(f"{name} differs after a resumed training")


def share_in_experts(model):
    """The share of the repeated layers' weights that lies in 3-D parameters, which no adapter of a linear module reaches."""
    layers = {
        name: (parameter, model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if any(part.isdigit() for part in name.split("."))
    }
    every = sum(parameter.numel() for parameter, _ in layers.values())
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    experts = sum(p.numel() for p, owner in layers.values() if p.dim() == 3 and not isinstance(owner, convolutions))
    return experts / every if every else 0.0


def _same(what, got, want):
    off = _off(got, want)
    if not off <= TOLERANCE:
        raise Wrong(f"{what}: {off:.2%} off")


def _off(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def _line(error):
    return " ".join(str(error).split())[:300]
