"""The house rules that a reader may rely on: imports run one way, the public names are what they say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import plopfast

ROOT = Path(plopfast.__file__).parent
LEAVES = {"errors", "config", "files", "logs", "machine", "progress"}
MAY_IMPORT = {
    "errors": set(), "config": {"errors", "files"}, "files": {"errors"}, "machine": set(), "progress": set(),
    "logs": {"errors"}, "data": {"errors"}, "models": LEAVES, "ops": {"errors", "kernels"},
    "distributed": {"errors", "machine", "models"}, "tuning": LEAVES | {"kernels", "models"},
    "lora": LEAVES | {"models", "ops", "tuning"},
    "eva": LEAVES | {"distributed", "models"},
    "confidence": {"errors"},
    "scores": LEAVES | {"confidence"},
    "nfn": LEAVES | {"data", "distributed", "models", "ops", "lora", "eva", "confidence", "scores"},
    "placement": LEAVES | {"nfn", "scores"},
    "checkpoint": LEAVES | {"distributed", "models", "lora", "placement"},
    "loss": LEAVES | {"data", "models", "lora"},
    "blocks": LEAVES | {"models"},
    "evaluate": LEAVES | {"data", "models", "loss"},
    "train": LEAVES | {"data", "models", "lora", "loss", "blocks", "checkpoint", "distributed", "logs"},
    "controls": LEAVES | {"data", "models"},
    "criteria": LEAVES | {"data", "models", "scores", "lora", "loss", "placement"},
    "pictures": {"errors"},
    "sections": LEAVES | {"confidence", "nfn", "placement", "pictures"},
    "report": LEAVES | {"sections", "placement"},
    "pipeline": LEAVES
    | {"data", "distributed", "models", "lora", "eva", "nfn", "placement", "checkpoint", "evaluate", "train", "report"}
    | {"estimate", "scores"},
    "paired": set(),
    "trial_runs": LEAVES
    | {"data", "models", "lora", "placement", "checkpoint", "evaluate", "train", "pipeline"},
    "trial": LEAVES | {"data", "lora", "eva", "nfn", "placement", "paired", "pipeline", "trial_runs"},
    "search": LEAVES | {"data", "lora", "models", "nfn", "placement", "pipeline", "train"},
    "estimate": LEAVES | {"models", "lora", "loss", "blocks", "placement"},
    "audit": LEAVES
    | {"data", "models", "nfn", "confidence", "scores", "controls", "criteria", "pipeline"},
    "benchmark": LEAVES | {"kernels", "lora", "tuning"},
    "doctor": LEAVES | {"kernels", "models", "ops", "lora", "pipeline"},
    "cli": LEAVES | {"distributed", "models", "ops", "tuning", "pipeline", "audit", "trial", "search", "doctor", "benchmark"},
    "__main__": {"cli"}, "__init__": None,
}  # fmt: skip


def imports(tree):
    """(module, level) of every import but those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name, node.level) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        else:
            yield from imports(node)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_imports_run_one_way(path):
    allowed = MAY_IMPORT[path.stem]
    if allowed is None:
        return
    own = {name.split(".")[0] for name, level in imports(ast.parse(path.read_text())) if level == 1}
    assert own <= allowed, f"{path.name} must not import {own - allowed}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_nothing_of_plopfast(path):
    for name, level in imports(ast.parse(path.read_text())):
        known = {"torch", "triton"} | sys.stdlib_module_names
        assert level == 1 or name.split(".")[0] in known, name
    if path.stem == "__init__":
        assert len(ast.parse(path.read_text()).body) == 1, "docstring only"


def test_public_names_exist_and_agree():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names} - {
        None
    }
    assert typed == set(plopfast.__all__)
    for name in plopfast.__all__:
        assert getattr(plopfast, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = plopfast.nothing


def test_help_needs_no_torch():
    code = "import sys, plopfast.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_no_pickle_and_no_remote_code():
    for path in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        text = path.read_text()
        for word in ("torch.load(", "torch.save(", "import pickle", "trust_remote_code"):
            assert word not in text, f"{path.name}: {word}"
