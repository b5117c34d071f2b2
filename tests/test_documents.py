"""What the documents name exists: files, commands, options, public names."""

import contextlib
import functools
import io
import pkgutil
import re
from pathlib import Path

import pytest

import plopfast
from plopfast.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md"])
FOLDERS = r"(?:\.ci|\.github|bench|docs|kernels|plopfast|results|tests)/"
SOURCES = sorted(path for folder in ("plopfast", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py"))


def commands(text):
    """Yield what stands in code blocks and between backticks, a list of words each."""
    block = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    lines = [line for part in block.findall(text) for line in part.splitlines()]
    for line in lines + re.findall(r"`([^`]+)`", block.sub("", text)):
        yield from (part.split() for part in line.split("&&"))


@functools.cache
def options_of(command):
    """The options in a command's help; fails if there is no such command."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        main.main([command, "--help-all"])
    assert end.value.code == 0, f"no such command: plopfast {command}"
    return set(re.findall(r"--[a-z][\w-]*", said.getvalue()))


@functools.cache
def all_options():
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        main.main(["--help"])
    return {
        option for name in re.findall(r"^  ([a-z]+) ", said.getvalue(), re.MULTILINE) for option in options_of(name)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_exist(document):
    text = document.read_text()
    named = {word.rstrip(",.;:") for words in commands(text) for word in words if re.match(FOLDERS, word)}
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    missing = {name for name in named if not any([*ROOT.glob(name), *document.parent.glob(name)])}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_options_and_public_names_exist(document):
    text = document.read_text()
    for words in commands(text):
        while "plopfast" in words[1:] and words[words.index("plopfast") - 1] == "-m":  # torchrun ... -m plopfast
            words = words[words.index("plopfast") :]
        given = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        script = next((ROOT / word for word in words if re.fullmatch(r"(\.ci|bench)/\w+(\.py)?", word)), None)
        if words[:1] == ["plopfast"] and len(words) > 1:
            assert given <= options_of(words[1]), words
        elif words and words[0].startswith("--"):
            assert given <= all_options(), words
        elif script:
            assert all(option in script.read_text() for option in given), words
    assert set(re.findall(r"\bpf\.([A-Za-z]\w*)", text)) <= set(plopfast.__all__)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_dotted_names_exist(document):
    """Such as `plopfast.models.loading.load_model()`."""
    for name in re.findall(r"`(plopfast(?:\.\w+)+)(?:\(\))?`", document.read_text()):
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sources_name_files_that_exist(source):
    named = re.findall(r"(?<![\w/])(?:bench|docs|kernels|tests)/[a-z0-9_/]+\.(?:py|md|jsonl?)\b", source.read_text())
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_readme_and_the_gate_name_one_torch():
    (readme,) = re.findall(r"pip install torch==([\d.]+)", (ROOT / "README.md").read_text())
    assert f"\ntorch=={readme}\n" in (ROOT / ".ci" / "constraints.txt").read_text()


def test_the_hooks_are_the_gates_linters():
    gate = (ROOT / ".ci" / "run").read_text().split("== linters")[1]
    hooks = re.findall(r"entry: (\w+ ?\w*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [
        " ".join(line.split()[: 1 + line.startswith("ruff")])
        for line in gate.splitlines()
        if line[:4] in ("ruff", "mypy")
    ] == hooks
    assert re.findall(r"- run: (.*)", (ROOT / ".github" / "workflows" / "gate.yml").read_text()) == [".ci/run"]
