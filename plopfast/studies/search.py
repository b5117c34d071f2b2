"""`plopfast search`: rank, alpha, learning rate, init and placement rule tried together, by Optuna.

Multivariate TPE (Falkner et al., BOHB, arXiv 1807.01774) proposes combinations. Asynchronous successive halving (Li et al.,
arXiv 1810.05934) stops a training whose validation loss is not among the lowest third at its 1st, 3rd, 9th look. Trials are
judged by validation loss alone and share one loaded model. A search goes on from its store, search.db: a trial that was
running when the process ended is marked failed there and run again.
"""

import dataclasses
import functools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ..lora.init import INITS
from ..lora.injection import unload
from ..lora.placement import full_rank
from ..models.experts import weights_of
from ..placing.by_settings import placed, scored
from ..placing.rules import RULES, command_rules
from ..run.apply import trainer_for
from ..run.run import Run
from ..scoring.report import NFNReport
from ..support import files
from ..support.config import FREE
from ..support.errors import ConfigError, FileError, PlacementError, TrainingError
from ..support.inputs import check_same
from ..support.progress import Work

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
    from optuna.exceptions import ExperimentalWarning, StorageInternalError
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise ConfigError(f"the search needs Optuna ({error}): pip install 'plopfast[search]'") from error

STORE, STUDY = "search.db", "plopfast"
RANKS = (4, 8, 16, 32, 64)
ALPHAS, LRS = (4.0, 128.0), (1e-4, 1e-2)
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
# no trial depends on these settings: files are known by their hashes, and every row is scored
APART = {*FREE, "model", "train", "valid", "test", "unlabeled", "confidence", "arms", "lrs", "seeds", "general"}
REMEDY = "choose another --out, or pass --overwrite to replace it"


class Study(optuna.Study):
    """A study that does not see failed trials: one that was killed and run again must not count twice when it is halved."""

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [t for t in super().get_trials(deepcopy, states) if t.state is not TrialState.FAIL]


