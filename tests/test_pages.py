"""Every command and every snippet of README and docs: commands are parsed as they stand, Python runs with the small model in place.

docs/peft.md and docs/grpo.md, which need trainers, have tests of their own in tests/integrations/.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import adapted, build

import plopfast as pf
from plopfast.cli.options import parse
from plopfast.data.rows import DEMO

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_THEIR_OWN = {"peft.md", "grpo.md"}
NOTEBOOK = ROOT / "docs" / "first_run.ipynb"
TRAINERS = re.compile(r"torchrun(?: --[\w-]+[ =]\S+)* -m ")


def blocks(page, *languages):
    """The code blocks of these languages, fence by fence."""
    found, inside = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = line[3:]
                found.append((inside, []))
            else:
                inside = None
        elif inside is not None:
            found[-1][1].append(line)
    return ["\n".join(lines) for language, lines in found if language in languages]


def commands(page):
    """The plopfast commands of a page's blocks, lines that end with a backslash joined, without comments."""
    for text in blocks(page, "", "sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", TRAINERS.sub("", line)):
                if part.strip().startswith("plopfast "):
                    yield shlex.split(part, comments=True)[1:]


EVERY = [pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:90]) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", EVERY)
def test_commands_are_taken_as_they_stand(words):
    if not {"...", "|"} & {*words} and not words[0].startswith(("run|", "score|")):
        assert parse(words).command == words[0]


def test_there_are_commands():
    assert len(EVERY) > 30


@pytest.fixture
def place(tmp_path, monkeypatch, tokenizer):
    """A folder with what the snippets name: rows, adapters, a model where they name one of the hub."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in DEMO["train"].read_text().splitlines()[:80]]
    for name in ("rows", "train", "valid"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question": row["prompt"], "answer": row["completion"]} for row in rows[:9]]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    Path("b.csv").write_text("question,answer\n" + "".join(f"one {n}?,two\n" for n in range(9)))
    for name in ("legal", "support"):
        pf.save_adapter(adapted(), tmp_path / "runs" / "mine" / "jobs" / name / "adapter")
    monkeypatch.setattr(pf, "load_model", lambda *_, **__: (build("llama"), tokenizer))
    return tmp_path


def space_of(tokenizer):
    """What a snippet has from the text before it."""
    model = build("llama")
    examples = pf.tokenize(pf.read_jsonl("train.jsonl"), tokenizer)
    placement = pf.Placement({info.name: (2, 4.0) for info in pf.linear_modules(model)[:4]}, [], "explicit", 0)
    return {
        "model": model, "tokenizer": tokenizer, "placements": {"legal": placement, "support": placement},
        "rates": {"legal": 1e-3, "support": 1e-3}, "rows": {"legal": examples, "support": examples},
        "inputs": {"input_ids": torch.ones(3, 4, dtype=torch.long)},
    }  # fmt: skip


SNIPPETS = [
    pytest.param(text, id=f"{page.name} {number}")
    for page in PAGES
    if page.name not in OF_THEIR_OWN
    for number, text in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("text", SNIPPETS)
def test_snippets_run(text, place, tokenizer):
    space = space_of(tokenizer)
    exec(compile(text, "snippet", "exec"), space)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1200


def test_the_notebook_runs(place, tokenizer, capsys):
    """Its code cells, one after the other, as a notebook would run them; what they show, too."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    space: dict = {}
    for number, cell in enumerate(cells):
        assert not cell["outputs"], "kept without outputs"
        *before, last = "".join(cell["source"]).rstrip().split("\n")
        exec(compile("\n".join(before), f"cell {number}", "exec"), space)
        try:
            shown = eval(compile(last, f"cell {number}", "eval"), space)
        except SyntaxError:
            exec(compile(last, f"cell {number}", "exec"), space)
        else:
            if hasattr(shown, "_repr_html_"):
                assert shown._repr_html_().startswith("<table>")
    assert space["result"].steps == 20 and Path("out/adapter/adapter_model.safetensors").exists()
