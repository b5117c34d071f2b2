"""The tasks of `study_tasks.py` that are made of texts by people: categories, sentiment, python-docs.

`categories` is the demo task, shipped in this repository. `sentiment` is made of film review snippets, each rated by
about 20 people, from the source archive of vaderSentiment on PyPI (MIT; the wheel lacks them). They are not shipped here, as
the snippets are quotations: the archive (2.4 MB) is read from a folder, into which pip fetches it once, and its sha256 is
checked. `python-docs` is read from the docstrings of the Python that runs this, so its rows depend on the version.
"""

import ast
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from plopfast.data.rows import DEMO, read_jsonl
from plopfast.support import files

Row = dict[str, str]

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LABELS = "negative", "neutral", "positive"
NEUTRAL, CLEAR = 1.0, 1.5  # means of ratings from -4 to 4: neutral below the one, clear from the other on
LENGTHS = range(40, 141)  # characters of a snippet
FETCH = [
    sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "vaderSentiment", "vaderSentiment==3.3.2",
]  # fmt: skip

NOT_READ = {
    "test", "tests", "site-packages", "dist-packages", "pydoc_data",  # the last is the default general text of trials
    "idlelib", "lib2to3", "turtledemo", "tkinter", "ensurepip", "__pycache__",  # not in every Python
}  # fmt: skip
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
PER_FILE = 40  # rows at most, so that no module is much of the text
PARAGRAPHS = range(60, 181)  # characters of a paragraph


def letters(text: str) -> str:
    """The letters and digits of a text: what makes two texts the same."""
    return "".join(filter(str.isalnum, text.casefold()))


def demo_rows(split: str) -> list[Row]:
    """The demo's rows of a split, in their order."""
    return [row for _, row in read_jsonl(DEMO[split])]


def archive(folder: Path) -> Path:
    """The source archive of vaderSentiment in a folder; pip fetches it if it is not there yet.

    Ends the program where pip fails, and where the file is not the one that the task is made of.
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
    found = files.sha256(path)
    if found != ARCHIVE_SHA256:
        sys.exit(f"{path}: expected sha256 {ARCHIVE_SHA256}, got {found}: delete the file, and it is fetched again")
    return path


def snippets(path: Path) -> Iterator[tuple[float, str]]:
    """The mean rating and the text of each film review snippet in the archive, which holds an archive of its own."""
    with tarfile.open(path) as outer, tarfile.open(fileobj=BytesIO(_member(outer, INNER))) as inner:
        text = _member(inner, SNIPPETS).decode("utf-8")
    for line in text.splitlines():
        _, rating, snippet = line.split("\t")
        yield float(rating), " ".join(snippet.split())


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file  # a file, no folder
    return file.read()


def label_of(rating: float) -> str | None:
    """The label of a mean rating, None between the labels."""
    if abs(rating) < NEUTRAL:
        return "neutral"
    return None if abs(rating) < CLEAR else "positive" if rating > 0 else "negative"


def sentiment(path: Path, draw: random.Random, count: int) -> list[Row]:
    """`count` snippets in random order, as many of each label, with no snippet twice."""
    found: dict[str, tuple[str, str]] = {}  # of letters and digits: the snippet, its label
    for rating, snippet in snippets(path):
        if len(snippet) in LENGTHS and (label := label_of(rating)):
            found.setdefault(letters(snippet), (snippet, label))
    rows = []
    for number, label in enumerate(LABELS):
        texts = [text for text, of in found.values() if of == label]
        size = (count + number) // len(LABELS)
        rows += [{"prompt": f"Review: {t}\nSentiment:", "completion": f" {label}"} for t in draw.sample(texts, size)]
    draw.shuffle(rows)
    return rows


def documented(source: bytes, module: str) -> Iterator[tuple[str, str]]:
    """The dotted name and the docstring of a module and of each class and function in it."""

    def within(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, DOCUMENTED):
            name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
            if text := ast.get_docstring(node):
                yield name, text
        for child in ast.iter_child_nodes(node):
            yield from within(child, name)

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
    modules = [path.relative_to(library) for path in library.rglob("*.py")]
    modules = sorted((path for path in modules if NOT_READ.isdisjoint(path.parts)), key=Path.as_posix)
    draw.shuffle(modules)
    seen: set[str] = set()
    for file in modules:
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        rows = []
        for name, docstring in documented((library / file).read_bytes(), module):
            for text in paragraphs(docstring):
                if letters(text) not in seen and len(rows) < PER_FILE:
                    seen.add(letters(text))
                    rows.append({"text": f"{name}: {text}"})
        if rows:
            yield rows
