"""`plopfast search`: rank, alpha, learning rate, init and placement rule tried together, by Optuna.

Multivariate TPE (Bergstra et al. 2011; Falkner et al., BOHB, arXiv 1807.01774) proposes; asynchronous successive halving
(Li et al., arXiv 1810.05934) stops a training whose validation loss is not among the lowest third at its 1st, 3rd, 9th
look. Trials are judged by validation loss alone and share one loaded model. The store, search.db, is what a search goes
on from; a trial that was running when the process ended is marked failed there and run again.
"""

import dataclasses
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from . import files, machine
from .config import FREE, RunConfig
from .data import batches_of
from .errors import ConfigError, FileError, PlacementError, TrainingError
from .lora import INITS, inject, unload
from .models import fingerprint, linear_modules, same_fingerprint
from .nfn import NFNReport, score
from .pipeline import SCORE_ROWS, Run
from .placement import Placement, place
from .placement import RULES as ALL_RULES
from .train import Trainer

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise ConfigError(f"the search needs Optuna ({error}): pip install 'plopfast[search]'") from error

STORE, STUDY = "search.db", "plopfast"
REMEDY = "choose another --out, or pass --overwrite to replace it"
RANKS = (4, 8, 16, 32, 64)
ALPHAS, LRS = (4.0, 128.0), (1e-4, 1e-2)
RULES = ("plop", "plop-inverse", "attn", "mlp", "all")
HALVING = 3
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
# settings on which no trial depends: files are known by their hashes, every row is scored
APART = {*FREE, "model", "train", "valid", "test", "unlabeled", "confidence", "arms", "lrs", "seeds", "general"}


class Study(optuna.Study):
    """Blind to failed trials: one that was killed and run again must not count twice among those it is halved with."""

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [t for t in super().get_trials(deepcopy, states) if t.state is not TrialState.FAIL]


