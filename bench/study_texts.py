"""The tasks of `study_tasks.py` that are made of texts by people: categories, sentiment, python-docs.

`categories` is the demo task, shipped in this repository. `sentiment` is made of film review snippets, each rated by 20
people or so, which the source archive of vaderSentiment on PyPI holds (MIT). They are not shipped here and not in the wheel:
the archive (2.4 MB) is taken from a folder, or fetched into it once by pip, and its sha256 is checked. `python-docs` is
read from the docstrings of the Python that runs this, so its rows depend on the version.
"""

import ast
import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "plopfast" / "demo"
Row = dict[str, str]

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # a mean rating, of -4 to 4, from which a snippet is called positive or negative
LENGTHS = range(40, 141)  # characters of a snippet
FETCH = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2"]

NOT_READ = {
    "test", "tests", "site-packages", "dist-packages", "pydoc_data",  # the last is the default general text of trials
    "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip", "__pycache__",  # not in every Python
}  # fmt: skip
PER_FILE = 40  # rows at most, so that no module is much of the text
PARAGRAPHS = range(60, 181)  # characters of a paragraph


def demo_rows(split: str) -> list[Row]:
    """The demo's rows of a split, in their order."""
    text = (DEMO / f"wordnet_categories.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def archive(folder: Path) -> Path:
    """The source archive of vaderSentiment in a folder, fetched by pip where it is not there yet.

    Raises SystemExit where pip fails, and for another file than the one these tasks are made of.
    """
    path = folder / ARCHIVE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [*FETCH, "--dest", str(folder)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode or not path.exists():
            sys.exit(
                f"sentiment: expected {ARCHIVE} in {folder}, and pip could not fetch it: put it there (--sources FOLDER), "
                "or leave the task out with --only"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        sys.exit(f"{path}: expected sha256 {ARCHIVE_SHA256}, got {found}: delete the file, and it is fetched again")
    return path


def snippets(path: Path) -> Iterator[tuple[float, str]]:
    """The mean rating and the text of each film review snippet in the archive."""
    with tarfile.open(path) as outer:
        inner = BytesIO(outer.extractfile(INNER).read())  # type: ignore[union-attr]
    with tarfile.open(fileobj=inner) as within:
        text = within.extractfile(SNIPPETS).read().decode("utf-8")  # type: ignore[union-attr]
    for line in text.splitlines():
        _, rating, snippet = line.split("\t")
        yield float(rating), " ".join(snippet.split())


def sentiment(path: Path, draw: random.Random, count: int) -> list[Row]:
    """`count` snippets that the raters agree on, in random order: as many positive as negative ones."""
    found: dict[str, dict[str, None]] = {"positive": {}, "negative": {}}
    for rating, snippet in snippets(path):
        if abs(rating) >= CLEAR and len(snippet) in LENGTHS:
            found["positive" if rating > 0 else "negative"][snippet] = None
    both = found["positive"].keys() & found["negative"].keys()
    rows = []
    for label, texts in found.items():
        taken = draw.sample([text for text in texts if text not in both], count // 2)
        rows += [{"prompt": f"Review: {text}\nSentiment:", "completion": f" {label}"} for text in taken]
    draw.shuffle(rows)
    return rows


def documented(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """The dotted name and the docstring of a module and of everything in it."""

    def within(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield name, text
            for child in ast.iter_child_nodes(node):
                yield from within(child, f"{name}.{child.name}" if hasattr(child, "name") else name)

    return within(ast.parse(source), module)


def paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of prose in a docstring, each in one line."""
    for part in re.split(r"\n\s*\n", docstring):
        text = " ".join(part.split())
        if ">>>" not in part and len(text) in PARAGRAPHS and re.match("[A-Z]", text) and text.endswith("."):
            yield text


def python_docs(draw: random.Random, library: Path | None = None) -> Iterator[list[Row]]:
    """The rows of each module of the standard library, the modules in random order. No text comes twice."""
    library = library or Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(library) for path in library.rglob("*.py")]
    files = sorted((path for path in files if NOT_READ.isdisjoint(path.parts)), key=Path.as_posix)
    draw.shuffle(files)
    seen: set[str] = set()
    for file in files:
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        rows = []
        for name, docstring in documented((library / file).read_bytes(), module):
            for text in paragraphs(docstring):
                if text not in seen and len(rows) < PER_FILE:
                    seen.add(text)
                    rows.append({"text": f"{name}: {text}"})
        if rows:
            yield rows
