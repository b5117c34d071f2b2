"""The report: one self-contained HTML page, and the numbers of its figures as CSV, from the files of a run folder alone.

Each section is there if its file is; in place of the others stands the command that makes them. The page claims no more than
the files hold: it says so where the prompts do not settle the choice, or where a trial shows no difference. It holds no
script, no picture file and no request: figures are inline SVG and follow the reader's colours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support import files
from ..support.errors import ConfigError, FileError
from ..support.ledger import Ledger
from ..support.tables import DIFFERS

try:
    import jinja2
except ImportError as error:
    raise ConfigError(f"the report needs jinja2 ({error}): pip install 'plopfast[report]'") from error

from .figures import Section
from .folder import RunFolder
from .head import head_of
from .sections_audit import audit
from .sections_cost import cost
from .sections_data import data
from .sections_grpo import grpo
from .sections_results import results
from .sections_search import search
from .sections_training import training
from .sections_trial import trial
from .sections_use import use
from .sections_where import where
from .words import harmless

TEMPLATE = "page.html.j2"
NUMBERS = "report"  # the folder of CSV files
WRAP = 34  # characters of a cell that may be broken


@dataclass(frozen=True)
class Source:
    """A section: how it is made, the files it reads, the stage that writes the first, and what it adds to the page."""

    section: Callable[[RunFolder], Section]
    files: tuple[str, ...]
    stage: str
    adds: str


SOURCES = (
    Source(where, ("scores.json", "placement.json"), "score", "NFN by module type and layer"),
    Source(training, ("metrics.jsonl", "training.json"), "train", "the training curve"),
    Source(results, ("eval.json", "eval_rows.jsonl"), "eval", "the tuned model compared with the base model"),
    Source(cost, ("estimate.json",), "estimate", "memory and FLOPs compared with full fine-tuning"),
    Source(data, ("data.json",), "data", "the rows, their lengths and what is learned of them"),
    Source(trial, ("trial.json",), "trial", "a trial of several placements, and forgetting"),
    Source(audit, ("audit.json",), "audit", "stability, controls and other criteria"),
    Source(search, ("search.json",), "search", "a search of rank, alpha, learning rate and placement"),
)
LEARNED = Source(
    grpo, ("grpo.json", "rewards.jsonl"), "grpo", "what completions earned"
)  # not missed where there is none
PLACED = ("placement.json", "place", "which modules get adapters, and their rank")  # of the first section


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder, and the numbers of its figures as CSV into the folder `report` there.

    Returns the page's path. Raises FileError where the folder holds nothing to show, and for a file that is damaged or
    lacks what its section shows.
    """
    run = RunFolder(Path(folder))
    sections = sections_of(run)
    page = rendered(run, sections)
    ledger = Ledger(run.path)
    ledger.claim_once({"report.html": ()})
    with ledger.replacing(NUMBERS) as scratch:
        scratch.mkdir()
        for figure in (figure for section in sections for figure in section.figures()):
            if figure.csv:
                figure.csv.table().write_csv(scratch / f"{figure.csv.name}.csv")
    target = run.path / "report.html"
    files.write_text(target, page)
    return target


def sections_of(run: RunFolder) -> list[Section]:
    """Return the page's sections in order. Raises FileError where the folder holds nothing to show."""
    sources = [*SOURCES[:2], *([LEARNED] if run.grpo else []), *SOURCES[2:]]
    if not any((run.path / file).exists() for source in (*SOURCES, LEARNED) for file in source.files):
        raise FileError(
            f"{run.path / 'scores.json'}: no such file, nor another to report; it is written by plopfast score"
        )
    sections = [_made(source, run) for source in sources]
    # a section that is there may still lack a file
    missing = [
        (source.adds, run.command(source.stage)) for source in SOURCES if not (run.path / source.files[0]).exists()
    ]
    if not (run.path / PLACED[0]).exists():
        missing.append((PLACED[2], run.command(PLACED[1])))
    return [*sections, use(run, missing)]


def _made(source: Source, run: RunFolder) -> Section:
    try:
        return source.section(run)
    except (KeyError, TypeError) as error:
        raise FileError(
            f"{run.path / source.files[0]}: not what plopfast {source.stage} writes ({type(error).__name__}: {error}); make it "
            f"anew with plopfast {source.stage} --overwrite"
        ) from error


def rendered(run: RunFolder, sections: list[Section]) -> str:
    """Return the page's text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.tests["differing"] = lambda cells: any(cell.startswith(DIFFERS) for cell in cells)
    environment.filters["pct"] = lambda value: f"{value:.4g}%"
    environment.globals["WRAP"] = WRAP
    values: dict[str, Any] = {
        "head": head_of(run),
        "sections": sections,
        "folder": run.path.name,
        "version": run.config.get("versions", {}).get("plopfast", ""),
    }
    return harmless(environment.get_template(TEMPLATE).render(values))