class Search:
    """A run's search: the space, the study in its store, and what trials share. The space holds the run's own settings,
    which are the first trial. Raises PlacementError where they cannot be placed, ConfigError for a store of another search.
    """

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.config
        infos = [info for info in linear_modules(run.model) if info.layer is not None]
        widest = min(min(info.n_in, info.n_out) for info in infos)
        ranks = sorted({rank for rank in (*RANKS, config.rank) if rank <= widest} | {config.rank})
        self.most = ranks[-1]
        self.scored = functools.cache(self._scored)  # EVA's vectors of each rank as a run takes them
        rules = [rule for rule in dict.fromkeys((config.rule, *RULES)) if self._can_place(rule, ranks[-1])]
        self.space: dict[str, BaseDistribution] = {
            "rank": CategoricalDistribution(ranks),
            "alpha": FloatDistribution(min(ALPHAS[0], config.alpha), max(ALPHAS[1], config.alpha), log=True),
            "lr": FloatDistribution(min(LRS[0], config.lr), max(LRS[1], config.lr), log=True),
            "init": CategoricalDistribution([init for init in INITS if init != "eva" or not config.compat]),
            "rule": CategoricalDistribution(rules),
        }
        names = [info.name for info in infos]
        paths = {split: path for split, path in run.paths.items() if split != "test"}
        self.identity = {
            "model": fingerprint(run.model, names[:8]),
            "data": {split: files.sha256(path) for split, path in paths.items()},
            "space": {name: json.loads(distribution_to_json(known)) for name, known in self.space.items()},
            "settings": {name: value for name, value in dataclasses.asdict(config).items() if name not in APART},
        }
        self.study = self._open(run.folder / STORE)

    def _scored(self, rank: int) -> NFNReport:
        """Every row's scores, and EVA's vectors of this rank."""
        config = self.run.config
        batches = batches_of(self.run.sample(), SCORE_ROWS, tokens=config.score_tokens, skip_first=config.skip_first)
        how: dict[str, Any] = {"baseline": config.baseline, "compat": config.compat, "backend": config.backend}
        eva_rank = None if config.compat else rank
        return score(self.run.model, batches, seed=config.seed, progress=self.run.progress, eva_rank=eva_rank, **how)

    def place(self, config: RunConfig) -> Placement:
        rule = config.rule if config.rule in ALL_RULES else [n.strip() for n in config.rule.split(",") if n.strip()]
        how: dict[str, Any] = {"k": config.k, "rank": config.rank, "alpha": config.alpha, "seed": config.seed}
        return place(self.scored(self.most), rule, **how)

    def _can_place(self, rule: str, rank: int) -> bool:
        try:
            self.place(dataclasses.replace(self.run.config, rule=rule, rank=rank))
        except PlacementError as error:
            if rule not in ("attn", "mlp") or rule == self.run.config.rule:
                raise
            self.run.say(f"not searched: {error}")
            return False
        return True

    def _open(self, path: Path) -> optuna.Study:
        """The study in `path`, a new one if there is none; its killed trials are marked failed."""
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=HALVING)
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            others = set(optuna.get_all_study_names(storage)) - {STUDY}
            study = optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
            study = Study(STUDY, storage, pruner=pruner)
        except (SQLAlchemyError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise FileError(f"{path}: cannot be used as Optuna's store ({first}); --overwrite starts anew") from error
        kept, now = study.user_attrs.get("identity"), json.loads(json.dumps(self.identity))
        if kept is None and not study.trials and not others:
            study.set_user_attr("identity", now)
        elif others or kept is None:
            raise ConfigError(
                f"{path}: holds another study ({', '.join(sorted(others)) or 'not made by plopfast'}); {REMEDY}"
            )
        elif differences := _differences(kept, now):
            raise ConfigError(f"{path}: holds another search: {'; '.join(differences)}; {REMEDY}")
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        return study

    def done(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=DONE)

    def next(self) -> None:
        """Asks for a trial, trains it and tells what came of it."""
        config, count = self.run.config, len(self.done())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, before Optuna 5
            seed = (config.seed * 1_000_003 + count) % 2**32  # by the trials done: a resumed search proposes the same
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
        if not count and not self.study.get_trials(states=(TrialState.WAITING,)):
            self.study.enqueue_trial({name: getattr(config, name) for name in self.space})
        trial = self.study.ask(self.space)
        began = time.perf_counter()
        loss = None
        try:
            loss = self._train(trial)
        except optuna.TrialPruned:
            pass
        except (TrainingError, torch.OutOfMemoryError) as error:  # to TPE a pruned trial without a loss is the worst
            trial.set_user_attr("why", str(error))
        trial.set_user_attr("seconds", round(time.perf_counter() - began, 3))
        self.study.tell(trial, loss, TrialState.PRUNED if loss is None else TrialState.COMPLETE)

    def _train(self, trial: optuna.Trial) -> float:
        run = self.run
        config = dataclasses.replace(run.config, **trial.params, log_to="none")
        placement = self.place(config)
        vectors = self.scored(config.rank).eva if config.init == "eva" else None
        train, valid, unlabeled = (run.examples(split) for split in ("train", "valid", "unlabeled"))

        def look(step: int, loss: float) -> None:
            trial.set_user_attr("steps", step)
            trial.report(loss, -(-step // config.eval_every))
            if step < trainer.max_steps and trial.should_prune():
                raise optuna.TrialPruned

        try:
            start: dict[str, Any] = {"seed": config.seed, "init": config.init, "eva": vectors}
            inject(run.model, placement, dropout=config.dropout, rslora=config.rslora, backend=config.backend, **start)
            how: dict[str, Any] = {"unlabeled": unlabeled, "progress": run.progress, "on_valid": look}
            trainer = Trainer(run.model, config, train, valid, **how)
            result = trainer.fit()
        finally:
            unload(run.model)
        assert result.valid_loss is not None  # there are always validation rows
        return result.valid_loss

    def best(self) -> FrozenTrial | None:
        return min(self.study.get_trials(states=DONE[:1]), key=lambda t: t.values[0], default=None)

    def save(self) -> None:
        """Writes search.json; "settings" are the best trial's, null before a trial was trained to its end."""
        run, best = self.run, self.best()
        settings = dataclasses.replace(run.config, confidence=0.0, **best.params) if best else None
        value = {
            "plopfast": "search",
            "settings": settings and dataclasses.asdict(settings),  # confidence 0, as every row was scored
            "best": best and best.number,
            "trials": [_as_json(trial) for trial in optuna.Study.get_trials(self.study)],
            **{name: self.identity[name] for name in ("data", "space")},
            "model": run.model.name_or_path,
            "command": " ".join(["plopfast", *sys.argv[1:]]),
            "machine": machine.describe(),
            "versions": machine.versions() | {"optuna": optuna.__version__},
        }
        files.write_json(run.file("search"), value)

    def table(self, rows: int = 5) -> str:
        """The best trials, with the run's own settings."""
        done = self.done()
        whole = sorted((t for t in done if t.state is TrialState.COMPLETE), key=lambda t: t.values[0])
        lines = [
            f"{'trial':>5} {'valid loss':>10} {'rank':>5} {'alpha':>7} {'lr':>9}  {'init':<10} {'rule':<13} seconds"
        ]
        for trial in whole[:rows] + [t for t in whole[rows:] if t.number == done[0].number]:
            p, seconds = trial.params, trial.user_attrs["seconds"]
            lines.append(
                f"{trial.number:>5} {trial.values[0]:>10.4f} {p['rank']:>5} {p['alpha']:>7.1f} {p['lr']:>9.2e}  "
                f"{p['init']:<10} {p['rule']:<13} {seconds:.1f}"
            )
        lines.append(
            f"{len(done)} trials, {len(done) - len(whole)} stopped early; trial {done[0].number}: your settings"
        )
        return "\n".join(lines)


def run_search(run: Run) -> str:
    """Tries `search_trials` combinations, those of an earlier call counted where `run.resume` is set; search.json after
    each. Returns a table of the best. Raises ConfigError for settings that leave nothing to search or a store of another
    search, FileError for one that is damaged, TrainingError where no training came to its end."""
    config, path = run.config, run.folder / STORE
    if config.full or config.budget:
        what = "--full has no adapters" if config.full else "--budget fixes the size"
        raise ConfigError(f"search tries ranks and placements of adapters, but {what}: leave it out")
    run.rows("train")  # broken data should stop the search before the model is loaded
    if run.resume:
        run.write_config()
    else:
        files.refuse_existing(path, run.overwrite)
        run.begin("search")
        for old in (path, path.with_name(f"{STORE}-journal"), run.file("search")):
            old.unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, total = Search(run), config.search_trials
    with run.stage("search"):
        while (count := len(search.done())) < total:
            run.say(f"trial {count + 1} of {total}")
            search.next()
            search.save()
            done, best = search.done(), search.best()
            left = fmean(t.user_attrs["seconds"] for t in done) * (total - len(done))
            so_far = f"{best.values[0]:.4f} ({_short(best)})" if best else "none"
            run.say(f"{_short(done[-1])}: {_outcome(done[-1])}; best so far {so_far}; about {left / 60:.0f} min left")
    search.save()
    if not search.best():
        raise TrainingError(
            f"none of {total} trials was trained to its end: {_outcome(search.done()[0])}; see {path.parent}"
        )
    return f"{search.table()}\ntrain and evaluate the best: plopfast run --config {run.file('search')} --out NEW"


def _as_json(trial: FrozenTrial) -> dict[str, Any]:
    looks = trial.intermediate_values
    loss = trial.values[0] if trial.state is TrialState.COMPLETE else min(looks.values(), default=None)
    state = {"COMPLETE": "complete", "PRUNED": "stopped early"}.get(trial.state.name, "killed")
    kept = {name: trial.user_attrs.get(name) for name in ("steps", "seconds", "why")}
    return {"number": trial.number, "params": trial.params, "state": state, "valid_loss": loss, "looks": looks, **kept}


def _outcome(trial: FrozenTrial) -> str:
    done = trial.state is TrialState.COMPLETE
    return f"loss {trial.values[0]:.4f}" if done else trial.user_attrs.get("why", "stopped early")


def _short(trial: FrozenTrial) -> str:
    p = trial.params
    return f"rank {p['rank']}, alpha {p['alpha']:.1f}, lr {p['lr']:.1e}, {p['init']}, {p['rule']}"


def _differences(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What an identity `now` has otherwise than the one `kept`, in words."""
    found = [] if same_fingerprint(kept["model"], now["model"]) else ["the model's weights differ"]
    for part in ("data", "settings", "space"):
        for name in sorted({*kept[part], *now[part]}):
            was, is_ = kept[part].get(name), now[part].get(name)
            if was != is_:
                found.append(f"{name}: the file differs" if part == "data" else f"{name} was {was}, is {is_}")
    return found
