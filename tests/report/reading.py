"""What the tests of the report share: the page as a reader of its markup meets it, and changes to a folder."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from plopfast.report.folder import RunFolder
from plopfast.report.page import sections_of, write_report

EMPTY = ("meta", "link", "br", "line", "rect", "circle", "path")  # without an end tag


class Page(HTMLParser):
    """Headings, rows of tables (class, cells), what is said to those who listen, ids, and the text."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.alts, self.tags, self.rows, self._in = [], [], [], [], []
        self.text = ""
        self.feed(text)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        kept = dict(attributes)
        self.tags.append((tag, kept))
        if "aria-label" in kept and tag != "nav":
            self.alts.append(kept["aria-label"])
        if tag not in EMPTY:
            self._in.append((tag, kept.get("class", "")))
        if tag == "tr":
            self.rows.append([kept.get("class", ""), []])
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append([tag, ""])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            self._in.pop()

    def handle_data(self, data):
        tags = [tag for tag, _ in self._in]
        if "style" in tags:
            return
        self.text += data
        if {"h1", "h2", "h3"} & {*tags}:
            self.headings[-1][1] += data
        elif {"td", "th"} & {*tags}:
            self.rows[-1][1][-1] += data

    @property
    def titles(self):
        """The headings of sections."""
        return [text for tag, text in self.headings if tag == "h2" and text != "Before you rely on it"]

    @property
    def lacking(self):
        """The ids of sections that have only the line that says which command makes them."""
        return [kept["aria-labelledby"] for tag, kept in self.tags if tag == "section" and kept.get("class") == "lacks"]


def report(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def table(folder, name) -> list[dict]:
    """The rows of a CSV file of the report."""
    return list(csv.DictReader(io.StringIO((folder / "report" / f"{name}.csv").read_text(encoding="utf-8"))))


def numbers(rows, *columns):
    return {next(iter(row.values())): tuple(float(row[column]) for column in columns) for row in rows}


def change(folder, name, **values):
    kept = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(kept | values))


def put(folder: Path, name: str, edit):
    """Writes what `edit` makes of a file's value."""
    path = folder / name
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def figures(folder) -> dict:
    """CSV name, or title, -> figure."""
    found = [figure for section in sections_of(RunFolder(folder)) for figure in section.figures()]
    return {figure.title: figure for figure in found} | {figure.csv.name: figure for figure in found if figure.csv}
