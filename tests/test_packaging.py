"""`kernels/` is plopfast.kernels from a wheel, an editable install and a bare checkout; nothing is named `kernels`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import sys, pathlib, plopfast, plopfast.kernels.reference, plopfast.data.rows
assert all(p.is_file() for p in plopfast.data.rows.DEMO.values())
print(pathlib.Path(plopfast.__file__).resolve().parent)
"""
NO_KERNELS = "import importlib.util as u; assert u.find_spec('kernels') is None, u.find_spec('kernels')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, links kept, so that building leaves nothing here."""
    target = tmp_path_factory.mktemp("checkout") / "plopfast"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", checkout, "-w", out, "--no-deps", "--no-build-isolation")
    return next(out.glob("*.whl"))


def pip(*arguments, python=sys.executable):
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        *map(str, arguments),
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run(command, check=True, capture_output=True)


def fresh_environment(folder):
    """A new environment that sees this one's packages (torch and others) but not this one's plopfast."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(python, code, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_plopfast_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "plopfast/kernels/torch_ops.py" in names and "plopfast/report/page.html.j2" in names
    assert "plopfast/demo/wordnet_categories.train.jsonl" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"plopfast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_from_a_wheel(wheel, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    pip("install", "--no-deps", "--ignore-installed", wheel, python=python)
    assert (tmp_path / "venv") in Path(run(python, CHECK, tmp_path)).parents
    run(python, NO_KERNELS, tmp_path)


def test_from_an_editable_install(checkout, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", checkout, python=python)
    assert Path(run(python, CHECK, tmp_path)) == (checkout / "plopfast").resolve()
    run(python, NO_KERNELS, tmp_path)


def test_from_an_uninstalled_checkout(checkout, tmp_path):
    code = "import sys; sys.path.insert(0, '.')\n" + CHECK
    assert Path(run(sys.executable, code, checkout)) == (checkout / "plopfast").resolve()


def test_transformers_imports_from_the_checkouts_root(checkout):
    code = "import sys; sys.path.insert(0, '.')\nimport transformers\nfrom transformers import LlamaForCausalLM, AutoModelForCausalLM"
    run(sys.executable, code, checkout)