class Search:
    """A run's search: the space, the study in its store, and what trials share.

    The space holds the run's own settings, which are the first trial. Raises PlacementError where a rule cannot be placed,
    ConfigError for the store of a search with other inputs.
    """

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.config
        most = min(full_rank(info.n_in, info.n_out) for info in weights_of(run.model))
        ranks = sorted({config.rank, *(rank for rank in RANKS if rank <= most)})
        self.scored = functools.cache(self._scored)
        self.report = self.scored(ranks[0])  # NFN is the same whatever EVA's rank
        if self.report.tokens < ranks[-1] and not config.compat:
            raise ConfigError(
                f"EVA's vectors of rank {ranks[-1]} need as many tokens, got {self.report.tokens}: score more prompts"
            )
        tried = [name for name in command_rules() if not RULES[name].seeded]  # a draw is worth no training
        rules = [rule for rule in dict.fromkeys((config.rule, *tried)) if self._can_place(rule, ranks[-1])]
        self.space: dict[str, BaseDistribution] = {
            "rank": CategoricalDistribution(ranks),
            "alpha": FloatDistribution(min(ALPHAS[0], config.alpha), max(ALPHAS[1], config.alpha), log=True),
            "lr": FloatDistribution(min(LRS[0], config.lr), max(LRS[1], config.lr), log=True),
            "init": CategoricalDistribution([init for init in INITS if init != "eva" or not config.compat]),
            "rule": CategoricalDistribution(rules),
        }
        identity = {name: value for name, value in dataclasses.asdict(config).items() if name not in APART}
        self.ranges = {name: json.loads(distribution_to_json(kind))["attributes"] for name, kind in self.space.items()}
        identity |= {f"range of {name}": known for name, known in self.ranges.items()}
        self.study = self._open(run.folder / STORE, identity | run.inputs(without="test"))

    def _scored(self, rank: int) -> NFNReport:
        """Scores every row, and takes EVA's vectors as a run of this rank does (their sketch depends on the rank)."""
        settings = self.run.config.scoring
        init = "kaiming" if settings.compat else "eva"  # the authors' procedure takes no vectors
        settings = dataclasses.replace(settings, confidence=0.0, init=init, rank=rank)
        return scored(self.run.model, self.run.sample(), settings, self.run.progress)

    def _can_place(self, rule: str, rank: int) -> bool:
        try:
            placed(self.report, dataclasses.replace(self.run.config.placing, rule=rule, rank=rank))
        except PlacementError as error:
            if "knows none" not in str(error) or rule == self.run.config.rule:
                raise
            self.run.say(f"not searched: {error}")
            return False
        return True

    def _open(self, path: Path, identity: dict[str, Any]) -> Study:
        """Opens the study in `path`, or begins one; trials that were killed are marked failed."""
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        try:
            storage = optuna.storages.RDBStorage(URL.create("sqlite", database=str(path)).render_as_string())
            if others := set(optuna.get_all_study_names(storage)) - {STUDY}:
                raise ConfigError(f"{path}: holds another study ({', '.join(sorted(others))}); {REMEDY}")
            optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
            study = Study(STUDY, storage, pruner=pruner)
        except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            first = str(error.__cause__ or error).splitlines()[0]
            raise FileError(f"{path}: cannot be used as Optuna's store ({first}); {REMEDY}") from error
        if not study.user_attrs and not study.trials:
            study.set_user_attr("identity", identity)
        kept = study.user_attrs.get("identity", {})
        check_same(kept, identity, path)
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        return study

    def done(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(COMPLETE, PRUNED))

    def ranking(self) -> list[FrozenTrial]:
        """The trials trained to their end, lowest validation loss first."""
        return sorted(self.study.get_trials(deepcopy=False, states=(COMPLETE,)), key=lambda t: t.values[0])

    def next(self) -> None:
        """Asks for a trial, trains it, and tells the study the result."""
        config, count, began = self.run.config, len(self.done()), time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # multivariate, before Optuna 5
            seed = (config.seed * 1_000_003 + count) % 2**32  # by the trials done: a resumed search proposes the same
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
        if not count and not self.study.get_trials(states=(TrialState.WAITING,)):
            self.study.enqueue_trial({name: getattr(config, name) for name in self.space})
        trial = self.study.ask(self.space)
        loss = None
        try:
            loss = self._train(trial)
        except optuna.TrialPruned:
            pass
        except (TrainingError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("why", str(error))
        trial.set_user_attr("seconds", round(time.perf_counter() - began, 3))
        self.study.tell(trial, loss, PRUNED if loss is None else COMPLETE)

    def _train(self, trial: optuna.Trial) -> float:
        """Trains as `run_train` does, keeps nothing, and returns the validation loss."""
        run = self.run
        config = dataclasses.replace(run.config, **trial.params, log_to="none")
        vectors = self.scored(config.rank).eva if config.init == "eva" else None

        def look(step: int, loss: float) -> None:
            trial.set_user_attr("steps", step)
            trial.report(loss, -(-step // trainer.plan.eval_every))
            if step < trainer.max_steps and trial.should_prune():
                raise optuna.TrialPruned

        try:
            trainer = trainer_for(run, placed(self.report, config.placing), vectors, config=config, on_valid=look)
            loss = trainer.fit().valid_loss
        finally:
            unload(run.model)
        assert loss is not None  # a run always has validation rows
        return loss

    def save(self) -> None:
        """Writes search.json; "settings" are the best trial's, null before one was trained to its end."""
        best = next(iter(self.ranking()), None)
        # confidence 0, as every row was scored
        settings = dataclasses.replace(self.run.config, confidence=0.0, **best.params) if best else None
        value = {
            "plopfast": "search",
            "settings": settings and dataclasses.asdict(settings),
            "best": best and best.number,
            "trials": [_as_json(trial) for trial in optuna.Study.get_trials(self.study)],  # the killed ones too
            "space": self.ranges,
        }
        files.write_json(self.run.file("search"), value)


def run_search(run: Run) -> str:
    """Tries `search_trials` combinations, writes search.json after each, and returns a table of the best.

    With `run.resume` the combinations of earlier calls count. Raises ConfigError for settings that leave nothing to search
    and for the store of a search with other inputs, FileError for a store that exists or is damaged, TrainingError where
    no training came to its end.
    """
    config, total = run.config, run.config.search_trials
    if config.full or config.budget:
        what = "--full has no adapters" if config.full else "--budget fixes the size"
        raise ConfigError(f"a search tries ranks and placements of adapters, but {what}: leave it out")
    run.rows("train")
    run.ready("search", "train", "valid", "unlabeled")  # broken data should stop the search before the model is loaded
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with run.stage("search"):
        search = Search(run)
        with Work("trials", total, run.progress) as work:
            for _ in search.done():
                work.skip()
            while (count := len(search.done())) < total:
                with work.piece(f"trial {count + 1}"):
                    search.next()
                search.save()
                so_far = [_row(trial) for trial in search.ranking()[:1]] or ["none"]
                run.say(f"{_row(search.done()[-1])}\n{so_far[0]}, the best so far")
        search.save()
    done, ranking = search.done(), search.ranking()
    if not ranking:
        raise TrainingError(f"none of {len(done)} trials was trained to its end; the first: {_row(done[0])}")
    return "\n".join([
        *(_row(t) for t in ranking if t in ranking[:5] or t.number == done[0].number),
        f"{len(done)} trials, {len(done) - len(ranking)} stopped early; trial {done[0].number} has the run's own settings",
        f"train and evaluate the best: plopfast run --config {run.file('search')} --out NEW",
    ])  # fmt: skip


def _as_json(trial: FrozenTrial) -> dict[str, Any]:
    looks = trial.intermediate_values
    loss = trial.values[0] if trial.state is COMPLETE else min(looks.values(), default=None)
    state = {COMPLETE: "complete", PRUNED: "stopped early"}.get(trial.state, "killed")
    kept = {name: trial.user_attrs.get(name) for name in ("steps", "seconds", "why")}
    return {"number": trial.number, "params": trial.params, "state": state, "valid_loss": loss, "looks": looks, **kept}


def _row(trial: FrozenTrial) -> str:
    p, attrs = trial.params, trial.user_attrs
    what = f"valid loss {trial.values[0]:.4f}" if trial.state is COMPLETE else attrs.get("why", "stopped early")
    return (
        f"trial {trial.number:<3} rank {p['rank']:<3} alpha {p['alpha']:<6.1f} lr {p['lr']:.2e}  {p['init']:<10} "
        f"{p['rule']:<12} {attrs['seconds']:>7.1f} s  {what}"
    )
