"""Who answers a prompt: the base, an adapter, or several of them side by side in one batch."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tasks import Prompt
from ..lora.active import active
from ..lora.many import Use
from ..lora.peft_files import check_files, load_adapter
from ..report import kinds
from ..support.config import RunConfig
from ..support.errors import AdapterError, ConfigError, DataError, nearest, shown
from .run import Run
from .stages import adapt


@dataclass(frozen=True)
class Question:
    """A prompt, and the adapter that answers it (None: the base), but for the modules `without`."""

    prompt: Prompt
    adapter: str | None
    without: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """For people: "legal without mlp"."""
        return (self.adapter or "base") + (f" without {', '.join(self.without)}" if self.without else "")


def find_adapters(out: Path | None, given: Sequence[str], config: RunConfig) -> dict[str, Path]:
    """Name -> the folder of each adapter that answers, checked as far as that goes without its base; none for the base itself.

    `given` are folders, or NAME=FOLDER; without them it is the run folder's adapter, or those of its jobs. A folder called
    "adapter" has the name of the folder that it is in. Raises ConfigError for a name that comes twice, and AdapterError for a folder
    that is no adapter's, or damaged.
    """
    found: dict[str, Path] = {}
    for text in given:
        named, _, folder = text.partition("=")
        path = Path(text) if Path(text).exists() or not folder else Path(folder)
        own = path.absolute().parent.name if path.absolute().name == "adapter" else path.absolute().name
        name = own if path == Path(text) else named
        if not name or name in found:
            raise ConfigError(
                f"--adapter {text}: expected a name that no other has, got {name!r}: give --adapter NAME={path}"
            )
        found[name] = path
    if not given and out is not None and not config.full:
        found = _of_run(out)
    for path in found.values():
        check_files(path)
    return found


def only(adapters: Mapping[str, Path]) -> Mapping[str, Path]:
    """The adapter, or none. Raises ConfigError for several, of a run folder of plopfast multi: one talks."""
    if len(adapters) > 1:
        raise ConfigError(
            f"several adapters: {', '.join(adapters)}: give --adapter FOLDER, one of {next(iter(adapters.values())).parent.parent}"
        )
    return adapters


def _of_run(out: Path) -> dict[str, Path]:
    folder = out / "adapter"
    if not folder.exists() and (out / "multi.json").is_file():
        jobs = kinds.read(out / "multi.json", "plopfast multi")["jobs"]
        if found := {name: out / job["folder"] / "adapter" for name, job in jobs.items() if "error" not in job}:
            return found
    if not folder.exists():
        raise AdapterError(
            f"{folder}: no such folder; it is written by plopfast train. Leave out --out, and give --model, for the base's answers"
        )
    return {out.absolute().name: folder}


def questions(prompts: Sequence[Prompt], names: Sequence[str], without: Sequence[str]) -> list[Question]:
    """Each prompt to each adapter, or, where its row says so, to its "adapter" alone (null: the base); a row's "without" and
    `without` are modules that are switched off.

    Raises DataError for a row that names an unknown adapter, modules in another form, or modules where the base answers, and
    ConfigError for modules without an adapter.
    """
    if without and not names:
        raise ConfigError(
            "--without switches modules of an adapter off, and the base alone answers: give --adapter, or leave it out"
        )
    found: list[Question] = []
    everyone: list[str | None] = [*names] or [None]
    for prompt in prompts:
        told = prompt.columns
        named = told.get("adapter")
        if "adapter" in told and not (named is None or named in names):
            close = nearest(str(named), list(names))
            raise DataError(
                f"{prompt.where}: names the adapter {shown(named)}{close}; given are {', '.join(names) or 'none'}: give --adapter "
                "NAME=FOLDER"
            )
        off = told.get("without") or []
        if not (isinstance(off, list) and all(isinstance(part, str) for part in off)):
            raise DataError(f'{prompt.where}: expected "without", a list of modules such as ["mlp"], got {shown(off)}')
        who = [named] if "adapter" in told else everyone
        if off and who == [None]:
            raise DataError(
                f'{prompt.where}: "without" switches modules of an adapter off, and the base alone answers it: leave it out, or name '
                "an adapter"
            )
        found += [Question(prompt, one, (*without, *off) if one else ()) for one in who]
    return found


def load(run: Run, adapters: Mapping[str, Path], asked: Sequence[Question], any_base: bool) -> Any:
    """The run's model with what answers. One adapter that answers all without exception has no name there, as nothing is chosen."""
    model = run.model
    for name, path in adapters.items():
        run.say(f"adapter {name}: {path}")
    if are_alike(adapters, asked):
        for path in adapters.values():
            adapt(run, path, any_base, run.config.backend)
        return model
    for name, path in adapters.items():
        load_adapter(model, path, check_base=not any_base, backend=run.config.backend, name=name)
    return model


def are_alike(adapters: Mapping[str, Path], asked: Sequence[Question]) -> bool:
    """Whether all questions go to the base, or to the only adapter, whole."""
    whole = (next(iter(adapters), None), ())
    return len(adapters) < 2 and {(one.adapter, one.without) for one in asked} <= {whole}


def chooser(
    model: Any, asked: Sequence[Question]
) -> Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]:
    """What `generate` runs batches in: the adapters of these questions, one for each row; the base for none."""

    def choose(numbers: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        rows = [Use(asked[i].adapter, asked[i].without) for i in numbers]
        return active(model, rows or None)

    return choose
