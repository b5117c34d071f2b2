"""The rules of the house: imports run one way, private names stay in their file, public names are what they say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plopfast

ROOT = Path(plopfast.__file__).parent
BELOW = {"support", "models", "data"}
MAY_IMPORT = {  # wing -> the other wings that it may import, all of them above it; kernels import only torch and triton
    "support": set(),
    "models": {"kernels", "support"},
    "data": {"support"},
    "lora": {"kernels", "models", "support"},
    "scoring": {"lora", *BELOW},
    "training": {"lora", *BELOW},
    "placing": {"scoring", "lora", *BELOW},
    "integrations": {"placing", "training", "scoring", "lora", *BELOW},
    "report": {
        "placing",
        "scoring",
        "lora",
        "data",
        "support",
    },  # reads files only: what they hold, and nothing that computes
    "run": {"report", "integrations", "placing", "training", "scoring", "lora", *BELOW},
    "studies": {"run", "report", "integrations", "placing", "training", "scoring", "lora", *BELOW},
    "cli": {"studies", "run", "report", "integrations", "placing", "training", "scoring", "lora", "kernels", *BELOW},
}
PACKAGE = sorted(path for wing in MAY_IMPORT for path in (ROOT / wing).glob("*.py"))


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


def test_every_file_is_in_a_wing():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*MAY_IMPORT, "demo", "kernels"}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_run_one_way(path):
    wings = {name.split(".")[0] for name, level in imports(ast.parse(path.read_text())) if level == 2}
    assert wings <= MAY_IMPORT[path.parent.name], f"{path.parent.name} must not import from these"


def test_the_map_lists_the_wings_in_their_order():
    order = ["kernels", *MAY_IMPORT]
    for number, wing in enumerate(order[1:], 1):
        assert MAY_IMPORT[wing] <= set(order[:number]), f"{wing}: a wing imports from those above it alone"
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\| `(?:plopfast/)?(\w+)/` \|", text, re.MULTILINE) == order


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_private_names_stay_in_their_file(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    private = [alias.name for node in nodes for alias in node.names if re.match("_[a-zA-Z]", alias.name)]
    assert not private, "another file needs these: make them public, or move them"


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
    code = "import sys, plopfast.cli.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_no_pickle_and_no_remote_code():
    for path in [*PACKAGE, *(ROOT / "kernels").glob("*.py")]:
        text = path.read_text()
        for word in ("torch.load(", "torch.save(", "import pickle"):
            assert word not in text, f"{path.name}: {word}"
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in calls:
            if getattr(call.func, "attr", "") in ("from_pretrained", "from_config"):
                trust = [ast.unparse(k.value) for k in call.keywords if k.arg == "trust_remote_code"]
                assert trust == ["False"], (
                    f"{path.name}, line {call.lineno}: without it, transformers asks, and may run it"
                )
